"""Stylised variants: kept only where every person is there and is who they should be; made once."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from tests import tiny_faces
from tests import train_world as tw
from train.config import make_config
from train.data import TrainDataset, make_plan, open_data
from train.references import unit
from train.shards import ShardReader
from train.stylise import Plan, Stylist, judge, make_face, person_centers, stylise
from withanyone import FaceAnalyzer


def _face(box, embedding):
    return make_face(tiny_faces.blank(64, 64), np.array(box, np.float32), embedding, 16)


def test_a_picture_is_refused_for_the_reason_it_is_bad():
    boxes = np.array([[0, 0, 20, 20], [30, 0, 50, 20]], np.float32)
    centers = unit(np.stack([tw.embedding(0), tw.embedding(1)]))
    good = [_face(boxes[1], tw.embedding(1, 3)), _face(boxes[0], tw.embedding(0, 3))]
    faces, refused = judge(good, boxes, centers, 0.5)
    assert refused == "" and [tuple(f.bbox) for f in faces] == [tuple(b) for b in boxes]
    assert judge(good[:1], boxes, centers, 0.5)[1] == "face_not_found"
    swapped = [_face(boxes[0], tw.embedding(1)), _face(boxes[1], tw.embedding(0))]
    assert judge(swapped, boxes, centers, 0.5)[1] == "another_person"
    more = [*good, _face([52, 40, 62, 60], tw.embedding(2))]
    assert judge(more, boxes, centers, 0.5)[1] == "more_faces_than_people"


class _Painter:
    """Stands for the pipeline: paints a face in each box, the first attempts at the wrong place."""

    def __init__(self, analyzer, misses: int):
        self.face_analyzer, self.misses, self.calls = analyzer, misses, []

    def set_progress_bar_config(self, **kwargs):
        pass

    def __call__(self, prompt, faces, bboxes, width, height, **kwargs):
        assert len(faces) == len(bboxes)
        self.calls.append(prompt)
        picture = tiny_faces.blank(width, height)
        if len(self.calls) > self.misses:
            for number, box in enumerate(bboxes):
                picture = tiny_faces.paint_face(picture, box, number)
        return SimpleNamespace(images=[picture])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stylise")
    root = tw.write_shards(folder / "s")
    config = make_config(tw.settings(root, folder / "out", paired_ratio=1.0))
    analyzer = FaceAnalyzer.from_pretrained(tiny_faces.write_pack(folder / "pack"))
    return config, *open_data(config), analyzer


def test_centers_are_the_mean_direction_of_a_persons_photos(data):
    _, _, bank, _ = data
    rows = unit(np.asarray(bank.embeddings[bank.photos(2)]))
    np.testing.assert_allclose(person_centers(bank, [2])[0], unit(rows.mean(0)), rtol=1e-5)


def test_variants_become_shards_that_phase_four_reads_and_nothing_is_made_twice(data, tmp_path):
    config, catalogues, bank, analyzer = data
    painter = _Painter(analyzer, misses=3)
    plan = Plan(tmp_path / "made", count=10, per_shard=4, styles=("as a drawing", "in rain"),
                min_similarity=-1.0)  # fmt: skip
    counts = stylise(Stylist(config, plan, painter, catalogues["cp"], bank))
    assert sum(counts.values()) == 10 and counts["face_not_found"] == 3 and counts["kept"] == 7
    assert Counter(p.rpartition(", ")[2] for p in painter.calls) == {"as a drawing": 5, "in rain": 5}
    calls = len(painter.calls)
    (tmp_path / "made" / "train_cp" / "00001.tar").unlink()  # as if stopped there
    assert stylise(Stylist(config, plan, painter, catalogues["cp"], bank))["kept"] >= 7
    assert len(painter.calls) == calls + 4

    both = make_config({**vars(config), "extra_shards": [str(tmp_path / "made")],
                        "cache_dir": str(tmp_path / "c")})  # fmt: skip
    found, _ = open_data(both)
    more = len(found["cp"]) - len(catalogues["cp"])
    assert more >= 7 and not found["cp"].bad
    record = found["cp"].read(len(found["cp"]) - 1, ShardReader())
    assert record.info["style"] in plan.styles and record.caption.endswith(record.info["style"])
    assert set(record.names) <= bank.known_names and np.isfinite(record.kps).all()
    assert record.aesthetics_score == 5.0
    dataset = TrainDataset(found, bank, both, crop_size=64)
    make_plan(dataset, both)

    with pytest.raises(ValueError, match="other settings"):
        stylise(Stylist(config, Plan(plan.out, count=12, per_shard=4), painter, catalogues["cp"], bank))


def test_strangers_faces_are_refused(data, tmp_path):
    """A threshold that no painted face reaches: its recogniser knows nothing of the bank's numbers."""
    config, catalogues, bank, analyzer = data
    plan = Plan(tmp_path / "none", count=4, per_shard=4, min_similarity=0.9)
    counts = stylise(Stylist(config, plan, _Painter(analyzer, misses=0), catalogues["cp"], bank))
    assert counts["another_person"] == 4 and not counts["kept"]


def test_a_plan_that_makes_nothing_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match="`count`"):
        Plan(tmp_path, count=0)
    config, catalogues, bank, analyzer = data
    picky = make_config({**vars(config), "min_aesthetic_score": 9.0})
    with pytest.raises(ValueError, match="leave no paired record"):
        Stylist(picky, Plan(tmp_path, count=1), _Painter(analyzer, 0), catalogues["cp"], bank)
