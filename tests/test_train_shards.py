"""Shards: every good record comes out, every bad one is counted by its reason, nothing in them is
executed."""

from __future__ import annotations

import io
import json
import pickle

import numpy as np
import pytest

from tests import train_world as tw
from train.catalogue import build_catalogue, ensure_catalogue, match_landmarks, open_catalogue
from train.shards import (
    BadRecord,
    Record,
    ShardReader,
    decode_image,
    load_npy,
    scan_shard,
)


def _records(path, *, paired: bool) -> list[Record]:
    """Every good record of one shard."""
    catalogue, reader = build_catalogue([str(path)], paired=paired), ShardReader()
    return [catalogue.read(index, reader) for index in range(len(catalogue))]


@pytest.fixture(scope="module")
def mixed_shard(tmp_path_factory):
    return tw.damaged_shard(tmp_path_factory.mktemp("mixed"))


def test_two_hundred_damaged_records_are_counted_by_reason_and_all_good_ones_come_out(mixed_shard):
    path, kinds, good, evil = mixed_shard
    names = {f"person_{i:03d}" for i in range(5)}
    catalogue = build_catalogue([str(path)], paired=True, known_names=names)
    assert set(catalogue.keys.tolist()) == good
    assert catalogue.bad == {kind: n for kind, n in kinds.items() if kind != "good"}
    assert not evil.exists()


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_malicious_pickle_is_refused_and_creates_nothing(tmp_path, protocol):
    evil = tmp_path / "evil"
    for payload in (
        pickle.dumps(tw.Creates(evil), protocol),
        pickle.dumps({"embeddings": [tw.Creates(evil)]}, protocol),
        pickle.dumps(np.array([tw.Creates(evil)], dtype=object), protocol),
        tw.npy(np.array([tw.Creates(evil)], dtype=object)),
    ):
        with pytest.raises(BadRecord) as caught:
            load_npy(payload)
        assert caught.value.reason == "unsafe_pickle"
    assert not evil.exists()
    pickle.loads(pickle.dumps(tw.Creates(evil), protocol))
    assert evil.exists()  # the payload would have worked


@pytest.mark.parametrize(
    "payload",
    [
        b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I99999999999\ntS'b'\ntR.",
        b"cnumpy\nndarray\n(I99999999999\ntR.",
        b"cbuiltins\neval\n(S'1+1'\ntR.",
        b"cnumpy\nload\n(S'x.npy'\ntR.",
        b"\x80\x04\x95",
        b"",
        b"(" * 100_000,
    ],
)
def test_handwritten_pickles_are_refused(payload):
    with pytest.raises(BadRecord) as caught:
        load_npy(payload)
    assert caught.value.reason in ("unsafe_pickle", "bad_npy")


@pytest.mark.parametrize("protocol", range(2, 6))
def test_arrays_and_plain_containers_come_through_unchanged(protocol):
    value = {
        "bboxes": [[1, 2.5, 3, 4]],
        "embeddings": np.arange(1024, dtype=np.float32).reshape(2, 512),
        "order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "score": np.float64(0.25),
        "name": "somebody",
        "none": None,
    }
    for data in (pickle.dumps(value, protocol), tw.npy(value)):
        loaded = load_npy(data)
        assert loaded.keys() == value.keys()
        np.testing.assert_array_equal(loaded["embeddings"], value["embeddings"])
        np.testing.assert_array_equal(loaded["order"], value["order"])
        assert {k: loaded[k] for k in ("bboxes", "score", "name", "none")} == {
            k: value[k] for k in ("bboxes", "score", "name", "none")
        }
    np.testing.assert_array_equal(load_npy(tw.npy(np.arange(4))), np.arange(4))


def test_a_crops_corner_is_subtracted_from_boxes_and_landmarks(tmp_path):
    parts = tw.record([1], 0, named=False)
    info = json.loads(parts["json"])
    moved = tw.edited(
        parts,
        crop=[100, 40, 164, 104],
        bboxes=(np.array(info["bboxes"]) + [100, 40, 100, 40]).tolist(),
        kps=(np.array(info["kps"]) + [100, 40]).tolist(),
    )
    tw.write_tar(tmp_path / "a.tar", tw.flat({"plain": parts, "cropped": moved}))
    plain, cropped = _records(tmp_path / "a.tar", paired=False)
    np.testing.assert_allclose(cropped.bboxes, plain.bboxes)
    np.testing.assert_allclose(cropped.kps, plain.kps, atol=1e-4)


def test_released_variants_are_read(tmp_path):
    """`embedding` for `embeddings`, a lone `name`, boxes in the .npy only."""
    parts = tw.record([2], 0, named=False)
    info = json.loads(parts["json"])
    arrays = {"bboxes": np.array(info["bboxes"]), "embedding": tw.embedding(2)}
    parts = {**tw.edited(parts, bboxes=None, name="person_002"), "npy": tw.npy(arrays)}
    tw.write_tar(tmp_path / "a.tar", tw.flat({"x": parts}))
    (record,) = _records(tmp_path / "a.tar", paired=True)
    assert record.names == ["person_002"]
    assert record.embeddings.shape == (1, 512) and record.bboxes.shape == (1, 4)


def test_a_cut_off_shard_loses_only_what_lies_behind_the_break(tmp_path):
    records = {f"{i}": tw.record([i], i, named=False) for i in range(4)}
    path = tmp_path / "a.tar"
    tw.write_tar(path, tw.flat(records))
    whole = scan_shard(str(path)).members
    cut = next(m for m in whole if m.name == "2.jpg").offset + 100
    path.write_bytes(path.read_bytes()[:cut])
    catalogue = build_catalogue([str(path)], paired=False)
    assert catalogue.keys.tolist() == ["0", "1"]
    assert catalogue.bad["broken_shard"] >= 1


def test_an_exif_turn_is_not_applied_since_boxes_are_on_the_stored_pixels():
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    Image.new("RGB", (40, 20)).save(stream, "JPEG", exif=exif)
    assert decode_image(stream.getvalue()).shape == (20, 40, 3)


def test_the_catalogue_is_kept_and_rebuilt_when_a_shard_changes(tmp_path):
    root = tw.write_shards(tmp_path / "s", records=4)
    first = ensure_catalogue(str(root), "rec", tmp_path / "cache")
    again = ensure_catalogue(str(root), "rec", tmp_path / "cache")
    assert isinstance(again.offsets, np.memmap) and again.keys.tolist() == first.keys.tolist()
    reader = ShardReader()
    for index in range(len(first)):
        record = again.read(index, reader)
        assert record.key == first.keys[index] and record.image.shape == (64, 64, 3)
    tw.write_tar(root / "train_rec" / "0000.tar", tw.flat({"new": tw.record([0], 5, named=False)}))
    with pytest.raises(ValueError, match="out of date"):
        open_catalogue(tmp_path / "cache" / "catalogue_rec")
    assert "new" in ensure_catalogue(str(root), "rec", tmp_path / "cache").keys.tolist()


class _Pack:
    """Stands for a face pack: finds `boxes` everywhere; an embedding repeats the left eye's x."""

    def __init__(self, boxes, stamp="one"):
        self.boxes, self.stamp, self.detections, self.made = boxes, stamp, 0, {}

    def detect(self, image):
        self.detections += 1
        return self.boxes, np.zeros((len(self.boxes), 5, 2), np.float32)

    def embed(self, image, kps):
        return (kps[:, :1, 0] * np.ones((1, 512))).astype(np.float32)


def test_landmarks_are_detected_once_and_matched_to_boxes_by_overlap(tmp_path):
    root = tw.write_shards(tmp_path / "s", records=4, kps=False)
    pack = _Pack(np.array([[0, 0, 3, 3]], np.float32))
    catalogue = ensure_catalogue(str(root), "rec", tmp_path / "cache", pack=pack)
    ensure_catalogue(str(root), "rec", tmp_path / "cache", pack=pack)
    assert pack.detections == len(catalogue) == 8
    assert np.isnan(catalogue.kps).all()  # nothing overlaps: no landmarks rather than wrong ones


def test_records_without_an_npy_get_their_embeddings_once_from_the_face_pack(tmp_path):
    parts = {str(i): tw.record([i], i, named=False, kps=i > 0) for i in range(3)}
    bare = {k: {s: d for s, d in p.items() if s != "npy"} for k, p in parts.items()}
    path = tmp_path / "s" / "train_rec" / "0.tar"
    tw.write_tar(path, tw.flat(bare))
    assert build_catalogue([str(path)], paired=False).bad == {"missing_embeddings": 3}
    pack = _Pack(np.zeros((0, 4), np.float32))  # finds nothing: only records with landmarks can be embedded
    catalogue = ensure_catalogue(str(tmp_path / "s"), "rec", tmp_path / "cache", pack=pack)
    assert catalogue.keys.tolist() == ["1", "2"] and catalogue.bad == {"missing_embeddings": 1}
    record = ensure_catalogue(str(tmp_path / "s"), "rec", tmp_path / "cache", pack=pack).read(
        1, ShardReader()
    )
    np.testing.assert_allclose(record.embeddings, record.kps[:, :1, 0] * np.ones((1, 512)))
    assert pack.detections == 1
    other = _Pack(np.zeros((0, 4), np.float32), stamp="another")
    ensure_catalogue(str(tmp_path / "s"), "rec", tmp_path / "cache", pack=other)
    assert other.detections == 1  # another network's embeddings are made again


def test_each_detection_is_used_once_and_the_best_overlap_wins():
    boxes = np.array([[0, 0, 10, 10], [2, 0, 12, 10], [50, 50, 60, 60]], np.float32)
    found = np.array([[2, 0, 12, 10], [0, 0, 10, 10]], np.float32)
    kps = np.stack([np.full((5, 2), v, np.float32) for v in (1, 2)])
    matched = match_landmarks(boxes, found, kps)
    assert matched[0, 0, 0] == 2 and matched[1, 0, 0] == 1 and np.isnan(matched[2]).all()
