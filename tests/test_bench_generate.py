"""Pictures of every case: which, where, by what seed; again; in a sweep; and the command line on them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import bench_world, tiny_faces
from withanyone.bench import generate as gen
from withanyone.bench.__main__ import main
from withanyone.bench.cases import read_cases
from withanyone.settings import read_settings


class FakePipeline:
    """Writes down how it was called, and paints the people it was given into their boxes."""

    calls: list[dict] = []

    @classmethod
    def from_pretrained(cls, model: str, dtype) -> FakePipeline:
        cls.dtype = dtype
        if model == "nothing":
            raise OSError("no such model")
        return cls()

    def to(self, device) -> FakePipeline:
        return self

    def set_progress_bar_config(self, **settings) -> None:
        pass

    def __call__(self, **given):
        self.calls.append(given)
        if given["prompt"] == "refuse":
            raise ValueError("`faces[0]`: no face found")
        image = Image.new("RGB", (given["width"], given["height"]))
        for box, photo in zip(given["bboxes"], given["faces"], strict=True):
            face = photo.crop((24, 12, 104, 118))
            x1, y1, x2, y2 = (round(v) for v in box)
            image.paste(face.resize((x2 - x1, y2 - y1)), (x1, y1))

        class Out:
            images = [image]

        return Out()


FAKE = f"{__name__}:FakePipeline"


@pytest.fixture(autouse=True)
def fresh() -> None:
    FakePipeline.calls = []


@pytest.fixture
def cases(tmp_path: Path):
    return read_cases(bench_world.write_cases(tmp_path / "cases"))


@pytest.mark.parametrize("computes", [True, False], ids=["with-bfloat16", "without"])
def test_auto_is_the_dtype_that_the_device_computes_in_and_the_folder_says_which(
    cases, tmp_path: Path, monkeypatch, computes: bool
) -> None:
    monkeypatch.setattr("withanyone.precision.computes_bfloat16", lambda device="cpu": computes)
    words = ["--quiet", "generate", "--cases", str(cases.source)]
    words += ["--model", "m", "--pipeline", FAKE, "--device", "cpu"]
    for asked, meant in (("auto", "bfloat16" if computes else "float32"), ("bfloat16", "bfloat16")):
        out = tmp_path / asked
        assert main([*words, "--out", str(out), "--dtype", asked]) == 0
        assert str(FakePipeline.dtype) == f"torch.{meant}"
        assert json.loads((out / "generate.json").read_text())["dtype"] == meant
    with pytest.raises(SystemExit):
        main([*words, "--out", str(tmp_path / "no"), "--dtype", "half"])


def test_every_case_gets_a_picture_and_no_case_another_ones_noise(cases, tmp_path: Path) -> None:
    plan = gen.Plan(cases, str(tmp_path / "out"), "m", pipeline=FAKE)
    assert gen.generate(plan) == {}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "0000.png", "0001.png", "0002.png", "0003.png", "generate.json",
    ]  # fmt: skip
    seeds = [call["generator"].initial_seed() for call in FakePipeline.calls]
    assert len(set(seeds)) == 4
    call = FakePipeline.calls[1]
    assert (call["prompt"], len(call["faces"])) == ("2 people", 2)
    assert (call["width"], call["height"]) == (208, 128)  # the target's 212 x 128, in multiples of 16
    scale = np.array([208 / 212, 1] * 2)
    np.testing.assert_allclose(call["bboxes"], np.array(bench_world.boxes(2)) * scale)
    written = read_settings(tmp_path / "out" / "0001.png")
    assert written["prompt"] == "2 people"
    assert written["seed"] == seeds[1]


def test_a_run_goes_on_where_it_stopped_and_refuses_other_settings(cases, tmp_path: Path) -> None:
    plan = gen.Plan(cases, str(tmp_path / "out"), "m", pipeline=FAKE)
    gen.generate(plan, limit=2)
    before = (tmp_path / "out" / "0000.png").read_bytes()
    gen.generate(plan)
    assert len(FakePipeline.calls) == 4
    assert (tmp_path / "out" / "0000.png").read_bytes() == before
    gen.generate(plan)
    assert len(FakePipeline.calls) == 4
    other = gen.Plan(cases, str(tmp_path / "out"), "m", seeds=(1,), pipeline=FAKE)
    with pytest.raises(ValueError, match="pictures of other settings"):
        gen.generate(other)


def test_seeds_and_slider_positions_have_their_own_files(cases, tmp_path: Path) -> None:
    positions = tuple(gen.positions((0.5, 1.0), (0.25,)))
    plan = gen.Plan(cases, str(tmp_path), "m", seeds=(3, 4), positions=positions, pipeline=FAKE)
    gen.generate(plan, limit=1)
    folder = tmp_path / "similarity-0.50_diversity-0.25"
    assert sorted(p.name for p in folder.iterdir()) == ["0000--3.png", "0000--4.png", "generate.json"]
    scales = {(call["id_scale"], call["siglip_scale"]) for call in FakePipeline.calls}
    assert scales == {(0.125, 0.375), (0.25, 0.75)}
    same = [call["generator"].initial_seed() for call in FakePipeline.calls]
    assert same[0] == same[2] != same[1]  # a position differs from another by the sliders alone
    assert json.loads((folder / "generate.json").read_text())["similarity"] == 0.5
    assert gen.positions((), ()) == [gen.Position(None, None)]
    assert len(gen.positions(gen.SWEEP_SIMILARITY, gen.SWEEP_DIVERSITY)) == 25
    with pytest.raises(ValueError, match="similarity"):
        gen.positions((7.0,), ())


def test_a_case_that_cannot_be_made_is_named_and_the_others_are_made(cases, tmp_path: Path) -> None:
    bench_world.change_meta(tmp_path / "cases" / "0001", prompt="refuse")
    (tmp_path / "cases" / "0002" / "ref_1.png").unlink()
    failures = gen.generate(gen.Plan(cases, str(tmp_path / "out"), "m", pipeline=FAKE))
    assert set(failures) == {"0001.png", "0002.png"}
    assert "case 0001: `faces[0]`: no face found" in failures["0001.png"]
    assert "no reference photo" in failures["0002.png"]
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


def test_targets_and_references_are_methods_too(cases, tmp_path: Path) -> None:
    for model in gen.NO_PIPELINES:
        gen.generate(gen.Plan(cases, str(tmp_path / model), model))
    np.testing.assert_array_equal(
        np.asarray(Image.open(tmp_path / "target" / "0002.png")), cases[2].target.pixels
    )
    photo = cases[3].references[0].pixels
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "reference" / "0003.png")), photo)
    grid = np.asarray(Image.open(tmp_path / "reference" / "0002.png"))
    assert grid.shape == (256, 256, 3)  # three photos of 128 pixels
    np.testing.assert_array_equal(grid[128:, :128], cases[2].references[2].pixels)


def test_large_targets_are_made_smaller_and_boxes_cut(cases) -> None:
    case = cases[1]
    assert gen.output_size(case, 100) == (96, 48)
    boxes = np.array(gen.scaled_boxes(case, (96, 48)))
    np.testing.assert_allclose(
        boxes, np.array(bench_world.boxes(2)) * [96 / 212, 48 / 128, 96 / 212, 48 / 128]
    )


def test_a_pipeline_that_is_none_is_said(cases, tmp_path: Path) -> None:
    for pipeline in ("no.such:Thing", "withanyone.flow:nothing", "json:loads"):
        with pytest.raises(ValueError, match="`pipeline` is"):
            gen.generate(gen.Plan(cases, str(tmp_path / pipeline), "m", pipeline=pipeline))


# ---- the command line


@pytest.fixture
def pack(tmp_path: Path) -> str:
    return f"face=pack:{tiny_faces.write_pack(tmp_path / 'pack')}"


def test_from_cases_to_tables_plots_and_the_gate(tmp_path: Path, pack: str, capsys) -> None:
    folder = bench_world.write_cases(tmp_path / "cases", [(k,) if k % 2 else (k, k + 1) for k in range(1, 9)])
    score = ["score", "--cases", str(folder), "--judges", pack, "--cache", str(tmp_path / "seen")]
    for model, name in (("target", "GT"), ("reference", "Ref")):
        made = tmp_path / model
        assert (
            main(["--quiet", "generate", "--cases", str(folder), "--model", model, "--out", str(made)]) == 0
        )
        out = str(tmp_path / f"{name}.json")
        assert (
            main([*score, "--pictures", str(made), "--method", name, "--out", out, "--resamples", "50"]) == 0
        )
    said = capsys.readouterr().out
    assert "GT on cases: 8 of 8 cases, 12 people" in said
    gt, ref = (str(tmp_path / f"{name}.json") for name in ("GT", "Ref"))
    single = {
        name: json.loads(Path(path).read_text())["metrics"]["single"]
        for name, path in zip("gr", (gt, ref), strict=True)
    }
    # the signs and ones of the published rows GT and Ref
    assert single["g"]["sim_gt"]["mean"] == pytest.approx(1)
    assert single["g"]["copy_paste"]["mean"] == pytest.approx(-1, abs=1e-5)
    assert single["r"]["sim_ref"]["mean"] == pytest.approx(1)
    assert single["r"]["copy_paste"]["mean"] == pytest.approx(1, abs=1e-5)
    assert single["g"]["sim_ref"]["mean"] == pytest.approx(single["r"]["sim_gt"]["mean"])

    assert main(["table", gt, ref, "--format", "csv", "--out", str(tmp_path / "t.csv")]) == 0
    assert '"cases, one person",GT,sim_gt,1.0,1.0,1.0,,4' in (tmp_path / "t.csv").read_text()
    for kind, files in (("tradeoff", []), ("cases", [gt, ref]), ("real", [gt, ref])):
        out = tmp_path / f"{kind}.png"
        assert main(["plot", kind, *files, "--out", str(out)]) == 0
        assert np.asarray(Image.open(out).convert("L")).std() > 5  # something is drawn
    assert main(["check", gt, "--baseline", gt]) == 0
    capsys.readouterr()
    assert main(["check", ref, "--baseline", gt]) == 1
    assert "single.copy_paste" in capsys.readouterr().err


def test_a_sweep_is_scored_position_by_position(tmp_path: Path, pack: str, capsys) -> None:
    folder = bench_world.write_cases(tmp_path / "cases", [(1,), (2,)])
    made = tmp_path / "made"
    plan = gen.Plan(
        read_cases(folder),
        str(made),
        "m",
        positions=tuple(gen.positions((0.5, 1.0), (0.0, 1.0))),
        pipeline=FAKE,
    )
    gen.generate(plan)
    out = tmp_path / "sweep.json"
    score = ["score", "--cases", str(folder), "--pictures", str(made), "--judges", pack, "--out", str(out)]
    assert main([*score, "--cache", str(tmp_path / "seen"), "--resamples", "50", "--method", "fake"]) == 0
    content = json.loads(out.read_text())
    assert [(p["similarity"], p["diversity"]) for p in content["positions"]] == [
        (0.5, 0.0), (0.5, 1.0), (1.0, 0.0), (1.0, 1.0),
    ]  # fmt: skip
    assert len(list(tmp_path.glob("sweep.similarity-*.json"))) == 4
    assert main(["plot", "sweep", str(out), "--out", str(tmp_path / "sweep.png")]) == 0
    capsys.readouterr()
    assert main(["table", "--only-own", str(out)]) == 0
    assert "| 0.50 | 0.00 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["score", "--cases", "nowhere", "--pictures", ".", "--out", "x.json"],
            "`cases` nowhere does not exist",
        ),
        (["table", "nowhere.json"], "nowhere.json is not a file"),
        (["plot", "cases", "--out", "x.png"], "`results` is empty"),
        (["plot", "tradeoff", "--out", "x.gif"], "ends in .png"),
        (["check", "a.json", "--baseline", "b.json"], "a.json is not a file"),
        (
            ["generate", "--cases", "c", "--model", "m", "--out", "o", "--sweep", "--diversity", "1"],
            "`sweep`",
        ),
        (["generate", "--cases", "c", "--model", "m", "--out", "o", "--seeds", "1", "1"], "`seeds`"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    words: list[str], said: str, capsys, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_another_worlds_results_are_kept_out_of_figure_5(tmp_path: Path) -> None:
    from tests.test_bench_results import made, person, row
    from withanyone.bench import plots

    own = made([row(k, [person(0.1 * k)]) for k in range(5)], bench="the drawn world")
    with pytest.raises(ValueError, match="do not belong among published ones"):
        plots.plot_tradeoff([own], tmp_path / "x.png")
    own["bench"]["name"] = "MultiID-Bench"
    said = plots.plot_tradeoff([own], tmp_path / "x.svg")
    text = (tmp_path / "x.svg").read_text()
    assert text.startswith("<?xml")
    assert any(line.startswith("WithAnyone: -0.17") for line in said)  # below the curve, as in the paper
    assert said[-1].startswith("m:")


def test_the_fitted_curve_is_the_one_the_points_lie_on() -> None:
    from withanyone.bench.plots import fit_tradeoff

    x = np.linspace(0.3, 0.5, 9)
    a, b, scatter = fit_tradeoff(x, np.exp(-4 + 6 * x))
    assert (a, b) == pytest.approx((-4, 6))
    assert scatter == pytest.approx(0, abs=1e-9)
    noisy = np.exp(-4 + 6 * x) + np.array([1, -1] * 4 + [0]) * 0.01
    a, b, scatter = fit_tradeoff(x, noisy)
    left = noisy - np.exp(a + b * x)
    assert scatter == pytest.approx(np.sqrt((left**2).sum() / 7))
    for da, db in ((1e-3, 0), (-1e-3, 0), (0, 1e-2), (0, -1e-2)):  # a minimum
        assert (((noisy - np.exp(a + da + (b + db) * x)) ** 2).sum()) > (left**2).sum()
    with pytest.raises(ValueError, match="three methods"):
        fit_tradeoff(x[:2], x[:2])


def test_no_label_covers_another() -> None:
    """The placing of labels on a crowd of dots."""
    from withanyone.bench import plots

    figure, (axis,) = plots.start_figure(6, 4)
    dots = np.random.default_rng(0).uniform(0.4, 0.6, (14, 2))
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    plots._place_labels(figure, axis, [(f"method {k}", tuple(dot), "k", False) for k, dot in enumerate(dots)])
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in axis.texts]
    assert len(boxes) == 14
    assert not any(a.overlaps(b) for k, a in enumerate(boxes) for b in boxes[:k])
    pixels = axis.transData.transform(dots)
    assert not any(box.contains(*dot) for box in boxes for dot in pixels)
