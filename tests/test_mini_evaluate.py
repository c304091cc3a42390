"""The miniature's figures on made-up faces whose figures are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from withanyone.mini import evaluate, records
from withanyone.mini.__main__ import main as mini_main

ASKED = {
    "hat": "cap",
    "glasses": "none",
    "hair_style": "bob",
    "expression": "sad",
    "scene": "beach",
    "light": "daylight",
}


def face(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=512)


def row(case: int, person: int, **changes) -> dict:
    """A person whose picture is the target, as asked."""
    target, reference = face(1000 + person), face(2000 + person)
    made = {
        "case": f"{case:04d}", "name": str(person), "found": True, "target_found": True, "extra_faces": 0,
        "right_number": True,
        "read": dict(ASKED), "asked": dict(ASKED), "photo": ASKED | {"expression": "angry"},
    }  # fmt: skip
    for who in ("judge", "coach"):
        made |= {f"{who}.generated": target, f"{who}.target": target, f"{who}.reference": reference}
    look = np.random.default_rng(3000 + person).normal(size=16)
    return made | {"look.generated": look, "look.target": look} | changes


def test_faces_drawn_otherwise_lie_farther_off() -> None:
    rows = [row(k, k) for k in range(40)]
    alike = [r | {"look.generated": face(4000 + k)[:16]} for k, r in enumerate(rows)]
    other = [r | {"look.generated": 0.3 * r["look.target"] + 1} for r in rows]
    near, far = (evaluate.summarize(some)["faces_kernel_distance"] for some in (alike, other))
    assert abs(near["mean"]) < 0.3 and far["mean"] > 1
    assert near["low"] < 0 < near["high"] and near["mean"] < far["low"]
    assert near["high"] - near["low"] > 0.05 and near["n"] == 40
    lost = [r | {"found": False, "look.generated": None} for r in rows]
    assert evaluate._faces_distance(lost) is None


def test_the_target_itself_is_the_best_there_is() -> None:
    figures = evaluate.identity_figures([row(k, k) for k in range(30)], "coach")
    assert figures["sim_gt"]["mean"] == pytest.approx(1)
    assert figures["copy_paste"]["mean"] == pytest.approx(-1)
    assert figures["right_of_200"]["mean"] == 1
    assert abs(figures["strangers"]) < 0.02


def test_the_reference_itself_is_a_copy() -> None:
    rows = [row(k, k, **{"coach.generated": face(2000 + k)}) for k in range(30)]
    figures = evaluate.identity_figures(rows, "coach")
    assert figures["copy_paste"]["mean"] == pytest.approx(1)
    assert figures["sim_ref"]["mean"] == pytest.approx(1)
    assert figures["sim_gt"] == figures["ceiling"]


def test_a_missing_face_counts_as_nothing_alike() -> None:
    rows = [row(k, k) for k in range(10)]
    rows[0] |= {"found": False, "coach.generated": None}
    rows[1] |= {"target_found": False, "coach.target": None, "coach.reference": None}
    figures = evaluate.identity_figures(rows, "coach")
    assert figures["sim_gt"]["n"] == 9
    assert figures["sim_gt"]["mean"] == pytest.approx(8 / 9, abs=1e-4)
    assert figures["no_truth"] == 1
    assert (
        evaluate.summarize([r | {"judge.target": r["coach.target"]} for r in rows[2:]])["found"]["mean"] == 1
    )


def test_no_face_found_at_all_is_a_figure_too() -> None:
    rows = [row(k, k, found=False, **{"coach.generated": None}) for k in range(5)]
    figures = evaluate.identity_figures(rows, "coach")
    assert figures["sim_gt"]["mean"] == 0
    assert figures["right_of_200"]["mean"] == 0
    assert "copy_paste" not in figures
    assert figures["swapped"] is None


def test_swapped_people_are_seen() -> None:
    pair = [row(0, 0, **{"coach.generated": face(1001)}), row(0, 1, **{"coach.generated": face(1000)})]
    other = [row(1, 2), row(1, 3), row(2, 4)]
    assert evaluate.identity_figures(pair + other, "coach")["swapped"]["mean"] == pytest.approx(0.5)


def test_what_is_asked_and_what_is_copied() -> None:
    rows = [row(k, k) for k in range(8)]
    rows[0]["read"]["expression"] = "angry"  # the photo's
    rows[1]["read"]["scene"] = "forest"
    assert evaluate.prompt_figures(rows)["accuracy"]["scene"]["mean"] == pytest.approx(7 / 8)
    copied = evaluate.copied_figures(rows)
    assert copied["expression"]["mean"] == pytest.approx(1 / 8)
    assert "glasses" not in copied  # photo and prompt agree there


def test_cases_are_read_as_written(tmp_path: Path) -> None:
    records.write_cases(tmp_path, 3, seed=5, split="validation")
    cases = evaluate.read_cases(tmp_path)
    assert len(cases) == 3
    for case in cases:
        assert len(case.references) == len(case.names) == len(case.bboxes) == len(case.world["target"])
        assert case.target.ndim == 3
        assert set(evaluate.COPIED) <= set(case.world["references"][0])
    with pytest.raises(ValueError, match="mini cases"):
        evaluate.read_cases(tmp_path / "nothing")


def test_people_without_boxes_are_counted_from_the_left() -> None:
    found = np.array([[50, 0, 70, 20], [10, 0, 30, 20]], float)
    order, boxes = evaluate.left_to_right(found, 3)
    assert order.tolist() == [1, 0, -1]
    assert [box[0] for box in boxes] == [10, 50]
    assert evaluate.left_to_right(np.empty((0, 4)), 2)[0].tolist() == [-1, -1]
    assert evaluate.left_to_right(found, 1)[0].tolist() == [1]


def test_the_asked_number_of_faces_is_counted_by_picture() -> None:
    rows = [row(0, 0), row(1, 1, right_number=False), row(1, 2, right_number=False), row(2, 3), row(2, 4)]
    shares = {name: value["mean"] for name, value in evaluate._by_people(rows).items()}
    assert shares == {"all": pytest.approx(2 / 3, abs=1e-4), "1": 1.0, "2": 0.5}


def test_settings_of_the_same_pictures_share_them() -> None:
    name = evaluate.settings_name
    model = str(evaluate.PRETRAINED)
    defaults = evaluate.WithAnyonePipeline.load_config(model)["sampling_defaults"]
    same = {key: defaults[key] for key in ("id_scale", "siglip_scale")}
    assert name(model, {}) == name(model, same)
    assert name(model, {"id_scale": 0.0, "siglip_scale": 0.0}) == name(model, None)
    others = [{}, {"id_scale": 0.3}, {"siglip_scale": 0.3}, {"true_cfg_scale": 1.5}, None]
    assert len({name(model, settings) for settings in others}) == len(others)


def test_nothing_is_chosen_on_test_people(tmp_path: Path) -> None:
    args = ["defaults", "--split", "test", "--count", "1", "--work", str(tmp_path)]
    with pytest.raises(ValueError, match="validation"):
        mini_main(args)
    assert not list(tmp_path.iterdir())
