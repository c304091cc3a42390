"""The claim's rows: data that is checked, steps that are not done twice, figures that say no more than they
are."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.test_train_release import _results
from train import reproduce
from train.config import PHASES, TrainConfig, read_yaml
from train.reproduce import (
    PLAN,
    difference,
    picture_sheet,
    pooled,
    read_plan,
    row_figures,
    table,
    verdict,
    write_config,
    write_table,
)
from withanyone.mini import PRETRAINED


def _plan(tmp_path, **changes):
    values = yaml.safe_load(PLAN.read_text())
    for name in ("validation", "test"):
        values[name]["cases"] = str(tmp_path / f"cases_{name}")
    values.update(out=str(tmp_path / "out"), figures=str(tmp_path / "figures" / "claim"), **changes)
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_the_plan_has_the_rows_of_the_claim():
    plan = read_plan(PLAN)
    rows = {row.name: row for row in plan.rows}
    assert rows["control"].settings == {"paired_ratio": 0.0}
    assert rows["paired"].settings == {"contrastive_loss_weight": 0.0}
    assert rows["in_batch"].settings == {"num_negatives": 0, "in_batch_negatives": True}
    negatives = [rows[name].settings["num_negatives"] for name in ("negatives_16", "negatives_256", "full")]
    assert negatives == [16, 256, 4096]
    assert rows["estimate"].settings["id_landmarks"] == "estimate"
    assert rows["most_similar"].settings["reference_rule"] == "released"
    assert [len(row.seeds) for row in plan.rows] == [3 if r.headline else 1 for r in plan.rows]
    assert {r.name for r in plan.rows if r.headline} == {"control", "paired", "full"}
    # one candidate: what weights do, no choice by likeness
    samplings = {sampling.name: sampling.words for sampling in plan.samplings}
    assert samplings == {"one_candidate": ("--candidates", "1", "--dtype", "auto")}
    assert "--count 400" in plan.test["make"] and "--split validation" in plan.validation["make"]
    shared = read_yaml(PHASES / plan.config)
    assert shared["paired_ratio"] == 0.8  # every row but the control is paired
    first = read_yaml("reproduce_2.yaml")  # and all go on from reconstruction, in the same shards
    assert first["paired_ratio"] == 0 and f"{first['output_dir']}/adapter" == plan.start
    assert first["shards"] == shared["shards"] and f"--out {shared['shards']} " in plan.before["shards"]
    for name in ("id_loss_weight", "contrastive_loss_weight"):  # a fifth of the paper's, both
        assert first[name] == shared[name] == TrainConfig.__dataclass_fields__[name].default / 5


def test_headline_rows_come_first_and_a_part_can_be_asked_for(tmp_path):
    plan = read_plan(_plan(tmp_path))
    runs = [(row.name, seed) for row, seed in plan.runs()]
    assert set(runs[:3]) == {("control", 0), ("paired", 0), ("full", 0)}
    assert len(runs) == len(set(runs)) == 14
    assert [(row.name, seed) for row, seed in plan.runs(["in_batch"])] == [("in_batch", 0)]
    with pytest.raises(ValueError, match="nonsense"):
        list(plan.runs(["nonsense"]))
    with pytest.raises(ValueError, match="`samplings` has no 'two'; known: .*one_candidate"):
        plan.sampling("two")


def test_a_row_with_an_unknown_setting_is_refused(tmp_path):
    rows = yaml.safe_load(PLAN.read_text())["rows"]
    rows["paired"]["settings"] = {"contrastive_weight": 0}
    with pytest.raises(ValueError, match="row paired.*Did you mean `contrastive_loss_weight`"):
        read_plan(_plan(tmp_path, rows=rows))
    with pytest.raises(ValueError, match="lacks or has an entry"):
        read_plan(_plan(tmp_path, colour="red"))


def test_all_rows_share_start_steps_and_data(tmp_path):
    plan = read_plan(_plan(tmp_path), ["max_train_steps=7"])
    configs = {}
    for row, seed in plan.runs():
        values = yaml.safe_load(write_config(plan, row, seed).read_text())
        assert values["init_from"] == plan.start and values["seed"] == seed
        configs[row.name, seed] = values
    own = {"seed", "output_dir"}
    base = configs["full", 0]
    for row in plan.rows:
        differ = {k for k in base.keys() | configs[row.name, 0].keys()
                  if base.get(k) != configs[row.name, 0].get(k)} - own  # fmt: skip
        assert differ <= row.settings.keys() | {"num_negatives"}


class _Commands:
    """Stands for the commands: writes what they would."""

    def __init__(self, sim_gt):
        self.sim_gt, self.calls, self.candidates = sim_gt, [], []

    def __call__(self, *words, threads=None):
        words = [str(word) for word in words]
        self.calls.append(words[2] + (" " + words[3] if words[2].startswith("withanyone") else ""))
        if words[2:4] == ["withanyone.mini", "cases"]:
            Path(words[words.index("--out") + 1]).mkdir(parents=True)
        elif words[2:] == ["train", "--config", "reproduce_2.yaml"]:
            pass
        elif words[2] == "train":
            config = yaml.safe_load(Path(words[4]).read_text())
            folder = Path(config["output_dir"]) / "best"
            folder.mkdir(parents=True)
            (folder / "best.json").write_text(json.dumps({"step": 110}))
        elif words[3] == "generate":
            self.candidates.append(words[words.index("--candidates") + 1])
            Path(words[words.index("--out") + 1]).mkdir(parents=True)
        elif words[3] == "score":
            out = Path(words[words.index("--out") + 1])
            _results(out, self.sim_gt)


def test_the_command_does_everything_once_and_in_pieces(tmp_path, monkeypatch, capsys):
    from train.__main__ import main

    commands = _Commands(0.6)
    monkeypatch.setattr(reproduce, "command", commands)
    monkeypatch.setattr(reproduce, "picture_sheet", lambda plan, sampling: None)  # there are no pictures
    pretrained = tmp_path / "pipeline"
    (pretrained / "vae").mkdir(parents=True)
    (pretrained / "model_index.json").write_text("{}")
    phase = tmp_path / "phase.yaml"
    phase.write_text(yaml.safe_dump({**read_yaml("mini_3.yaml"), "pretrained": str(pretrained)}))
    samplings = {
        "one_candidate": {"title": "one candidate", "generate": ["--candidates", 1]},
        "four_candidates": {"title": "four candidates", "generate": ["--candidates", 4]},
    }
    path = str(_plan(tmp_path, config=str(phase), samplings=samplings))
    main(["reproduce", "--plan", path, "--rows", "control", "full", "--seeds", "0", "--stages", "train"])
    assert "control, seed 0" in capsys.readouterr().out
    # shards and the checkpoint all go on from, both sets of cases, two runs
    assert Counter(commands.calls) == {"withanyone.mini shards": 1, "withanyone.mini cases": 2, "train": 3}
    model = tmp_path / "out" / "full" / "seed_0" / "model"
    assert (model / "vae").is_symlink() and (model / "face_adapter" / "best.json").exists()
    main(["reproduce", "--plan", path, "--samplings", "one_candidate"])
    said = capsys.readouterr().out
    assert commands.calls.count("withanyone.bench score") == 14 and set(commands.candidates) == {"1"}
    assert "## Test pictures with four candidates\n\nNo run is scored yet." in said
    main(["reproduce", "--plan", path])
    said = capsys.readouterr().out
    assert commands.calls.count("withanyone.bench score") == 28 and commands.candidates.count("4") == 14
    assert commands.calls.count("train") == 15
    assert commands.calls.count("withanyone.mini cases") == 2
    before = len(commands.calls)
    main(["reproduce", "--plan", path])
    assert len(commands.calls) == before  # everything is scored: nothing is done again
    assert said.count("reconstruction goes on (control) | 3 | 40 |") == 2 and "No run" not in said
    for suffix in (".json", ".md", ".png"):
        assert (tmp_path / "figures" / f"claim{suffix}").stat().st_size > 500
    summaries = json.loads((tmp_path / "figures" / "claim.json").read_text())["samplings"]
    for summary in summaries.values():
        assert summary["missing"] == []
        assert summary["rows"]["full"]["steps_chosen"] == {"0": 110, "1": 110, "2": 110}
    assert summaries["four_candidates"]["generate"] == ["--candidates", "4"]


def test_a_row_scored_on_other_cases_is_refused(tmp_path):
    plan = read_plan(_plan(tmp_path))
    for row, fingerprint in (("control", "a"), ("full", "b")):
        path = plan.results(plan.row(row), 0, plan.samplings[0])
        path.parent.mkdir(parents=True)
        _results(path, 0.6, fingerprint=fingerprint)
    with pytest.raises(ValueError, match="different cases"):
        write_table(plan)


def test_seeds_are_pooled_by_case():
    rng = np.random.default_rng(0)
    case = rng.normal(size=200)
    seeds = [{(f"{c}", 0, 0): case[c] + 0.1 * rng.normal() for c in range(200)} for _ in range(3)]
    one, three = pooled(seeds[:1]), pooled(seeds)
    assert three["mean"] == pytest.approx(np.mean([list(s.values()) for s in seeds]))
    assert three["low"] < three["mean"] < three["high"]
    width = one["high"] - one["low"]
    # three seeds of one set of cases are no three sets of cases
    assert three["high"] - three["low"] > 0.9 * width
    assert width == pytest.approx(2 * 1.96 * np.std(case) / np.sqrt(200), rel=0.15)
    assert len(three["seeds"]) == 3


def test_rows_are_compared_person_by_person_and_seed_by_seed(monkeypatch):
    monkeypatch.setattr(reproduce, "values_of", lambda result, name: result[name])
    rng = np.random.default_rng(0)
    case = rng.normal(size=200)

    def run(shift):
        return {"sim_gt": {(f"{c}", 0, 0): case[c] + shift + 0.01 * rng.normal() for c in range(200)}}

    first, second = {s: run(0.05 + 0.01 * s) for s in range(3)}, {s: run(0.01 * s) for s in (1, 2, 4)}
    del second[1]["sim_gt"]["7", 0, 0]  # a face that was not found
    found = difference(first, second, "sim_gt")
    assert found["mean"] == pytest.approx(0.05, abs=0.003) and found["n"] == 399
    assert found["seeds"] == pytest.approx([0.05, 0.05], abs=0.005)  # seeds 1 and 2
    assert found["high"] - found["low"] < 0.01  # though the cases themselves lie far apart
    assert difference(first, {9: second[4]}, "sim_gt") is None


def _figure(mean, half=0.01):
    return {"mean": mean, "low": mean - half, "high": mean + half, "seeds": [mean]}


def _row(title, sim_gt, copy_paste, ceiling=0.7):
    figures = {"sim_gt": _figure(sim_gt), "copy_paste": _figure(copy_paste), "ceiling": _figure(ceiling)}
    return {"title": title, "seeds": [0], "cases": 400, **figures,
            "ranked": reproduce.is_ranked(figures, 0.6)}  # fmt: skip


@pytest.mark.parametrize(
    ("control", "full", "said"),
    [
        ((0.6, 0.10), (0.61, 0.04), "The aim is reached."),
        ((0.6, 0.10), (0.59, 0.04), "The aim is not reached."),
        ((0.6, 0.10), (0.61, 0.06), "The aim is not reached."),
        ((0.6, 0.03), (0.61, 0.01), "does not copy enough"),
        ((0.3, 0.10), (0.31, 0.01), "is not ranked"),
    ],
)
def test_the_verdict_says_what_the_figures_say(tmp_path, control, full, said):
    plan = read_plan(_plan(tmp_path))
    rows = {"control": _row("c", *control), "full": _row("f", *full)}
    sentences = " ".join(verdict(rows, plan))
    assert said in sentences
    if said != "The aim is reached.":
        assert "The aim is reached" not in sentences
    shown = table({"rows": rows, "verdict": verdict(rows, plan), "missing": ["x"], "differences": [],
                   "identity_by": ["judge"],
                   "title": "one candidate"})  # fmt: skip
    assert f"{control[1]:+.3f}" in shown and said in shown and "Not yet there: x." in shown


def test_figures_are_those_of_the_bench(tmp_path):
    from withanyone.bench.results import read_results

    results = read_results(_results(tmp_path / "r.json", 0.6))
    figures = row_figures([results])
    assert figures["sim_gt"]["mean"] == pytest.approx(0.6, abs=1e-3)
    assert figures["copy_paste"]["mean"] == pytest.approx(0.1) and figures["ceiling"][
        "mean"
    ] == pytest.approx(0.7)
    assert "copied_glasses" not in figures  # nobody read what these pictures show
    shares = [{"mean": 0.2, "low": 0.1, "high": 0.3}, {"mean": 0.4, "low": 0.3, "high": 0.5}]
    read = [{**results, "attributes": {"all": {"glasses": {"copied": share}}}} for share in shares]
    copied = row_figures(read)["copied_glasses"]
    assert copied["mean"] == pytest.approx(0.3) and copied["seeds"] == [0.2, 0.4]
    assert (copied["low"], copied["high"]) == (0.1, 0.5)


def test_the_sheet_shows_the_same_cases_by_every_row(tmp_path):
    plan = read_plan(_plan(tmp_path))
    sampling = plan.sampling("one_candidate")
    assert picture_sheet(plan, sampling) is None  # nothing is scored
    colours = {"ref_1": "red", "ori": "lime", "control": "blue", "full": "yellow"}
    for case, people in (("0000", 1), ("0001", 2), ("0002", 1), ("0003", 1)):
        folder = Path(plan.test["cases"]) / case
        folder.mkdir(parents=True)
        for name in ("ori", *(f"ref_{i + 1}" for i in range(people))):
            Image.new("RGB", (32, 32), colours.get(name, "black")).save(folder / f"{name}.jpg", quality=95)
        boxes = [[2, 2, 20, 20]] * people
        (folder / "meta.json").write_text(json.dumps({"prompt": "a person", "bboxes": boxes}))
        for row in ("control", "full"):
            if (row, case) == ("full", "0000"):
                continue
            path = plan.results(plan.row(row), 0, sampling)
            (path.parent / "pictures").mkdir(parents=True, exist_ok=True)
            path.touch()
            Image.new("RGB", (32, 32), colours[row]).save(path.parent / "pictures" / f"{case}.png")
    sheet = np.asarray(picture_sheet(plan, sampling, count=2, side=34))
    assert sheet.shape == (16 + 2 * 34, 4 * 34, 3)
    middles = sheet[33::34, 16::34].astype(int)  # of the cells
    near = np.where(middles > 128, 1, 0).tolist()
    red, lime, blue, white, yellow = [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1], [1, 1, 0]
    assert near == [[red, lime, blue, white], [red, lime, blue, yellow]]  # a missing picture leaves its place


@pytest.mark.slow
def test_two_rows_of_two_steps_from_the_miniature_itself(tmp_path):
    """All commands for real, at toy size: two steps of training, three cases."""
    mini = [sys.executable, "-m", "withanyone.mini"]
    shards = tmp_path / "shards"
    sizes = {"identities": 12, "references": 2, "rec-scenes": 8, "cp-scenes": 8, "scenes-per-shard": 8,
             "people-per-shard": 12, "face-pack": PRETRAINED / "face_analyzer"}  # fmt: skip
    words = [str(word) for name, value in sizes.items() for word in (f"--{name}", value)]
    subprocess.run([*mini, "shards", "--out", str(shards), *words], check=True)
    phase = tmp_path / "phase.yaml"
    settings = read_yaml("mini_3.yaml")
    settings.update(
        pretrained=str(PRETRAINED), shards=str(shards), max_train_steps=2, buckets=[[128, 128, 2]],
        lr_warmup_steps=1,
    )  # fmt: skip
    phase.write_text(yaml.safe_dump(settings))
    rows = yaml.safe_load(PLAN.read_text())["rows"]
    out = tmp_path / "out"
    path = _plan(
        tmp_path, config=str(phase), start=str(PRETRAINED / "face_adapter"), headline_seeds=[0], before={},
        rows={name: rows[name] for name in ("control", "full")},
        validation={"cases": str(out / "v"), "count": 1, "every": 1, "metric": "sim_gt",
                    "make": "python -m withanyone.mini cases --split validation --count 1 --out {out}"},
        samplings={"few": {"title": "two steps", "generate": ["--steps", 2]}},
        test={"cases": str(out / "t"), "judges": ["mini"],
              "make": "python -m withanyone.mini cases --split test --count 3 --out {out}"},
    )  # fmt: skip
    command = [sys.executable, "-m", "train.reproduce", "--plan", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "full recipe" in done.stdout
    summary = json.loads((tmp_path / "figures" / "claim.json").read_text())["samplings"]["few"]
    assert set(summary["rows"]) == {"control", "full"} and summary["missing"] == []
    assert all(row["cases"] == 3 and "ceiling" in row for row in summary["rows"].values())
    assert (tmp_path / "figures" / "claim-pictures.jpg").exists()
