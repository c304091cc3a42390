"""Figures from rows whose figures are known; results.json, the gate, tables and sweeps."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from withanyone.bench import figures, gate, published, results, sweep, tables
from withanyone.bench.scoring import DEFAULTS

BOOTSTRAP = {"level": 0.95, "resamples": 200, "seed": 0}
KNOWN = {"expression": "sad", "glasses": "none", "hat": "cap"}


def person(sim_gt: float = 0.5, **changes) -> dict:
    """One person's entry: found, in place, as the prompt says."""
    scores = {"sim_gt": sim_gt, "sim_ref": 0.6, "copy_paste": 0.2, "ceiling": 0.5, "sim_gt_in_box": sim_gt}
    entry = {
        "found": True, "truth": True, "in_box": True, "swapped": None,
        "scores": {"a": dict(scores), "b": {name: value / 2 for name, value in scores.items()}},
        "pose": [0.0, 0.0], "pose_target": [0.0, 0.0], "pose_reference": [0.4, 0.0],
        "read": dict(KNOWN), "asked": {"expression": "sad"}, "target": dict(KNOWN),
        "reference": KNOWN | {"expression": "angry"},
    }  # fmt: skip
    return entry | changes


def missing(**changes) -> dict:
    """A person who is not found, in a picture that was read all the same."""
    scores = {name: {"ceiling": 0.5} for name in ("a", "b")}
    return person(found=False, in_box=False, scores=scores, pose=None, **changes)


def row(case: int, *pictures: list[dict], **changes) -> dict:
    """A case of one picture a list of people."""
    entries = [
        {
            "file": f"{case}.png", "seed": None, "faces_found": len(people), "extra_faces": 0,
            "values": {"clip_t": 0.3}, "blending": {"a": 0.1, "b": 0.3} if len(people) > 1 else {},
            "people": people,
        }
        for people in pictures
    ]  # fmt: skip
    name = f"{case:04d}"
    return {
        "case": name, "fingerprint": name, "subset": "p", "num_persons": len(pictures[0]), "names": None,
        "pictures": entries, "problems": [],
    } | changes  # fmt: skip


def values(rows: list[dict], metric: str, judges: tuple[str, ...] = ("a",)) -> list[float]:
    return list(figures.metric_values(rows, metric, judges, DEFAULTS).values())


def made(rows: list[dict], method: str = "m", bench: str = "a bench", by: tuple[str, ...] = ("a",)) -> dict:
    """A results.json of these rows."""
    return {
        "schema": results.SCHEMA, "method": method, "identity_by": list(by),
        "bench": {
            "name": bench, "layout": "folder", "world": "photos", "cases": len(rows), "of": len(rows),
            "people": sum(r["num_persons"] for r in rows), "fingerprint": "f",
        },
        "judges": {"finder": {"kind": "d"}, **{name: {"kind": "onnx"} for name in by}},
        "settings": {"eps": 1e-6, "box_iou": 0.3, "min_yaw_change": 0.15, "bootstrap": BOOTSTRAP},
        "environment": {}, "problems": {}, "broken_cases": {}, "generation": None,
        "metrics": figures.figures(rows, list(by), DEFAULTS, BOOTSTRAP),
        "attributes": {"all": figures.attribute_figures(rows, list(by), DEFAULTS, BOOTSTRAP)},
        "rows": rows,
    }  # fmt: skip


# ---- figures


def test_how_each_mean_counts_who_is_missing() -> None:
    no_truth = person(truth=False, scores={"a": {"sim_ref": 0.6}, "b": {"sim_ref": 0.6}})
    rows = [row(0, [person()]), row(1, [missing()]), row(2, [person(), missing()]), row(3, [no_truth])]
    assert values(rows, "sim_gt") == [0.5, 0.0, 0.5, 0.0]
    assert values(rows, "sim_gt_found") == [0.5, 0.5]
    assert values(rows, "sim_ref") == [0.6, 0.0, 0.6, 0.0, 0.6]
    assert values(rows, "copy_paste") == [0.2, 0.2]
    assert values(rows, "ceiling") == [0.5] * 4
    assert values(rows, "found") == [1, 0, 1, 0, 1]
    assert values(rows, "sim_gt_in_box") == [0.5, 0, 0.5, 0]
    assert values(rows, "pose_copied") == [-1, -1, -1]
    assert values(rows, "blending") == [0.1]


def test_judges_are_averaged() -> None:
    rows = [row(0, [person(), person(0.9)])]
    assert values(rows, "sim_gt", ("a", "b")) == pytest.approx([0.375, 0.675])
    assert values(rows, "blending", ("a", "b")) == pytest.approx([0.2])
    found = figures.figures(rows, ["a", "b"], DEFAULTS, BOOTSTRAP)
    assert found["multi"]["sim_gt"]["mean"] == pytest.approx(0.525)
    assert found["multi"]["sim_gt"]["n"] == 2
    assert found["multi"]["sim_gt"]["cases"] == 1
    assert found["single"] == {}


def test_a_picture_that_is_missing_shows_nothing_that_was_asked() -> None:
    rows = [
        row(0, [person(read=None)]),
        row(1, [person(read=KNOWN | {"expression": "angry"})]),
        row(2, [person()]),
    ]
    assert values(rows, "prompt_following") == [0, 0, 1]


def test_what_was_copied_is_told_by_attribute() -> None:
    angry = KNOWN | {"expression": "angry"}
    rows = [row(k, [person(read=angry)]) for k in range(2)] + [row(k, [person()]) for k in range(2, 8)]
    found = figures.attribute_figures(rows, ["a"], DEFAULTS, BOOTSTRAP)
    assert found["expression"]["copied"]["mean"] == pytest.approx(2 / 8)
    assert found["expression"]["as_target"]["mean"] == pytest.approx(6 / 8)
    assert found["expression"]["followed"]["mean"] == pytest.approx(6 / 8)
    # every photo is angry, and 2 of 8 pictures are: shown to another person's photo it would match as often
    assert found["expression"]["by_chance"] == pytest.approx(2 / 8)
    assert "copied" not in found["hat"]  # photo and target agree everywhere
    assert figures.copied_attributes(rows[0]["pictures"][0]["people"][0]) == ["expression"]
    assert figures.copied_attributes(rows[7]["pictures"][0]["people"][0]) == []
    assert figures.attribute_figures([row(0, [person(read=None)])], ["a"], DEFAULTS, BOOTSTRAP) is None


def test_copying_explains_copy_paste_where_it_does() -> None:
    """Faces that took the photo's expression are the ones that copy."""
    angry = KNOWN | {"expression": "angry"}
    copied = person(read=angry)
    copied["scores"]["a"]["copy_paste"] = 0.8
    rows = [row(0, [copied]), row(1, [person()]), row(2, [person()])]
    found = figures.attribute_figures(rows, ["a"], DEFAULTS, BOOTSTRAP)["expression"]
    assert found["copy_paste_of_copied"]["mean"] == pytest.approx(0.8)
    assert found["copy_paste_of_others"]["mean"] == pytest.approx(0.2)


def test_diversity_is_between_seeds_of_one_person() -> None:
    angry = KNOWN | {"expression": "angry"}
    same = [[person(pose=[0.1, 0.0])], [person(pose=[0.1, 0.0])]]
    varied = [[person(pose=[0.1, 0.0])], [person(pose=[0.5, 0.0], read=angry)]]
    eye = np.eye(4, dtype=np.float32)
    for pictures, vectors, yaw, expression, identity in (
        (same, eye[[0, 0]], 0.0, 0.0, 1.0),
        (varied, eye[[0, 1]], 0.4, 1.0, 0.0),
    ):
        part = {"generated": vectors[:, None], "target": eye[:1]}
        found = figures.diversity_figures([row(0, *pictures)], [part], BOOTSTRAP)
        assert found["between_seeds"]["yaw"]["mean"] == pytest.approx(yaw)
        assert found["between_seeds"]["expression"]["mean"] == expression
        assert found["between_seeds"]["identity"]["mean"] == pytest.approx(identity)
        assert found["real"]["yaw"]["mean"] == pytest.approx(0.4)
        assert found["real"]["expression"]["mean"] == 1
    assert figures.diversity_figures([row(0, same[0])], [part], BOOTSTRAP) is None


def test_everybodys_faces_are_the_crowd() -> None:
    eye = np.eye(4, dtype=np.float32)
    nobody = np.full((1, 1, 4), np.nan, np.float32)
    rows = [row(k, [person()]) for k in range(3)] + [row(3, [missing()])]
    vectors = [
        {"generated": eye[None, [0]], "target": eye[[0]]},
        {"generated": eye[None, [2]], "target": eye[[1]]},  # nearer to another person
        {"generated": eye[None, [2]], "target": eye[[2]]},
        {"generated": nobody, "target": eye[[3]]},
    ]
    figures.add_crowd(rows, vectors)
    assert values(rows, "rank_one") == [1, 0, 1, 0]
    assert values(rows, "strangers") == pytest.approx([0, 1 / 3, 0])


# ---- results.json


def test_results_come_back_as_written(tmp_path: Path) -> None:
    content = made([row(k, [person(0.1 * k)]) for k in range(5)])
    path = results.write_results(content, tmp_path / "deep" / "results.json")
    assert results.read_results(path) == content
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("schema"), "schema None"),
        (lambda c: c.update(schema="withanyone.bench.results/0"), "reads 'withanyone.bench.results/1'"),
        (lambda c: c.update(rows={}), "'rows' is missing or of the wrong type"),
        (lambda c: c["metrics"]["all"]["sim_gt"].pop("low"), "all.sim_gt has no finite"),
        (lambda c: c["metrics"]["all"].update(sim_gt=3), "all.sim_gt has no finite"),
    ],
)
def test_what_is_no_results_file_is_said(tmp_path: Path, change, words: str) -> None:
    content = made([row(0, [person()])])
    change(content)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words):
        results.read_results(path)


def test_no_file_and_no_json_are_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a file"):
        results.read_results(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        results.read_results(tmp_path / "x.json")


def test_the_git_hash_is_of_this_checkout() -> None:
    found = results.environment()
    assert found["git"] == "unknown" or len(found["git"]) >= 7
    assert found["torch"] != "not installed"


# ---- the gate


def rows_at(sim_gt: float, count: int = 40, seed: int = 0) -> list[dict]:
    noise = np.random.default_rng(seed).normal(0, 0.2, count)
    return [row(k, [person(float(sim_gt + noise[k]))]) for k in range(count)]


def test_the_gate_names_what_got_worse_and_nothing_else() -> None:
    before, after = made(rows_at(0.5)), made(rows_at(0.45))  # far within either's own interval
    worse = {f"{v.subset}.{v.metric}" for v in gate.compare(after, before) if v.worse}
    assert worse == {
        f"{s}.{m}" for s in ("all", "single") for m in ("sim_gt", "sim_gt_found", "sim_gt_in_box")
    }
    assert not any(v.worse for v in gate.compare(before, after))  # better is not worse
    assert not any(v.worse for v in gate.compare(before, copy.deepcopy(before)))
    assert not any(v.worse for v in gate.compare(after, before, tolerance=0.06))


def test_the_gate_lets_noise_pass() -> None:
    """Independent noise of the same size, no change of the mean: rarely worse."""
    before = made(rows_at(0.5, seed=100))
    flags = [
        any(v.worse for v in gate.compare(made(rows_at(0.5, seed=k)), before, chosen=["sim_gt"]))
        for k in range(20)
    ]
    assert sum(flags) <= 4


def test_less_is_better_for_copying_and_what_is_gone_is_worse() -> None:
    before, after = made(rows_at(0.5)), made(rows_at(0.5))
    for case in after["rows"]:
        case["pictures"][0]["people"][0]["scores"]["a"]["copy_paste"] += 0.1
        case["pictures"][0]["values"] = {}
    after["metrics"] = figures.figures(after["rows"], ["a"], DEFAULTS, BOOTSTRAP)
    worse = {v.metric: str(v) for v in gate.compare(after, before) if v.worse and v.subset == "all"}
    assert set(worse) == {"copy_paste", "clip_t"}
    assert "not measured now" in worse["clip_t"]
    assert "0.2000 -> 0.3000" in worse["copy_paste"]


def test_a_face_that_one_run_lost_counts() -> None:
    before = made(rows_at(0.5))
    rows = rows_at(0.5)
    for case in rows[:12]:
        case["pictures"][0]["people"] = [missing()]
    worse = {v.metric for v in gate.compare(made(rows), before) if v.worse}
    assert {"found", "sim_gt", "in_box"} <= worse


def test_the_gate_refuses_what_cannot_be_compared() -> None:
    before, after = made(rows_at(0.5)), made(rows_at(0.5))
    with pytest.raises(ValueError, match="Did you mean 'sim_gt'"):
        gate.compare(after, before, chosen=["simgt"])
    after["bench"]["fingerprint"] = "other"
    with pytest.raises(ValueError, match="other cases"):
        gate.compare(after, before)
    after = made(rows_at(0.5), by=("a", "b"))
    with pytest.raises(ValueError, match="other judges"):
        gate.compare(after, before)


# ---- tables


def test_the_published_tables_are_whole() -> None:
    assert len(published.TABLE_1) == 17
    assert len(published.TABLE_2) == 10
    assert [r.method for r in published.TABLE_1 if not r.ranked] == ["GT", "Ref"]
    by_name = {r.method: r.values for r in published.TABLE_1}
    assert by_name["WithAnyone"] == {
        "sim_gt": 0.460, "sim_ref": 0.578, "copy_paste": 0.144, "clip_i": 0.798, "clip_t": 0.313,
        "aesthetic": 4.783,
    }  # fmt: skip
    assert by_name["GT"] == {"sim_gt": 1.0, "sim_ref": 0.521, "copy_paste": -0.999}
    assert {r.method: r.values["blending"] for r in published.TABLE_2}["WithAnyone"] == 0.045
    for entry in (*published.TABLE_1, *published.TABLE_2):
        if entry.ranked:
            assert len(entry.values) == 6
            assert entry.values["sim_gt"] < entry.values["sim_ref"]  # all copy


def test_ranking_of_the_published_tables() -> None:
    one, several = tables.make_tables([])
    best = {(one.rows[n].method, column): place for (n, column), place in one.places().items()}
    assert best["InstantID", "sim_gt"] == 1
    assert best["WithAnyone", "sim_gt"] == 2
    assert best["WithAnyone", "copy_paste"] == 1  # Kontext's 0.099 is below the threshold
    assert ("Qwen-Image-Edit", "copy_paste") not in best
    assert not any(method in ("GT", "Ref") for method, _ in best)
    best = {(several.rows[n].method, column): place for (n, column), place in several.places().items()}
    assert best["WithAnyone", "blending"] == 1
    assert best["PuLID", "copy_paste"] == 1
    assert ("UNO", "copy_paste") not in best
    assert any("prior knowledge" in note for note in several.notes)


def test_another_world_is_never_in_one_ranking() -> None:
    drawn = made(rows_at(0.9), "mine", "the drawn world")
    drawn["bench"]["world"] = "the drawn world"
    made_tables = tables.make_tables([drawn])
    assert [t.title for t in made_tables][2:] == ["the drawn world, one person"]
    assert all("mine" not in [r.method for r in t.rows] for t in made_tables[:2])
    assert any("not comparable" in note for note in made_tables[2].notes)


def test_own_rows_beside_the_published_are_ranked_only_by_the_papers_judges() -> None:
    same = made(rows_at(0.9), "ours", "MultiID-Bench", by=("a", "b"))
    (one, *_) = tables.make_tables([same])
    assert one.rows[-1].method == "ours"
    assert not one.rows[-1].ranked
    assert any("outside the ranking" in note for note in one.notes)
    same["identity_by"] = list(tables.PUBLISHED_JUDGES)
    assert tables.make_tables([same])[0].rows[-1].ranked


def test_tables_in_three_formats() -> None:
    found = tables.make_tables([made(rows_at(0.5), "my_method & co")])
    text = tables.render(found, "markdown", intervals=True)
    assert "| WithAnyone | <u>0.460</u> | 0.578 | **0.144** | **0.798** | 0.313 | 4.783 |" in text
    assert "| my_method & co | **0." in text
    assert "[0." in text
    latex = tables.render(found, "latex")
    assert r"WithAnyone & \underline{0.460} & 0.578 & \textbf{0.144}" in latex
    assert r"my\_method \& co" in latex
    assert latex.count(r"\begin{table}") == latex.count(r"\end{table}") == 3
    lines = tables.render(found, "csv").splitlines()
    assert lines[0] == "table,method,metric,mean,low,high,place,people"
    assert '"Table 1. MultiID-Bench, one person",WithAnyone,sim_gt,0.46,,,2,' in lines
    with pytest.raises(ValueError, match="`format` is 'html'"):
        tables.render(found, "html")


def test_absent_judges_are_named_under_the_table() -> None:
    content = made(rows_at(0.5))
    content["judges"]["clip"] = {"absent": "no such folder"}
    assert any("clip is absent (no such folder)" in note for note in tables.make_tables([content])[2].notes)


def test_the_attribute_table_says_what_was_copied() -> None:
    text = tables.attribute_table(made([row(k, [person()]) for k in range(4)]))
    assert "| expression | 1.000 | 0.000 | 0.000 | 1.000 | – | 0.200 |" in text
    with pytest.raises(ValueError, match="no judge knew the world"):
        tables.attribute_table(made([row(0, [person(read=None)])]))


# ---- sweeps


def test_the_front_holds_who_is_beaten_by_nobody(tmp_path: Path) -> None:
    found = []
    for similarity, diversity, sim_gt, copied in (
        (0.5, 0.0, 0.3, 0.1),
        (1.0, 0.0, 0.5, 0.4),
        (1.0, 1.0, 0.2, 0.2),
    ):
        entry = person(sim_gt)
        entry["scores"]["a"]["copy_paste"] = copied
        content = made([row(0, [entry])])
        content["generation"] = {"similarity": similarity, "diversity": diversity}
        found.append(content)
    content = sweep.make_sweep("m", found)
    assert [(p["similarity"], p["diversity"], p["on_front"]) for p in content["positions"]] == [
        (0.5, 0.0, True), (1.0, 0.0, True), (1.0, 1.0, False),
    ]  # fmt: skip
    path = results.write_results(content, tmp_path / "sweep.json")
    assert sweep.is_sweep(path)
    assert not sweep.is_sweep(tmp_path / "none.json")
    assert tables.sweep_table(sweep.read_sweep(path)).count("●") == 2
    found[0]["generation"] = None
    with pytest.raises(ValueError, match="no position of the sliders"):
        sweep.make_sweep("m", found)
    with pytest.raises(ValueError, match="is no sweep"):
        sweep.read_sweep(results.write_results(found[1], tmp_path / "results.json"))
