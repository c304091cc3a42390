"""The data stream: an order of seed and epoch alone, no sample twice in an epoch, batches of one size."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice

import fsspec
import numpy as np
import pytest
import torch

from tests import train_world as tw
from train import catalogue, references
from train.catalogue import ensure_catalogue
from train.config import make_config
from train.data import BatchPlan, TrainDataset, make_loader, make_plan, open_data
from train.examples import assign_buckets, collate, crop_window, draw_scales


def _plan(rec=30, cp=12, ratio=0.5, sizes=(4,), seed=0) -> BatchPlan:
    buckets = {"rec": np.arange(rec) % len(sizes), "cp": np.arange(cp) % len(sizes)}
    return BatchPlan(buckets, sizes, ratio, seed)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    root = tw.write_shards(folder / "s", records=12, sizes=((64, 64), (96, 64)))
    config = make_config(
        tw.settings(root, folder / "out", paired_ratio=0.5, buckets=[[64, 64], [96, 64, 2]], text_dropout=0.3)
    )
    catalogues, bank = open_data(config)
    return config, TrainDataset(catalogues, bank, config, crop_size=64)


def test_the_order_depends_on_seed_and_epoch_alone():
    first, again, other = (list(islice(_plan(seed=s).batches(), 40)) for s in (3, 3, 4))
    assert first == again
    assert first != other
    epochs = [[_plan(seed=3, ratio=0).item(e * 30 + i).index for i in range(30)] for e in (0, 1)]
    assert epochs[0] != epochs[1]


def test_every_record_is_seen_once_an_epoch_and_pairs_come_by_their_share():
    plan = _plan(rec=30, cp=12, ratio=0.25)
    items = [plan.item(n) for n in range(40)]
    assert Counter(i.subset for i in items) == {"rec": 30, "cp": 10}
    assert sorted(i.index for i in items if i.subset == "rec") == list(range(30))
    assert len({i.index for i in items if i.subset == "cp"}) == 10


def test_batches_hold_one_size_each_and_no_sample_is_lost_or_doubled():
    plan = _plan(ratio=0, rec=31, sizes=(4, 3))
    batches = list(islice(plan.batches(), 60))
    for batch in batches:
        assert len({item.bucket for item in batch}) == 1
        assert len(batch) == (4, 3)[batch[0].bucket]
    positions = [item.position for batch in batches for item in batch]
    assert len(set(positions)) == len(positions)
    # what is not yet out waits in a bucket that is not full
    assert len(set(range(max(positions) + 1)) - set(positions)) <= 3 + 2


@pytest.mark.parametrize("start", [1, 7, 40])
def test_going_on_from_a_batch_number_gives_the_same_batches(start):
    whole = list(islice(_plan(sizes=(4, 3)).batches(), start + 10))
    assert list(islice(_plan(sizes=(4, 3)).batches(start), 10)) == whole[start:]


def test_a_share_of_pairs_without_paired_records_is_an_error():
    with pytest.raises(ValueError, match="`paired_ratio`"):
        _plan(cp=0)


def _stream(data, count, **kwargs):
    config, dataset = data
    world_size = kwargs.get("world_size", 1)
    loader = make_loader(dataset, make_plan(dataset, config, world_size), **kwargs)
    return list(islice(loader, count))


def test_the_stream_is_the_same_with_any_number_of_processes(data):
    whole = _stream(data, 6)
    halves = [_stream(data, 6, rank=r, world_size=2) for r in (0, 1)]
    for number, batch in enumerate(whole):
        parts = [half[number] for half in halves]
        assert batch.positions == parts[0].positions + parts[1].positions
        torch.testing.assert_close(batch.pixels, torch.cat([p.pixels for p in parts]))
        torch.testing.assert_close(batch.uniform, torch.cat([p.uniform for p in parts]))
        assert batch.noise_seeds == parts[0].noise_seeds + parts[1].noise_seeds
        assert batch.prompts == parts[0].prompts + parts[1].prompts


@pytest.mark.slow
def test_the_stream_is_the_same_with_any_number_of_workers(data):
    for alone, worked in zip(_stream(data, 6), _stream(data, 6, num_workers=2), strict=True):
        assert alone.positions == worked.positions
        torch.testing.assert_close(alone.pixels, worked.pixels)
        torch.testing.assert_close(alone.embeddings, worked.embeddings)


def test_a_batch_must_divide_among_the_processes(data):
    config, dataset = data
    with pytest.raises(ValueError, match="`train_batch_size`"):
        make_plan(dataset, config, 3)


def test_reconstruction_gives_the_targets_own_face_and_pairs_another_photo(data):
    config, dataset = data
    plan = make_plan(dataset, config)
    seen = Counter()
    for item in (plan.item(n) for n in range(12)):
        example = dataset[item]
        record = dataset.catalogues[item.subset].read(item.index, dataset.reader)
        seen[example.paired] += 1
        own = np.isin(example.embeddings, record.embeddings).all()
        assert own == (not example.paired)
        if example.paired:
            for row, identity in zip(example.embeddings, example.identities, strict=True):
                photos = np.asarray(dataset.bank.embeddings[dataset.bank.photos(int(identity))])
                assert (photos == row).all(1).any()
            assert [str(dataset.bank.names[i]) for i in example.identities] == record.names
    assert seen == {True: 6, False: 6}


def test_collate_pads_different_numbers_of_faces(data):
    config, dataset = data
    plan = make_plan(dataset, config)
    items = [plan.item(n) for n in range(24)]
    examples = [dataset[i] for i in items if i.bucket == 0]
    counts = [len(e.bboxes) for e in examples]
    assert set(counts) == {1, 2}
    batch = collate(examples, lambda crops: torch.arange(len(crops)).reshape(-1, 1, 1, 1).expand(-1, 3, 2, 2))
    assert batch.embeddings.shape == (len(examples), 2, 512)
    assert batch.face_mask.sum(1).tolist() == counts
    assert [len(b) for b in batch.bboxes] == counts
    assert len(batch.crop_pixels) == sum(counts)
    one = counts.index(1)
    assert (batch.embeddings[one, 1] == 0).all() and batch.identities[one, 1] == -1
    assert torch.isnan(batch.kps[one, 1]).all()


def test_landmarks_and_boxes_follow_the_picture_into_its_bucket(tmp_path):
    """A picture of twice the bucket's height, and wider: the painted face is still inside its box."""
    parts = tw.record([3], 1, (200, 128), named=False)
    tw.write_tar(tmp_path / "s" / "train_rec" / "0.tar", tw.flat({"a": parts}))
    config = make_config(
        tw.settings(tmp_path / "s", tmp_path / "out", contrastive_loss_weight=0, train_batch_size=1)
    )
    catalogues, bank = open_data(config)
    dataset = TrainDataset(catalogues, bank, config, crop_size=64)
    example = dataset[make_plan(dataset, config).item(0)]
    assert example.pixels.shape == (64, 64, 3)
    x1, y1, x2, y2 = (int(round(v)) for v in example.bboxes[0])
    picture = example.pixels
    magenta = (picture[..., 0] > 120) & (picture[..., 2] > 120)
    assert magenta[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].mean() > 0.95
    magenta[max(0, y1 - 1) : y2 + 1, max(0, x1 - 1) : x2 + 1] = False
    assert magenta.mean() < 0.01
    kps = (example.kps[0] - [x1, y1]) / [x2 - x1, y2 - y1]
    np.testing.assert_allclose(
        kps, np.array([(0.3, 0.4), (0.7, 0.4), (0.5, 0.62), (0.35, 0.8), (0.65, 0.8)]), atol=0.06
    )


def test_buckets_are_nearest_in_aspect_then_in_area():
    buckets = [[128, 128], [192, 192], [256, 256], [192, 128], [128, 192]]
    widths, heights = np.array([130, 250, 400, 150, 100, 60]), np.array([130, 250, 390, 100, 150, 61])
    assert assign_buckets(widths, heights, buckets).tolist() == [0, 2, 2, 3, 4, 0]


def test_the_crop_keeps_the_faces_and_never_leaves_the_picture():
    faces = np.array([[300, 10, 380, 90]], np.float32)
    left, top, right, bottom = crop_window(400, 100, 64, 64, faces)
    assert (top, bottom) == (0, 100) and right - left == 100
    assert left <= 300 and right >= 380 and right <= 400


def test_an_unreadable_record_is_replaced_by_another_of_its_size_and_counted(tmp_path):
    root = tw.write_shards(tmp_path / "s", records=6)
    config = make_config(tw.settings(root, tmp_path / "out"))
    catalogues, bank = open_data(config)
    path = root / "train_rec" / "0000.tar"
    catalogue = catalogues["rec"]
    victim = 1
    offset = int(catalogue.offsets[victim, 0])
    data = bytearray(path.read_bytes())
    data[offset : offset + 400] = bytes(400)
    path.write_bytes(data)
    dataset = TrainDataset(catalogues, bank, config, crop_size=64)
    plan = make_plan(dataset, config)
    item = next(plan.item(n) for n in range(12) if plan.item(n).index == victim)
    example = dataset[item]
    assert example.bad == ["bad_image"] and example.position == item.position


def test_shards_may_lie_on_any_file_system(tmp_path):
    """A stand-in for the Hub: fsspec's file system in memory."""
    root = tw.write_shards(tmp_path / "s", records=6)
    memory = fsspec.filesystem("memory")
    memory.put(str(root), "/hub", recursive=True)
    streams = []
    for shards, cache in ((str(root), "local"), ("memory://hub", "remote")):
        values = tw.settings(root, tmp_path / "out", paired_ratio=0.5)
        config = make_config({**values, "shards": shards, "cache_dir": str(tmp_path / cache)})
        dataset = TrainDataset(*open_data(config), config, crop_size=64)
        streams.append(list(islice(make_loader(dataset, make_plan(dataset, config)), 4)))
    for local, remote in zip(*streams, strict=True):
        torch.testing.assert_close(local.pixels, remote.pixels)
        torch.testing.assert_close(local.embeddings, remote.embeddings)


def test_too_many_damaged_records_stop_the_run(tmp_path):
    root = tw.write_shards(tmp_path / "s", records=4)
    bad = tw.record([0], 9, named=False)
    tw.write_tar(root / "train_rec" / "bad.tar", tw.flat({"x": {**bad, "json": b"{"}}))
    with pytest.raises(ValueError, match="bad_json"):
        open_data(make_config(tw.settings(root, tmp_path / "out")))
    catalogues, _ = open_data(make_config(tw.settings(root, tmp_path / "out", max_bad_share=0.5)))
    assert len(catalogues["rec"]) == 8


def test_the_quality_subset_leaves_low_scores_out(tmp_path):
    root = tw.write_shards(tmp_path / "s", records=4)
    config = make_config(
        tw.settings(root, tmp_path / "out", min_aesthetic_score=6.0, contrastive_loss_weight=0)
    )
    dataset = TrainDataset({"rec": ensure_catalogue(str(root), "rec", tmp_path / "c")}, None, config)
    with pytest.raises(ValueError, match="there are none"):
        make_plan(dataset, config)


@pytest.mark.parametrize(("branches", "expected"), [("arc", {1.0}), ("sig", {0.0})])
def test_a_branch_alone_is_trained_at_its_own_corner(branches, expected):
    rng = np.random.default_rng(0)
    scales = [draw_scales(rng, branches, (1, 1), 0.5) for _ in range(50)]
    assert {a for a, _ in scales} == expected


def test_random_scales_reach_every_position_of_the_sliders():
    rng = np.random.default_rng(0)
    scales = np.array([draw_scales(rng, "both", (0.8, 1.2), 0.5) for _ in range(4000)])
    similarity, diversity = scales.sum(1), scales[:, 0] / scales.sum(1)
    assert similarity.min() >= 0.8 and similarity.max() <= 1.2 and np.ptp(similarity) > 0.39
    assert np.mean(diversity == 0) == pytest.approx(0.25, abs=0.03)
    assert np.mean(diversity == 1) == pytest.approx(0.25, abs=0.03)
    assert np.histogram(diversity, 10, (0, 1))[0].min() > 100


@pytest.mark.parametrize("corner", [0.0, 1.0])
def test_scales_that_lean_to_a_corner_reach_the_other_ever_more_rarely(corner):
    rng = np.random.default_rng(0)
    scales = np.array([draw_scales(rng, "both", (1, 1), 0.5, corner) for _ in range(4000)])
    away = np.abs(scales[:, 0] - corner)  # similarity is 1: the first scale is the diversity
    assert np.mean(away == 0) == pytest.approx(0.5, abs=0.03)
    between = away[away > 0]
    assert between.mean() == pytest.approx(1 / 3, abs=0.02)  # of the density 2 (1 - away)
    assert between.max() > 0.9


def test_by_subset_reconstruction_leans_to_form_and_pairs_to_spirit(data):
    config, dataset = data
    means = {}
    for by_subset in (False, True):
        config = replace(config, diversity_by_subset=by_subset)
        leaning = TrainDataset(dataset.catalogues, dataset.bank, config, crop_size=64)
        diversity = {"rec": [], "cp": []}
        for item in islice((item for batch in make_plan(leaning, config).batches() for item in batch), 120):
            example = leaning[item]
            total = example.id_scale + example.siglip_scale
            diversity[item.subset].append(example.id_scale / total)
        means[by_subset] = {subset: np.mean(values) for subset, values in diversity.items()}
    assert means[True]["rec"] < 0.3 < 0.7 < means[True]["cp"]
    assert all(0.3 < mean < 0.7 for mean in means[False].values())


def test_runs_that_begin_at_once_build_the_cache_once_and_all_open_it(tmp_path, monkeypatch):
    root = tw.write_shards(tmp_path / "s", records=6, sizes=((64, 64),))
    built = []

    def counted(module, name):
        build = getattr(module, name)

        def call(*args, **kwargs):
            built.append(name)
            return build(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    counted(catalogue, "build_catalogue")
    counted(references, "build_bank")
    config = make_config(tw.settings(root, tmp_path / "out", paired_ratio=0.5))
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: open_data(config), range(4)))
    assert Counter(built) == {"build_catalogue": 2, "build_bank": 1}
    assert len({len(catalogues["cp"]) for catalogues, _ in opened}) == 1
    assert len({tuple(bank.names) for _, bank in opened}) == 1
