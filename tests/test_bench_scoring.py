"""From pictures to rows: what is measured, what is missing, what is kept, on painted faces."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests import bench_world, tiny_faces
from withanyone.bench import scoring
from withanyone.bench.cases import read_cases
from withanyone.bench.judges import load_panel
from withanyone.bench.results import make_results
from withanyone.bench.scoring import Memory, score_case, score_cases

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"face=pack:{tiny_faces.write_pack(tmp_path_factory.mktemp('pack'))}"


@pytest.fixture(scope="module")
def panel(pack: str):
    return load_panel([pack])


@pytest.fixture
def cases_folder(tmp_path: Path) -> Path:
    return bench_world.write_cases(tmp_path / "cases")


@pytest.fixture
def memory(tmp_path: Path, panel) -> Memory:
    return Memory(tmp_path / "seen", panel)


def run(cases_folder: Path, pictures: Path, pack: str, panel, out: Path, **given):
    return score_cases(
        read_cases(cases_folder),
        pictures,
        [pack],
        rows=out / "rows",
        memory=out / "seen",
        panel=panel,
        **given,
    )


def row_of(cases_folder: Path, index: int, image, panel, memory: Memory, tmp_path: Path) -> dict:
    path = tmp_path / "made.png"
    image.save(path)
    return score_case(read_cases(cases_folder)[index], [path], panel, memory)[0]


def test_targets_as_outputs_are_the_row_gt(cases_folder: Path, panel, memory: Memory, tmp_path: Path) -> None:
    row = row_of(cases_folder, 2, bench_world.target((4, 5, 6)), panel, memory, tmp_path)
    assert row["problems"] == []
    (picture,) = row["pictures"]
    assert (picture["faces_found"], picture["extra_faces"]) == (3, 0)
    for person in picture["people"]:
        assert (person["found"], person["truth"], person["in_box"], person["swapped"]) == (
            True,
            True,
            True,
            False,
        )
        scores = person["scores"]["face"]
        assert scores["sim_gt"] == pytest.approx(1)
        assert scores["copy_paste"] == pytest.approx(-1, abs=1e-5)
        assert scores["sim_ref"] == scores["ceiling"] < 1


def test_the_reference_as_output_is_the_row_ref(
    cases_folder: Path, panel, memory: Memory, tmp_path: Path
) -> None:
    row = row_of(cases_folder, 0, bench_world.reference(1), panel, memory, tmp_path)
    scores = row["pictures"][0]["people"][0]["scores"]["face"]
    assert scores["sim_ref"] == pytest.approx(1)
    assert scores["copy_paste"] == pytest.approx(1, abs=1e-5)
    assert scores["sim_gt"] == scores["ceiling"]


def test_swapped_people_keep_their_likeness_and_are_seen_by_box(
    cases_folder: Path, panel, memory: Memory, tmp_path: Path
) -> None:
    right = row_of(cases_folder, 2, bench_world.target((4, 5, 6)), panel, memory, tmp_path)
    row = row_of(cases_folder, 2, bench_world.target((5, 4, 6)), panel, memory, tmp_path)
    people, before = row["pictures"][0]["people"], right["pictures"][0]["people"]
    assert [person["swapped"] for person in people] == [True, True, False]
    for person, old in zip(people, before, strict=True):
        scores = person["scores"]["face"]
        assert scores["sim_gt"] > 0.5  # the assignment hides the swap: everybody is alike
        assert old["scores"]["face"]["sim_gt_in_box"] == old["scores"]["face"]["sim_gt"]
        assert (scores["sim_gt_in_box"] < scores["sim_gt"] - 0.2) == person["swapped"]


def test_missing_and_extra_faces_are_counted(
    cases_folder: Path, panel, memory: Memory, tmp_path: Path
) -> None:
    two = bench_world.target((4, 6), [bench_world.boxes(3)[0], bench_world.boxes(3)[2]])
    wide = tiny_faces.blank(84 * 3 + 44, 128)
    wide.paste(two)
    wide = tiny_faces.paint_face(wide, bench_world.boxes(3)[2], 6)
    people = row_of(cases_folder, 2, wide, panel, memory, tmp_path)["pictures"][0]["people"]
    assert [person["found"] for person in people] == [True, False, True]
    assert [person["in_box"] for person in people] == [True, False, True]
    assert set(people[1]["scores"]["face"]) == {"ceiling"}
    crowd = row_of(cases_folder, 0, bench_world.target((8, 1)), panel, memory, tmp_path)["pictures"][0]
    assert (crowd["faces_found"], crowd["extra_faces"]) == (2, 1)
    assert crowd["people"][0]["scores"]["face"]["sim_gt"] > 0.9  # the right one of the two


def test_a_picture_of_another_size_has_its_boxes_scaled(
    cases_folder: Path, panel, memory: Memory, tmp_path: Path
) -> None:
    image = bench_world.target((2, 3))
    row = row_of(cases_folder, 1, image.resize((image.width * 2, image.height * 2)), panel, memory, tmp_path)
    assert all(person["in_box"] for person in row["pictures"][0]["people"])


def test_without_boxes_the_targets_faces_are_assigned_to_the_references(
    cases_folder: Path, panel, memory: Memory, tmp_path: Path
) -> None:
    bench_world.target((6, 5, 4)).save(cases_folder / "0002" / "ori.png")  # another order than the references
    bench_world.change_meta(cases_folder / "0002", bboxes=None)
    row = row_of(cases_folder, 2, bench_world.target((6, 5, 4)), panel, memory, tmp_path)
    for person in row["pictures"][0]["people"]:
        assert person["in_box"] is None
        assert person["swapped"] is None
        assert person["scores"]["face"]["ceiling"] > 0.3  # of strangers at most 0.27
        assert person["scores"]["face"]["sim_gt"] == pytest.approx(1)


def test_no_face_anywhere_is_named(cases_folder: Path, panel, memory: Memory, tmp_path: Path) -> None:
    tiny_faces.blank().save(cases_folder / "0001" / "ref_2.png")
    bench_world.target((3,), [bench_world.boxes(2)[1]]).save(cases_folder / "0001" / "ori.png")
    row = row_of(cases_folder, 1, tiny_faces.blank(212, 128), panel, memory, tmp_path)
    kinds = sorted(problem[0] for problem in row["problems"])
    assert kinds == ["no face in picture", "no face in reference", "no face in target"]
    assert [person["truth"] for person in row["pictures"][0]["people"]] == [False, False]
    assert all("case 0001" in message for _, message in row["problems"])


def test_missing_and_unreadable_pictures_count_as_nobody_found(
    cases_folder: Path, pack: str, panel, tmp_path: Path
) -> None:
    pictures = bench_world.write_pictures(tmp_path / "made")
    (pictures / "0000.png").unlink()
    (pictures / "0003.png").write_bytes(b"not a picture")
    scored = run(cases_folder, pictures, pack, panel, tmp_path)
    results = make_results("x", read_cases(cases_folder), scored, panel)
    assert results["problems"]["picture missing"]["count"] == 1
    assert "case 0000" in results["problems"]["picture missing"]["first"][0]
    assert "case 0003" in results["problems"]["picture unreadable"]["first"][0]
    single, several = results["metrics"]["single"], results["metrics"]["multi"]
    assert single["sim_gt"]["mean"] == 0
    assert single["sim_gt"]["n"] == 2
    assert single["found"]["mean"] == 0
    assert "copy_paste" not in single
    assert several["sim_gt"]["mean"] == pytest.approx(1)


def test_broken_cases_are_left_out_and_named_or_stop_the_run(
    cases_folder: Path, pack: str, panel, tmp_path: Path
) -> None:
    pictures = bench_world.write_pictures(tmp_path / "made")
    (cases_folder / "0001" / "ref_2.png").unlink()
    (cases_folder / "0003" / "ori.png").write_bytes(b"")
    scored = run(cases_folder, pictures, pack, panel, tmp_path)
    assert [row["case"] for row in scored.rows] == ["0000", "0002"]
    assert set(scored.broken) == {"0001", "0003"}
    assert "ori.png cannot be read" in scored.broken["0003"]
    with pytest.raises(ValueError, match="case 0001"):
        run(cases_folder, pictures, pack, panel, tmp_path, strict=True)
    with pytest.raises(ValueError, match="holds no picture of any"):
        run(cases_folder, tmp_path / "nothing", pack, panel, tmp_path)


def test_what_was_seen_is_not_looked_at_again(cases_folder: Path, pack: str, panel, tmp_path: Path) -> None:
    """Another method on the same cases costs its own pictures only; equal pixels cost nothing."""
    cases, pictures = read_cases(cases_folder), bench_world.write_pictures(tmp_path / "made")
    memory = Memory(tmp_path / "seen", panel)
    for case in cases:
        score_case(case, [pictures / f"{case.name}.png"], panel, memory)
    people = sum(case.num_persons for case in cases)
    assert memory.computed == len(cases) + people  # targets and references; the pictures equal the targets
    again = Memory(tmp_path / "seen", panel)
    made = tmp_path / "other.png"
    bench_world.target((9,)).save(made)
    score_case(cases[0], [made], panel, again)
    assert again.computed == 1


def test_rows_are_kept_until_what_they_depend_on_changes(
    cases_folder: Path, pack: str, panel, tmp_path: Path
) -> None:
    pictures = bench_world.write_pictures(tmp_path / "made")
    first = run(cases_folder, pictures, pack, panel, tmp_path)
    assert first.kept == 0
    second = run(cases_folder, pictures, pack, panel, tmp_path)
    assert second.kept == 4
    assert json.dumps(second.rows) == json.dumps(first.rows)
    for one, other in zip(first.vectors, second.vectors, strict=True):
        for name, value in one.items():
            np.testing.assert_array_equal(value, other[name])
    bench_world.target((9,)).save(pictures / "0000.png")
    bench_world.change_meta(cases_folder / "0001", prompt="others")
    (tmp_path / "rows" / "0002.npz").write_bytes(b"cut o")
    assert run(cases_folder, pictures, pack, panel, tmp_path).kept == 1
    other = scoring.Settings(box_iou=0.5)
    assert run(cases_folder, pictures, pack, panel, tmp_path, settings=other).kept == 0


def test_several_seeds_of_a_case_are_pictures_of_one_row(
    cases_folder: Path, pack: str, panel, tmp_path: Path
) -> None:
    pictures = tmp_path / "made"
    pictures.mkdir()
    for seed in (0, 7):
        bench_world.target((1,)).save(pictures / f"0000--{seed}.png")
    scored = run(cases_folder, pictures, pack, panel, tmp_path, limit=1)
    assert [picture["seed"] for picture in scored.rows[0]["pictures"]] == [0, 7]
    assert scored.vectors[0]["generated"].shape == (2, 1, 512)


def bench(*words: object, **given) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "withanyone.bench", "--quiet", *(str(word) for word in words)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, **given)


def without_run(path: Path) -> str:
    """All that scoring decides; the checkout may get a commit between two runs."""
    results = json.loads(path.read_text())
    del results["run"], results["environment"]
    return json.dumps(results)


@pytest.mark.slow
def test_one_and_two_workers_and_a_killed_run_give_the_same(pack: str, tmp_path: Path) -> None:
    people = [((k,), (k, k + 1), (k, k + 1, k + 2))[k % 3] for k in range(1, 25)]
    cases = bench_world.write_cases(tmp_path / "cases", people)
    pictures = bench_world.write_pictures(tmp_path / "made", people)
    score = ("score", "--cases", cases, "--pictures", pictures, "--judges", pack, "--resamples", "50")
    done = bench(*score, "--out", tmp_path / "one.json", "--cache", tmp_path / "seen_1")
    assert done.returncode == 0, done.stderr
    done = bench(*score, "--out", tmp_path / "two.json", "--cache", tmp_path / "seen_2", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert without_run(tmp_path / "one.json") == without_run(tmp_path / "two.json")

    rows, third = (
        tmp_path / "killed.rows",
        (*score, "--out", tmp_path / "killed.json", "--cache", tmp_path / "s3"),
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "withanyone.bench", "--quiet", *map(str, third)], cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(list(rows.glob("*.npz"))) < 5 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = len(list(rows.glob("*.npz")))
    assert 5 <= there < len(people)  # killed on the way
    done = bench(*third)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "killed.json").read_text())["run"]["rows_kept"] == there
    assert without_run(tmp_path / "killed.json") == without_run(tmp_path / "one.json")
