"""Streaming: one order for any number of processes and workers, nothing twice, exact going on, every bad
record counted, memory that does not grow."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from itertools import islice

import fsspec
import numpy as np
import pytest
import torch

from tests import train_world as tw
from train.config import make_config
from train.data import open_bank_of
from train.entries import Place, lane_entries, read_entries
from train.facestore import FaceStore
from train.shards import parse_record, scan_shard
from train.stream import LaneState, StreamedBatches, open_records, subset_of
from withanyone import FaceAnalyzer

LANES, SHARDS, EACH = 4, 8, 3  # 24 records a subset


@pytest.fixture(scope="module")
def analyzer(tmp_path_factory):
    from tests import tiny_faces

    return FaceAnalyzer.from_pretrained(tiny_faces.write_pack(tmp_path_factory.mktemp("pack")), crop_size=64)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Eight shards of three records in each subset, of two sizes, one person each, and a bank."""
    folder = tmp_path_factory.mktemp("stream") / "s"
    for subset, named in (("train_rec", False), ("train_cp", True)):
        for shard in range(SHARDS):
            made = {}
            for k in range(EACH):
                number = shard * EACH + k
                size = (64, 64) if number % 3 else (96, 64)
                made[f"{number:05d}"] = tw.record([number % 5], 100 + number, size, named=named)
            tw.write_tar(folder / subset / f"{shard:04d}.tar", tw.flat(made))
    references = {}
    for identity in range(5):
        for photo in range(3):
            key = f"person_{identity:03d}/{photo}"
            references[f"{key}.jpg"] = tw.record([identity], photo, (48, 48), named=False)["jpg"]
            references[f"{key}.npy"] = tw.npy(
                {"bboxes": [[8, 8, 40, 40]], "embedding": tw.embedding(identity, photo)[None]}
            )
    tw.write_tar(folder / "ref" / "tars" / "0.tar", references)
    return folder


def _config(root, **overrides):
    values = {
        "streaming": True, "stream_lanes": LANES, "stream_shuffle": 4, "train_batch_size": 4,
        "paired_ratio": 1.0, "max_bad_share": 1.0,
    }  # fmt: skip
    return make_config(tw.settings(root, root / "out", **{**values, **overrides}))


def _stream(config, analyzer, rank=0, world_size=1, states=None):
    stream = StreamedBatches(config, open_bank_of(config, None), analyzer, rank=rank, world_size=world_size)
    if states:
        stream.load_state(states)
    return stream


def _keys(batch):
    return list(zip(batch.positions, batch.latents_keys, strict=True))


def _take(stream, count, start=0):
    """`count` batches, and the state right behind them."""
    return [_keys(batch) for batch in islice(stream.batches(start), count)], stream.state()


def test_a_pass_gives_every_record_once_and_the_next_one_another_order(root, analyzer):
    batches, _ = _take(_stream(_config(root), analyzer), 12)
    pictures = [key for batch in batches for _, key in batch]
    assert len(set(pictures[:24])) == 24 and set(pictures[24:]) == set(pictures[:24])
    assert pictures[24:] != pictures[:24]
    again, _ = _take(_stream(_config(root), analyzer), 12)
    other, _ = _take(_stream(_config(root, seed=1), analyzer), 12)
    assert again == batches and other != batches


def test_the_order_is_the_same_on_any_number_of_processes(root, analyzer):
    whole, _ = _take(_stream(_config(root), analyzer), 12)
    for world_size in (2, 4):
        ranks = [_take(_stream(_config(root), analyzer, r, world_size), 12)[0] for r in range(world_size)]
        for number, batch in enumerate(whole):
            assert sorted(key for rank in ranks for key in rank[number]) == batch


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 2), (1, 4)])
def test_the_order_is_the_same_with_any_number_of_workers(root, analyzer, world_size, workers):
    whole, _ = _take(_stream(_config(root), analyzer), 8)
    config = _config(root, dataloader_num_workers=workers)
    ranks = [_take(_stream(config, analyzer, r, world_size), 8)[0] for r in range(world_size)]
    for number, batch in enumerate(whole):
        assert sorted(key for rank in ranks for key in rank[number]) == batch


@pytest.mark.parametrize("stop", [1, 3, 5, 7])
@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_going_on_from_a_state_gives_the_same_batches_on_another_number_of_processes(
    root, analyzer, stop, ratio
):
    config = _config(root, paired_ratio=ratio, stream_shuffle=5)
    whole, _ = _take(_stream(config, analyzer), stop + 6)
    before = [_take(_stream(config, analyzer, r, 2), stop) for r in range(2)]
    states = json.loads(json.dumps([state for _, state in before]))
    for world_size in (1, 2, 4):
        streams = [_stream(config, analyzer, r, world_size, states) for r in range(world_size)]
        ranks = [_take(stream, 6, start=stop)[0] for stream in streams]
        for number in range(6):
            assert sorted(key for rank in ranks for key in rank[number]) == whole[stop + number]


def test_batches_that_wait_in_several_sizes_are_not_lost(root, analyzer):
    config = _config(root, buckets=[[64, 64], [96, 64, 3]], train_batch_size=5)
    whole, _ = _take(_stream(config, analyzer), 10)
    for stop in (1, 2, 5):
        _, state = _take(_stream(config, analyzer), stop)
        rest, _ = _take(_stream(config, analyzer, states=[state]), 10 - stop, start=stop)
        assert rest == whole[stop:]


def test_pairs_come_by_their_share_in_every_lane():
    for ratio in (0.25, 0.5, 0.9):
        for lane in range(16):
            shares = [subset_of(n, lane, ratio) == "cp" for n in range(1000)]
            assert abs(np.mean(shares) - ratio) < 0.002
    step = [subset_of(0, lane, 0.5) == "cp" for lane in range(16)]
    assert 6 <= sum(step) <= 10  # a batch is not all of one kind


def test_a_sample_is_what_its_record_and_position_make_it(root, analyzer):
    stream = _stream(_config(root, paired_ratio=0.0), analyzer)
    batch = next(iter(stream.batches(0)))
    digests = {}
    for shard in sorted((root / "train_rec").glob("*.tar")) + sorted((root / "train_cp").glob("*.tar")):
        for entry in read_entries(str(shard)):
            record = parse_record(entry.key, entry.parts, paired=False)
            digests[record.digest] = record
    for key, embeddings in zip(batch.latents_keys, batch.embeddings, strict=True):
        record = digests[key.split()[0]]
        np.testing.assert_array_equal(embeddings[: len(record.embeddings)], record.embeddings)


def test_any_file_system_will_do(root, analyzer, tmp_path):
    """A stand-in for the Hub: fsspec's file system in memory."""
    memory = fsspec.filesystem("memory")
    memory.put(str(root), "/streamed", recursive=True)
    local, _ = _take(_stream(_config(root), analyzer), 5)
    config = _config(root)
    config.shards, config.cache_dir = "memory://streamed", str(tmp_path / "cache")
    remote, _ = _take(_stream(config, analyzer), 5)
    assert remote == local


def test_raw_records_keep_every_json_key(tmp_path):
    """Keys that appear late, where a reader that looks at the first records would drop them."""
    made = {str(i): tw.record([0], i, named=False) for i in range(8)}
    info = json.loads(made["7"]["json"])
    made["7"]["json"] = json.dumps({**info, "crop": [0, 0, 64, 64], "late": {"a": [1]}}).encode()
    made["3"]["json"] = b"{"
    path = tmp_path / "0.tar"
    tw.write_tar(path, tw.flat(made))
    rows = list(open_records([str(path)]))
    assert [row["key"] for row in rows] == [str(i) for i in range(8)]
    assert rows[7]["json"]["late"] == {"a": [1]} and rows[7]["json"]["crop"] == [0, 0, 64, 64]
    assert isinstance(rows[0]["npy"]["embeddings"], np.ndarray)
    assert rows[3]["bad"] == "bad_json" and rows[2]["bad"] == ""


def test_two_hundred_damaged_records_are_counted_and_all_good_ones_come_out(
    root,
    analyzer,
    tmp_path,
):
    path, kinds, good, evil = tw.damaged_shard(tmp_path)
    folder = tmp_path / "s"
    (folder / "train_cp").mkdir(parents=True)
    (folder / "train_cp" / "0.tar").write_bytes(path.read_bytes())
    fsspec.filesystem("file").put(str(root / "ref"), str(folder / "ref"), recursive=True)
    config = _config(folder, stream_lanes=1, train_batch_size=1, stream_shuffle=64, complete_records=False)
    stream, seen, bad = _stream(config, analyzer), [], Counter()
    for batch in islice(stream.batches(0), 2 * len(good)):
        bad.update(batch.bad)
        seen.append(batch.latents_keys[0])
    assert len(set(seen[: len(good)])) == len(good)
    assert not evil.exists()
    # the damage of a pass is reported with the samples behind it: two passes have all of one
    expected = {kind: n for kind, n in kinds.items() if kind != "good"}
    for kind, count in expected.items():
        assert count <= bad[kind] <= 2 * count, kind
    first = Counter()
    for entry, place in lane_entries([str(path)], Place(), seed=0, subset="cp", lane=0, lanes=1, shuffle=64):
        if place.epoch:
            break
        first[entry.reason] += 1
    assert first["path_escape"] == kinds["path_escape"] and first["not_a_file"] == kinds["not_a_file"]
    assert sum(first.values()) == sum(kinds.values())


def test_entries_can_be_read_from_any_of_their_offsets(root):
    path = str(root / "train_rec" / "0000.tar")
    entries = list(read_entries(path))
    assert len(entries) == EACH
    for number, entry in enumerate(entries):
        assert [e.key for e in read_entries(path, entry.offset)] == [e.key for e in entries[number:]]


def test_a_shard_that_breaks_off_says_so_and_the_rest_goes_on(tmp_path):
    path = tmp_path / "a.tar"
    tw.write_tar(path, tw.flat({str(i): tw.record([i], i, named=False) for i in range(4)}))
    cut = next(m for m in scan_shard(str(path)).members if m.name == "2.jpg").offset + 100
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    assert [(e.key, e.reason) for e in read_entries(str(path))] == [
        ("0", ""), ("1", ""), ("", "broken_shard")]  # fmt: skip
    damaged = bytearray(whole)
    damaged[cut - 612 : cut - 500] = b"x" * 112  # the header of 2.jpg
    path.write_bytes(damaged)
    assert [e.reason for e in read_entries(str(path))] == ["", "", "broken_shard"]
    assert scan_shard(str(path)).bad == {"broken_shard": 1}
    path.write_bytes(b"no tar at all")
    assert [e.reason for e in read_entries(str(path))] == ["broken_shard"]


def test_lanes_without_a_usable_record_are_an_error(root, analyzer):
    config = _config(root, min_aesthetic_score=9.0)
    with pytest.raises(ValueError, match="no record that can be used"):
        next(iter(_stream(config, analyzer).batches(0)))


@pytest.mark.parametrize(
    ("overrides", "world_size", "named"),
    [
        ({"stream_lanes": 6}, 4, "`stream_lanes` 6 does not divide"),
        ({"stream_lanes": 16}, 1, "`stream_lanes` is 16, but 'cp' has 8"),
    ],
)
def test_lanes_that_do_not_fit_are_refused(root, analyzer, overrides, world_size, named):
    config = _config(root, train_batch_size=8, **overrides)
    with pytest.raises(ValueError, match=named):
        _stream(config, analyzer, 0, world_size)


def test_a_checkpoint_made_without_streaming_is_refused(root, analyzer):
    with pytest.raises(ValueError, match="without `streaming`"):
        next(iter(_stream(_config(root), analyzer).batches(5)))
    with pytest.raises(ValueError, match="`stream_lanes`"):
        _stream(_config(root), analyzer, states=[{"lanes": {"0": LaneState().as_json()}, "waiting": []}])


def test_faces_are_detected_once_and_kept(root, analyzer, tmp_path, monkeypatch):
    folder = tmp_path / "s"
    for shard in range(LANES):
        made = {f"{shard}{k}": tw.record([k], k + 7 * shard, named=False, kps=False) for k in range(2)}
        bare = {k: {s: d for s, d in p.items() if s != "npy"} for k, p in made.items()}
        tw.write_tar(folder / "train_rec" / f"{shard}.tar", tw.flat(bare))
    calls = Counter()
    detect = FaceAnalyzer.detect
    monkeypatch.setattr(
        FaceAnalyzer, "detect", lambda self, *a, **k: (calls.update(["n"]), detect(self, *a, **k))[1]
    )
    config = _config(folder, paired_ratio=0.0, contrastive_loss_weight=0.0)
    first = list(islice(_stream(config, analyzer).batches(0), 4))  # two passes
    assert calls["n"] == 8
    assert all(torch.isfinite(batch.kps).all() for batch in first)
    list(islice(_stream(config, analyzer).batches(0), 4))
    assert calls["n"] == 8
    assert any(path.suffix == ".sqlite" for path in (folder / "cache").iterdir())


def test_the_face_store_gives_back_what_it_got(root, tmp_path):
    entry = next(read_entries(str(root / "train_rec" / "0000.tar")))
    record = parse_record(entry.key, entry.parts, paired=False)
    store = FaceStore(tmp_path / "faces.sqlite")
    assert store.get(record) is None
    kps, rows = np.full((1, 5, 2), np.nan, np.float32), tw.embedding(3)[None]
    store.put(record, kps, rows)
    for found, given in zip(FaceStore(tmp_path / "faces.sqlite").get(record), (kps, rows), strict=True):
        np.testing.assert_array_equal(found, given)
    record.bboxes = record.bboxes + 1
    assert store.get(record) is None  # other boxes are other faces


def test_a_reader_is_light_to_send(root, analyzer):
    stream = _stream(_config(root), analyzer)
    assert len(pickle.dumps(stream.reader)) < 20_000
