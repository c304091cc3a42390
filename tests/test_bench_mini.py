"""The miniature on the bench: what a caption asks for, what the world knows, one command that scores it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from withanyone.bench import judges as bench_judges
from withanyone.bench.__main__ import main
from withanyone.bench.cases import read_cases
from withanyone.mini import benching, records, world
from withanyone.mini.words import caption_of


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    records.write_cases(folder, 6, seed=3, split="validation")
    return folder


def test_a_captions_words_are_those_of_the_right_person() -> None:
    bald = {"expression": "smiling", "hair_style": "bald", "hat": "cap", "glasses": "none", "beard": "none",
            "pose": "left"}  # fmt: skip
    long = {"expression": "sad", "hair_style": "long", "hat": "cap", "glasses": "round", "beard": "none",
            "pose": "ahead"}  # fmt: skip
    setting = {"scene": "beach", "light": "daylight"}
    caption = (
        "two people by the sea: a smiling bald person wearing a cap on the left, a person with long red hair "
        "wearing round glasses on the right"
    )
    first, second = benching.asked(caption, [bald, long], setting)
    assert first == {"scene": "beach", "expression": "smiling", "hat": "cap"}
    assert second == {"scene": "beach", "hair_style": "long", "glasses": "round"}  # her cap was not asked for
    assert benching.asked("the sea", [bald], setting) == [{}]
    assert benching.asked("a person in the snow", [bald, long], setting) == [{}, {}]


def test_every_caption_of_the_world_is_taken_apart() -> None:
    people = world.RANGES["validation"]
    said = 0
    for seed in range(60):
        count = seed % 4 + 1
        rng = np.random.default_rng(seed)
        drawn = [
            world.Person(people[k], world.random_appearance(rng), np.zeros(4), np.zeros((5, 2)))
            for k in range(count)
        ]
        truth = [person.attributes() for person in drawn]
        setting = {"scene": "night", "light": "dim light"}
        asked = benching.asked(caption_of(drawn, "night", "dim light", rng), truth, setting)
        assert len(asked) == count
        for person, values in zip(asked, truth, strict=True):
            assert all(value == (values | setting)[name] for name, value in person.items())
            said += len(person)
    assert said > 60 * 2.5 * 2  # not much is missed


def test_the_world_knows_its_cases(drawn: Path) -> None:
    reader = benching.Reader()
    case = read_cases(drawn)[1]
    truths = reader.truth(case)
    assert len(truths) == case.num_persons == 2
    for truth, target, photo in zip(
        truths, case.meta["world"]["target"], case.meta["world"]["references"], strict=True
    ):
        assert truth.target == target | {name: case.meta["world"][name] for name in ("scene", "light")}
        assert photo.items() <= truth.reference.items()
        assert truth.reference["light"] in world.PICTURE_ATTRIBUTES["light"]
        assert truth.asked.items() <= truth.target.items()
    read = reader.read(case.target.pixels, case.bboxes)
    assert [set(person) for person in read] == [set(world.PERSON_ATTRIBUTES) | {"scene", "light"}] * 2


def test_cases_of_another_world_have_no_truth(tmp_path: Path) -> None:
    from tests import bench_world

    case = read_cases(bench_world.write_cases(tmp_path))[0]
    assert benching.Reader().truth(case) is None


def test_a_judge_without_weights_is_absent_and_the_coach_scores_alone(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(benching, "JUDGE", tmp_path / "recognition.onnx")
    panel = bench_judges.load_panel(["mini"])
    assert panel.scoring == ["coach"]
    assert "mini judge" in panel.absent["judge"]


def test_another_recogniser_judges_and_the_coach_stands_beside(monkeypatch, tmp_path: Path) -> None:
    """The judge's file, wherever it comes from: here a recogniser with random weights."""
    from tests import tiny_faces

    tiny_faces.export_recognizer(tiny_faces.recognizer(5), tmp_path / "recognition.onnx")
    monkeypatch.setattr(benching, "JUDGE", tmp_path / "recognition.onnx")
    panel = bench_judges.load_panel(["mini"])
    assert [judge.name for judge in panel.recognizers] == ["coach", "judge"]
    assert panel.scoring == ["judge"]


def test_drawn_cases_are_scored_by_one_command(drawn: Path, tmp_path: Path, capsys) -> None:
    made = str(tmp_path / "target")
    assert main(["--quiet", "generate", "--cases", str(drawn), "--model", "target", "--out", made]) == 0
    out = tmp_path / "results.json"
    score = ["score", "--cases", str(drawn), "--pictures", made, "--judges", "mini", "--out", str(out)]
    assert main(["--quiet", *score, "--cache", str(tmp_path / "seen"), "--resamples", "50"]) == 0
    results = json.loads(out.read_text())
    assert results["bench"]["name"] == "the drawn world"
    assert results["metrics"]["all"]["sim_gt"]["mean"] == pytest.approx(1, abs=1e-6)
    assert results["metrics"]["all"]["copy_paste"]["mean"] == pytest.approx(-1, abs=1e-5)
    # what the target shows was asked for, as far as the reader reads right
    assert results["metrics"]["all"]["prompt_following"]["mean"] > 0.5
    assert results["attributes"]["all"]["scene"]["copied"]["mean"] < 0.2
    people = [person for row in results["rows"] for person in row["pictures"][0]["people"]]
    assert all(set(person["copied"]) <= set(person["reference"]) for person in people)
    assert sum("scene" in person["copied"] for person in people) <= 1
    assert "the drawn world" in capsys.readouterr().out
    attributes = ["plot", "attributes", str(out), "--out", str(tmp_path / "attributes.png")]
    assert main(attributes) == 0
    assert (tmp_path / "attributes.png").stat().st_size > 5000
