"""The reference bank: other people only, uniformly, at once; references by the rule that was set."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests import train_world as tw
from train.__main__ import main
from train.catalogue import lock_of
from train.references import (
    ReferenceBank,
    build_bank,
    cache_features,
    choose_reference,
    draw_negatives,
    ensure_bank,
    open_bank,
    same_person_quantile,
    unit,
)
from train.shards import ShardReader


def _bank(counts, seed=0) -> ReferenceBank:
    """A bank in memory: person i has counts[i] photos."""
    start = np.concatenate([[0], np.cumsum(counts)])
    rng = np.random.default_rng(seed)
    people = rng.standard_normal((len(counts), 512))
    rows = np.repeat(people, counts, axis=0) + 0.5 * rng.standard_normal((start[-1], 512))
    return ReferenceBank(
        shards=[],
        embeddings=rows.astype(np.float32),
        bbox=np.zeros((start[-1], 4), np.float32),
        names=np.array([f"p{i:04d}" for i in range(len(counts))]),
        start=start,
        location=np.zeros((start[-1], 3), np.int64),
    )


def _identity_of(bank, rows):
    return np.searchsorted(bank.start, rows, side="right") - 1


def test_negatives_are_never_people_of_the_batch_and_everybody_else_comes_equally_often():
    bank = _bank([3, 1, 4, 1, 5, 9, 2, 6])
    rows = draw_negatives(bank, [0, 4, 4, -1, 7], 60_000, np.random.default_rng(0))
    assert not np.isin(_identity_of(bank, rows), [0, 4, 7]).any()
    counts = np.bincount(rows, minlength=len(bank))
    allowed = ~np.isin(_identity_of(bank, np.arange(len(bank))), [0, 4, 7])
    expected = 60_000 / allowed.sum()
    assert np.abs(counts[allowed] - expected).max() < 6 * np.sqrt(expected)


@pytest.mark.parametrize("left_out", [[], [-1], [0], [7], [0, 1], [6, 7], [1, 3, 5]])
def test_negatives_cover_exactly_the_others(left_out):
    bank = _bank([2] * 8)
    rows = draw_negatives(bank, left_out, 4000, np.random.default_rng(1))
    assert set(_identity_of(bank, rows)) == set(range(8)) - set(left_out)


def test_negatives_of_a_batch_with_everybody_is_an_error():
    with pytest.raises(ValueError, match="`identities`"):
        draw_negatives(_bank([2, 2]), [0, 1], 4, np.random.default_rng(0))


def test_a_batch_is_one_draw_whatever_its_faces_and_the_bank_hold():
    """What makes it fast (benchmarks/negatives.py): no loop over faces, people or negatives."""

    class Counted:
        def __init__(self):
            self.calls = []

        def integers(self, low, high, size):
            self.calls.append((low, high, size))
            return np.random.default_rng(0).integers(low, high, size)

    for people, faces in ((20, 2), (2000, 32)):
        bank, rng = _bank([10] * people), Counted()
        rows = draw_negatives(bank, np.arange(faces), 4096, rng)
        assert rng.calls == [(0, 10 * (people - faces), 4096)] and rows.shape == (4096,)


def test_random_references_are_the_persons_own_and_all_of_them_come():
    bank = _bank([3, 4, 5])
    rng = np.random.default_rng(0)
    rows = {choose_reference(bank, 1, rng) for _ in range(200)}
    assert rows == set(bank.photos(1))


def test_the_released_rule_takes_the_most_similar_of_those_drawn_and_drops_the_unlike():
    bank = _bank([50, 50])
    own = np.asarray(bank.embeddings[bank.photos(0)])
    target = own[:1] + 0.01
    cosines = unit(own) @ unit(target)[0]
    best = choose_reference(
        bank, 0, np.random.default_rng(0), rule="released", target_embeddings=target, draws=50, stop_above=2.0
    )
    assert best == cosines.argmax()
    first = choose_reference(
        bank, 0, np.random.default_rng(0), rule="released", target_embeddings=target, draws=50, stop_above=0.5
    )
    order = np.random.default_rng(0).permutation(50)
    assert first == order[np.flatnonzero(cosines[order] > 0.5)[0]]
    stranger = np.asarray(bank.embeddings[bank.photos(1)])[:1]
    assert (
        choose_reference(bank, 0, np.random.default_rng(0), rule="released", target_embeddings=stranger)
        is None
    )


def test_the_quantile_of_same_person_cosines_is_the_datas_own():
    bank = _bank([10] * 50)
    all_pairs = []
    for i in range(50):
        rows = unit(bank.embeddings[bank.photos(i)])
        all_pairs.append((rows @ rows.T)[np.triu_indices(10, 1)])
    assert same_person_quantile(bank, 0.5) == pytest.approx(np.median(all_pairs), abs=0.01)


def test_a_bank_is_built_of_the_ref_tars_and_opened_memory_mapped(tmp_path):
    root = tw.write_shards(tmp_path / "s", people=5, photos=3, records=2)
    bank = ensure_bank(str(root), tmp_path / "bank")
    assert bank.names.tolist() == [f"person_{i:03d}" for i in range(5)]
    assert isinstance(bank.embeddings, np.memmap) and len(bank) == 15
    for i in range(5):
        assert bank.identity(f"person_{i:03d}") == i
        rows = np.asarray(bank.embeddings[bank.photos(i)])
        np.testing.assert_array_equal(rows, np.stack([tw.embedding(i, 1000 + k) for k in range(3)]))
    assert bank.identity("nobody") == -1
    reader = ShardReader()
    assert bank.read_photo(7, reader).size == (48, 48)
    tw.write_tar(root / "ref" / "tars" / "0000.tar", {"person_000/0.jpg": b"no picture"})
    with pytest.raises(ValueError, match="changed"):
        open_bank(tmp_path / "bank")


def test_photos_without_an_embedding_ask_the_face_pack_and_bad_ones_are_counted(tmp_path):
    members = tw.record([0], 0, named=False)
    tw.write_tar(
        tmp_path / "a.tar",
        {
            "p/0.jpg": members["jpg"],
            "p/1.jpg": members["jpg"][:300],
            "p/2.jpg": members["jpg"],
            "p/2.npy": tw.npy(np.full(512, np.nan)),
        },
    )
    found = []

    class Pack:
        stamp = "x"

        def largest(self, image):
            found.append(image.shape)
            return np.array([1, 2, 30, 40]), tw.embedding(9)

    bank, bad = build_bank([str(tmp_path / "a.tar")], tmp_path / "bank", pack=Pack())
    assert len(bank) == 1 and found == [(64, 64, 3)]
    np.testing.assert_array_equal(bank.embeddings[0], tw.embedding(9))
    assert bad == {"bad_image": 1, "nan_embedding": 1}


def test_kept_features_are_those_of_the_face_crops(tmp_path):
    root = tw.write_shards(tmp_path / "s", people=3, photos=2, records=2)
    bank = ensure_bank(str(root), tmp_path / "bank")
    bank = cache_features(
        bank,
        tmp_path / "bank",
        lambda crops: np.stack([np.asarray(c, np.float32).mean((0, 1))[None] for c in crops]),
        lambda photo, box: photo.crop(tuple(int(v) for v in box)),
        batch_size=4,
    )
    assert bank.features.shape == (6, 1, 3) and bank.features.dtype == np.float16
    photo = bank.read_photo(5, ShardReader()).crop((8, 8, 40, 40))
    np.testing.assert_allclose(bank.features[5, 0], np.asarray(photo, np.float32).mean((0, 1)), rtol=2e-3)


def test_the_command_writes_the_bank_a_run_opens_after_whoever_builds_it_now(tmp_path, capsys):
    root = tw.write_shards(tmp_path / "s", people=3, photos=2, records=2)
    folder = root / ".train_cache" / "bank"
    with ThreadPoolExecutor(1) as pool:
        with lock_of(folder):  # another run is building it
            asked = pool.submit(main, ["references", "--shards", str(root)])
            time.sleep(0.3)
            assert not asked.done() and not folder.exists()
        asked.result(60)
    assert "6 photos of 3 people" in capsys.readouterr().out
    assert len(open_bank(folder)) == 6
