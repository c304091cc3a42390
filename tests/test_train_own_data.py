"""Own photos as shards: who is who by the photos, every photo accounted for, and training reads it all."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from tests import tiny_faces
from tests import train_world as tw
from train.config import make_config
from train.data import TrainDataset, make_loader, make_plan, open_data
from train.own_data import Report, caption_of, name_faces, natural_threshold, write_own_data
from train.shards import ShardReader
from train.stylise import make_face
from withanyone import FaceAnalyzer


def _references(people: int, photos: int) -> dict[str, np.ndarray]:
    return {f"p{i}": np.stack([tw.embedding(i, k) for k in range(photos)]) for i in range(people)}


def _face(embedding):
    return make_face(tiny_faces.blank(32, 32), np.array([4, 4, 20, 20]), embedding, 16)


def test_the_threshold_lies_between_strangers_and_people_themselves():
    threshold = natural_threshold(_references(5, 4))
    same, other = 1 / (1 + 0.25), 0.0  # of tw.embedding: a person plus half as much noise
    assert other + 0.1 < threshold < same - 0.1
    with pytest.raises(ValueError, match="`min_similarity`"):
        natural_threshold(_references(3, 1))


def test_each_person_is_given_to_one_face_at_most():
    references = _references(4, 3)
    faces = [_face(tw.embedding(i, 9)) for i in (2, 0)]
    assert name_faces(faces, references, 0.3) == ["p2", "p0"]
    assert name_faces([*faces, _face(tw.embedding(77))], references, 0.3) == ["p2", "p0", None]
    twins = [_face(tw.embedding(1, 5)), _face(tw.embedding(1, 6))]
    assert sorted(map(str, name_faces(twins, references, 0.3))) == ["None", "p1"]


def test_a_caption_lies_beside_the_photo(tmp_path):
    report = Report()
    (tmp_path / "a.txt").write_text(" two friends \n")
    assert caption_of(tmp_path / "a.jpg", 2, report) == "two friends"
    assert caption_of(tmp_path / "b.jpg", 2, report) == "two people"
    assert sum(report.notes.values()) == 1


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Painted people: ada and bela with two photos each, groups with and without strangers."""
    folder = tmp_path_factory.mktemp("photos")
    for name, identity in (("ada", 1), ("bela", 2)):
        (folder / "people" / name).mkdir(parents=True)
        for k in range(2):
            box = (10 + 4 * k, 8, 52 + 4 * k, 54)
            tiny_faces.paint_face(tiny_faces.blank(64, 64), box, identity).save(
                folder / "people" / name / f"{k}.png"
            )
    tiny_faces.blank(64, 64).save(folder / "people" / "ada" / "empty.png")
    (folder / "people" / "bela" / "broken.jpg").write_bytes(b"no picture")
    (folder / "groups").mkdir()
    for name, who in (("both", (1, 2)), ("swapped", (2, 1)), ("stranger", (1, 3))):
        image = tiny_faces.blank(128, 64)
        for place, identity in enumerate(who):
            image = tiny_faces.paint_face(image, (10 + 64 * place, 8, 52 + 64 * place, 54), identity)
        image.save(folder / "groups" / f"{name}.png")
    (folder / "groups" / "both.txt").write_text("a")
    tiny_faces.blank(64, 64).save(folder / "groups" / "nobody.png")
    return folder


@pytest.fixture(scope="module")
def analyzer(tmp_path_factory):
    folder = tiny_faces.write_pack(tmp_path_factory.mktemp("pack"))
    return FaceAnalyzer.from_pretrained(folder, crop_size=64)


def test_photos_become_shards_that_training_reads(photos, analyzer, tmp_path):
    out = tmp_path / "shards"
    report = write_own_data(photos / "people", photos / "groups", out, analyzer)
    assert (report.people, report.references) == (2, 4)
    assert (report.paired, report.reconstruction) == (2, 1), str(report)
    assert report.left_out == {
        "a reference photo without a face": 1,
        "a photo that cannot be read": 1,
        "a group photo with no face or more than 8": 1,
    }
    config = make_config(
        tw.settings(out, tmp_path / "run", paired_ratio=0.5, buckets=[[128, 64]], contrastive_loss_weight=0.0)
    )
    catalogues, bank = open_data(config)  # without a face pack: nothing is missing in the records
    assert bank.names.tolist() == ["ada", "bela"] and not catalogues["cp"].bad and not catalogues["rec"].bad
    records = {r.key.split("_")[1]: r for r in (catalogues["cp"].read(i, ShardReader()) for i in range(2))}
    order = {key: [name for _, name in sorted(zip(r.bboxes[:, 0], r.names, strict=True))]
             for key, r in records.items()}  # fmt: skip
    assert order == {"both": ["ada", "bela"], "swapped": ["bela", "ada"]}
    assert records["both"].caption == "a" and records["swapped"].caption == "two people"
    assert np.isfinite(records["both"].kps).all()
    dataset = TrainDataset(catalogues, bank, config, crop_size=64)
    batches = list(islice(make_loader(dataset, make_plan(dataset, config)), 3))
    assert {bool(p) for b in batches for p in b.paired} == {True, False}


def test_the_command_says_what_became_of_the_photos(photos, analyzer, tmp_path, capsys):
    from train.__main__ import main

    analyzer.save_pretrained(tmp_path / "pipeline" / "face_analyzer")
    arguments = ["own-data", "--people", str(photos / "people"), "--groups", str(photos / "groups"),
                 "--pretrained", str(tmp_path / "pipeline"), "--out", str(tmp_path / "s")]  # fmt: skip
    main(arguments)
    said = capsys.readouterr().out
    assert "4 reference photos of 2 people" in said and "2 group photos of known people" in said
    with pytest.raises(SystemExit):
        main(arguments)
    assert "holds shards already" in capsys.readouterr().err
    main(["check", "--shards", str(tmp_path / "s")])
    assert "train_cp: 1 shards, 2 good records" in capsys.readouterr().out


def test_folders_that_are_not_there_are_named(photos, analyzer, tmp_path):
    with pytest.raises(ValueError, match="`groups`"):
        write_own_data(photos / "people", tmp_path / "none", tmp_path / "s", analyzer)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="`people`"):
        write_own_data(tmp_path / "empty", photos / "groups", tmp_path / "s", analyzer)
