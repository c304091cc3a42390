"""Cases of every layout are read alike, and a broken one is named."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from tests import bench_world
from withanyone.bench.cases import CaseError, check_cases, picture_paths, read_cases


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return bench_world.write_cases(tmp_path / "cases")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rows as on the Hub: boxes as a list in one file, as JSON text in another."""
    folder = tmp_path_factory.mktemp("hub")
    pair = [bench_world.reference(2), bench_world.reference(3)]
    for number, boxes in enumerate((bench_world.boxes(2), json.dumps(bench_world.boxes(2)))):
        bench_world.write_parquet(
            folder / f"text_{number}" / "test-00000.parquet",
            {
                "subset": ["p2"],
                "prompt": ["two people"],
                "bboxes": [[list(box) for box in boxes] if isinstance(boxes, list) else boxes],
                "num_persons": [2],
                "GT": [bench_world.target((2, 3))],
                "input_images": [[*pair]],
            },
        )
    return folder


def test_a_folder_of_cases(folder: Path) -> None:
    cases = read_cases(folder)
    assert (cases.layout, cases.bench, len(cases)) == ("folder", "cases", 4)
    case = cases[2]
    assert (case.name, case.num_persons, case.prompt) == ("0002", 3, "3 people")
    np.testing.assert_array_equal(case.bboxes, bench_world.boxes(3))
    assert case.names == ("4", "5", "6")
    assert case.target.pixels.shape == (128, 84 * 3 + 44, 3)
    assert check_cases(cases) == {}
    with pytest.raises(IndexError):
        cases[4]


@pytest.mark.parametrize("boxes_as", ["text_0", "text_1"])
def test_the_hubs_parquet(hub: Path, folder: Path, boxes_as: str) -> None:
    cases = read_cases(hub / boxes_as)
    assert (cases.layout, cases.bench, cases.names) == ("multiid-bench", "MultiID-Bench", ["0000"])
    case, same = cases[0], read_cases(folder)[1]
    assert (case.subset, case.num_persons) == ("p2", 2)
    np.testing.assert_array_equal(case.bboxes, same.bboxes)
    np.testing.assert_array_equal(case.target.pixels, same.target.pixels)
    for one, other in zip(case.references, same.references, strict=True):
        np.testing.assert_array_equal(one.pixels, other.pixels)
    sent = pickle.loads(pickle.dumps(cases))  # as to a worker
    assert sent[0].fingerprint() == case.fingerprint()


def test_omnicontexts_people_alone(tmp_path: Path) -> None:
    kinds = ["single_character", "single_object", "multi_character"]
    columns = {
        "key": ["a/1", "b", "c"],
        "task_type": kinds,
        "instruction": ["a person on a bridge", "a cup", "two people"],
        "input_images": [[bench_world.reference(k)] for k in range(3)],
    }
    bench_world.write_parquet(tmp_path / "omni.parquet", columns)
    cases = read_cases(tmp_path / "omni.parquet")
    assert (cases.layout, cases.names) == ("omnicontext", ["a_1"])
    assert cases[0].target is None
    assert cases[0].num_persons == 1
    columns["task_type"] = kinds[1:] * 1 + ["scene_object"]
    bench_world.write_parquet(tmp_path / "other.parquet", columns)
    with pytest.raises(ValueError, match="single_character.*scene_object"):
        read_cases(tmp_path / "other.parquet")


def test_the_released_evaluations_folder_needs_a_prompt_alone(folder: Path) -> None:
    (folder / "0001" / "meta.json").write_text(json.dumps({"prompt": "two people"}))
    case = read_cases(folder)[1]
    assert case.bboxes is None
    assert case.num_persons == 2
    bench_world.target((2, 3)).save(folder / "0001" / "out.jpg")
    assert picture_paths(folder, "0001") == [folder / "0001" / "out.jpg"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda case: bench_world.change_meta(case, prompt=None), "0001: `prompt` is missing"),
        (lambda case: bench_world.change_meta(case, prompt="  "), "0001: `prompt` is missing"),
        (lambda case: bench_world.change_meta(case, num_persons=3), "0001: `num_persons` is 3.*2 references"),
        (lambda case: bench_world.change_meta(case, num_persons="2"), "0001: `num_persons` is '2'"),
        (lambda case: bench_world.change_meta(case, bboxes=[[0, 0, 5, 5]]), "0001: 1 `bboxes` for 2 people"),
        (lambda case: bench_world.change_meta(case, bboxes=[[0, 0, 5]] * 2), "0001: `bboxes` must hold four"),
        (lambda case: bench_world.change_meta(case, bboxes=[[5, 5, 0, 9]] * 2), "0001: `bboxes`.*x2 > x1"),
        (lambda case: bench_world.change_meta(case, bboxes="[[1, 2"), "0001: `bboxes` is not JSON"),
        (lambda case: bench_world.change_meta(case, names=["a"]), "0001: `names` must name 2"),
        (lambda case: (case / "ref_1.png").unlink(), "0001: no reference photo"),
        (lambda case: (case / "ref_2.png").unlink(), "0001: `num_persons` is 2.*1 references"),
        (lambda case: (case / "ori.png").unlink(), "0001: no ori.jpg"),
        (lambda case: (case / "meta.json").unlink(), "0001: .*meta.json is missing"),
        (lambda case: (case / "meta.json").write_text("{"), "0001: meta.json is not JSON"),
        (lambda case: (case / "meta.json").write_text("[]"), "0001: meta.json holds a list"),
        (lambda case: (case / "ori.png").write_bytes(b"PNG"), "0001: ori.png cannot be read"),
        (lambda case: (case / "ref_2.png").write_bytes(b""), "0001: ref_2.png cannot be read"),
    ],
)
def test_a_broken_case_is_named(folder: Path, damage, words: str) -> None:
    damage(folder / "0001")
    cases = read_cases(folder)
    assert len(cases) == 4
    broken = check_cases(cases)
    assert list(broken) == [1]
    with pytest.raises(CaseError, match=words):
        raise CaseError("0001", broken[1].removeprefix("case 0001: "))


def test_broken_rows_of_parquet_are_named(tmp_path: Path) -> None:
    photo, shown = bench_world.reference(1), bench_world.target((1,))
    columns = {
        "subset": ["p1"] * 4,
        "prompt": ["a person", "a person", "", "a person"],
        "bboxes": [json.dumps(bench_world.boxes(1))] * 4,
        "num_persons": [1, 2, 1, 1],
        "GT": [shown, shown, shown, b"nothing"],
        "input_images": [[photo, None], [photo, None], [photo, None], [photo, None]],
    }
    broken = check_cases(read_cases(bench_world.write_parquet(tmp_path / "rows.parquet", columns)))
    assert sorted(broken) == [1, 2, 3]
    assert "`num_persons` is 2, but there are 1" in broken[1]
    assert "`prompt` is missing" in broken[2]
    assert "case 0003: GT_1 cannot be read" in broken[3]


def test_what_is_no_bench_is_said(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        read_cases(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="mini cases"):
        read_cases(tmp_path / "empty")
    with pytest.raises(ValueError, match="Did you mean 'multiid-bench'"):
        read_cases(folder, "multid-bench")
    with pytest.raises(ValueError, match="has the layout 'folder'"):
        read_cases(folder, "omnicontext")
    bench_world.write_parquet(tmp_path / "x.parquet", {"a": ["b"]})
    with pytest.raises(ValueError, match=r"columns \['a'\]"):
        read_cases(tmp_path / "x.parquet")


def test_pictures_are_found_by_name_and_seed(tmp_path: Path) -> None:
    for name in ("a.webp", "b--10.png", "b--2.png", "b--x.png", "b-1.png", "[c].jpg"):
        bench_world.reference(1).save(tmp_path / name)
    assert [path.name for path in picture_paths(tmp_path, "a")] == ["a.webp"]
    assert [path.name for path in picture_paths(tmp_path, "b")] == ["b--2.png", "b--10.png"]
    assert [path.name for path in picture_paths(tmp_path, "[c]")] == ["[c].jpg"]
    assert picture_paths(tmp_path, "d") == []


def test_the_fingerprint_is_of_what_scoring_sees(folder: Path) -> None:
    before = [case.fingerprint() for case in read_cases(folder)]
    bench_world.change_meta(folder / "0000", prompt="somebody else")
    bench_world.reference(9).save(folder / "0002" / "ref_2.png")
    after = [case.fingerprint() for case in read_cases(folder)]
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, True, False, True]
