"""Shards and cases of the drawn world: the released layouts, readable, reproducible, splits kept apart."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.shards import Record, load_npy, parse_record
from withanyone.mini import __main__ as command_line
from withanyone.mini import records, world

SMALL = {
    "rec_scenes": 3,
    "cp_scenes": 8,
    "identities": 6,
    "references": 2,
    "scenes_per_shard": 3,
    "people_per_shard": 4,
    "crop_share": 0.5,
}


def embed(faces: list[np.ndarray]) -> np.ndarray:
    """Stand-in for a recogniser: 512 numbers that depend on the aligned face."""
    assert all(face.shape == (112, 112, 3) and face.dtype == np.uint8 for face in faces)
    small = [np.asarray(Image.fromarray(face).resize((16, 32))).mean(-1).ravel() for face in faces]
    return np.stack(small).astype(np.float32)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    records.write_shards(folder, seed=3, embed=embed, **SMALL)
    return folder


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}


def read_records(folder: Path, subset: str) -> list[Record]:
    """All records of a subset as training reads them."""
    found = []
    for path in sorted((folder / subset).glob("*.tar")):
        tar = members(path)
        for key in sorted({Path(name).stem for name in tar}):
            parts = {"image": tar[f"{key}.jpg"], "json": tar[f"{key}.json"], "npy": tar[f"{key}.npy"]}
            found.append(parse_record(key, parts, paired=subset == "train_cp"))
    return found


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.tar"))}


def jsons(folder: Path, subset: str) -> list[dict]:
    paths = sorted((folder / subset).glob("*.tar"))
    return [
        json.loads(data) for path in paths for name, data in members(path).items() if name.endswith(".json")
    ]


def test_the_layout_is_multiid_2m(shards: Path) -> None:
    assert len(list((shards / "train_rec").glob("*.tar"))) == 1
    assert len(list((shards / "train_cp").glob("*.tar"))) == 3
    assert len(list((shards / "ref" / "tars").glob("*.tar"))) == 2
    for subset, count in (("train_rec", SMALL["rec_scenes"]), ("train_cp", SMALL["cp_scenes"])):
        infos = jsons(shards, subset)
        assert len(infos) == count
        for info in infos:
            assert {"url", "ram_score", "bboxes", "aesthetics_score", "caption_en"} <= set(info)
            assert ("names" in info) == (subset == "train_cp")
            assert world.unknown_words(info["caption_en"]) == []


@pytest.mark.parametrize("subset", ["train_rec", "train_cp"])
def test_the_trainer_reads_every_record(shards: Path, subset: str) -> None:
    for record in read_records(shards, subset):
        height, width = record.image.shape[:2]
        assert (width, height) in records.BUCKETS[len(record.bboxes)]
        assert (record.bboxes[:, :2] >= -1e-3).all() and (record.bboxes[:, 2:] <= (width, height)).all()
        assert record.kps is not None and record.embeddings.shape == (len(record.bboxes), 512)


def test_boxes_of_cropped_records_are_in_the_uncropped_picture(shards: Path) -> None:
    cropped = [info for info in jsons(shards, "train_cp") if "crop" in info]
    assert cropped
    for info in cropped:
        x0, y0, x1, y1 = info["crop"]
        boxes = np.array(info["bboxes"])
        assert (boxes[:, :2] >= (x0, y0)).all() and (boxes[:, 2:] <= (x1, y1)).all()


def test_a_cut_shows_the_faces_where_its_record_says(shards: Path) -> None:
    """The embeddings of a record are those of the faces that its landmarks point at."""
    for record in read_records(shards, "train_cp"):
        again = embed([records.align(record.image, kps) for kps in record.kps])
        assert np.abs(again - record.embeddings).mean() < 3  # JPEG lies between


def test_named_people_have_references_and_centres(shards: Path) -> None:
    tars = [members(path) for path in sorted((shards / "ref" / "tars").glob("*.tar"))]
    photos = {name: data for tar in tars for name, data in tar.items()}
    centers = members(shards / "ref" / "cluster_centers.tar")
    everybody = {str(seed) for seed in world.RANGES["train"][: SMALL["identities"]]}
    assert {name.split("/")[0] for name in photos} == everybody
    assert {name.removesuffix(".npy") for name in centers} == everybody
    for person in everybody:
        own = [name for name in photos if name.startswith(f"{person}/") and name.endswith(".jpg")]
        assert len(own) == SMALL["references"]
        assert Image.open(io.BytesIO(photos[own[0]])).size == records.REFERENCE_SIZE
        assert np.load(io.BytesIO(centers[f"{person}.npy"]), allow_pickle=False).shape == (512,)
        kept = load_npy(photos[own[0].replace(".jpg", ".npy")])
        assert kept["embeddings"].shape == (1, 512) and kept["bboxes"].shape == (1, 4)
    named = {name for info in jsons(shards, "train_cp") for name in info["names"]}
    assert named <= everybody


def test_the_same_seed_gives_the_same_bytes_in_any_number_of_parts(shards: Path, tmp_path: Path) -> None:
    for part in ((1, 2), (0, 2)):
        records.write_shards(tmp_path, seed=3, embed=embed, part=part, **SMALL)
    assert all_bytes(tmp_path) == all_bytes(shards)
    assert not (tmp_path / "ref" / "centers").exists()


def test_a_stopped_run_goes_on(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path, dirs_exist_ok=True)
    (tmp_path / "train_cp" / "00001.tar").unlink()
    before = (tmp_path / "train_cp" / "00000.tar").stat().st_mtime_ns
    records.write_shards(tmp_path, seed=3, embed=embed, **SMALL)
    assert (tmp_path / "train_cp" / "00000.tar").stat().st_mtime_ns == before
    assert all_bytes(tmp_path) == all_bytes(shards)
    with pytest.raises(ValueError, match=r"`out` .* plan.json"):
        records.write_shards(tmp_path, seed=4, embed=embed, **SMALL)


def test_without_a_recogniser_there_are_no_embeddings(tmp_path: Path) -> None:
    records.write_shards(tmp_path, rec_scenes=2, cp_scenes=0, identities=1, references=1)
    names = [name for path in tmp_path.rglob("*.tar") for name in members(path)]
    assert {Path(name).suffix for name in names} == {".jpg", ".json"}
    assert not (tmp_path / "ref" / "cluster_centers.tar").exists()


def test_train_shards_hold_training_people_only(shards: Path) -> None:
    for subset in ("train_rec", "train_cp"):
        for info in jsons(shards, subset):
            assert {world.split_of(identity) for identity in info["world"]["identities"]} == {"train"}
            assert len(info["world"]["people"]) == len(info["bboxes"]) == len(info["kps"])


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return records.write_cases(tmp_path_factory.mktemp("cases"), 8, seed=1)


def test_cases_are_complete_and_of_held_out_people(cases: list[Path]) -> None:
    seen: list[str] = []
    for folder in cases:
        meta = json.loads((folder / "meta.json").read_text())
        target = Image.open(folder / "ori.jpg")
        boxes = np.array(meta["bboxes"])
        count = len(boxes)
        assert 1 <= count <= 4 and target.size == records.CASE_SIZES[count]
        assert len(list(folder.glob("ref_*.jpg"))) == len(meta["names"]) == meta["num_persons"] == count
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= target.size).all()
        assert world.unknown_words(meta["prompt"]) == []
        assert len(meta["world"]["target"]) == len(meta["world"]["references"]) == count
        assert set(meta["world"]["target"][0]) == set(world.PERSON_ATTRIBUTES)
        assert {world.split_of(int(name)) for name in meta["names"]} == {"test"}
        seen += meta["names"]
    assert len(set(seen)) == len(seen)
    assert {records.case_people(index) for index in range(8)} == {1, 2, 3, 4}


def test_references_differ_from_targets_in_what_may_change(cases: list[Path]) -> None:
    same = []
    for folder in cases:
        known = json.loads((folder / "meta.json").read_text())["world"]
        for target, reference in zip(known["target"], known["references"], strict=True):
            assert target != reference
            same.append(np.mean([target[name] == reference[name] for name in ("hair_style", "hair_color")]))
    assert np.mean(same) < 0.4


def test_a_longer_list_of_cases_begins_with_the_shorter(cases: list[Path], tmp_path: Path) -> None:
    for mine, theirs in zip(records.write_cases(tmp_path, 2, seed=1), cases, strict=False):
        assert {path.name: path.read_bytes() for path in mine.iterdir()} == {
            path.name: path.read_bytes() for path in theirs.iterdir()
        }


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"split": "nobody"}, "`split`"),
        ({"people_shares": {9: 1.0}}, "`people_shares`"),
        ({"identities": 2}, "`identities`"),
        ({"references": -1}, "`references`"),
        ({"part": (2, 2)}, "`part`"),
        ({"workers": 2, "embed": lambda faces: faces}, "`embed`"),
    ],
)
def test_bad_settings_are_named(settings: dict, named: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=named):
        records.write_shards(tmp_path, **settings)


@pytest.mark.parametrize(("count", "split", "named"), [(1, "train", "`split`"), (0, "test", "`count`")])
def test_bad_cases_are_named(count: int, split: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=named):
        records.write_cases(tmp_path, count, 0, split=split)


def test_the_commands_write_what_they_say(tmp_path: Path) -> None:
    command_line.main(["cases", "--out", str(tmp_path / "cases"), "--count", "1", "--seed", "2"])
    assert (tmp_path / "cases" / "0000" / "meta.json").exists()
    command_line.main(
        ["sheet", "--out", str(tmp_path / "sheet.png"), "--rows", "1", "--columns", "2", "--size", "64"]
    )
    assert Image.open(tmp_path / "sheet.png").size == (128, 64)
    command_line.main(
        ["shards", "--out", str(tmp_path / "shards"), "--rec-scenes", "1", "--cp-scenes", "0"]
        + ["--identities", "1", "--references", "1"]
    )
    assert (tmp_path / "shards" / "train_rec" / "00000.tar").exists()
