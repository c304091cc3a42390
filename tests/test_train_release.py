"""Releases: a repository that says everything, and nothing pushed while a check fails."""

from __future__ import annotations

import json
import shutil

import huggingface_hub
import pytest
import torch
import yaml
from PIL import Image

from tests import tiny
from tests.hub_store import HubStore
from train.checkpoints import begin_checkpoint, finish_checkpoint
from train.config import dump_config, make_config
from train.release import TEMPLATE, Facts, build, fill_card, problems, push
from withanyone import FaceAdapter
from withanyone.bench.results import SCHEMA

FACTS = Facts("Painted people", "Painted rectangles, anybody's.", "apache-2.0", "org/base")


def _results(path, sim_gt: float, cases: int = 40, fingerprint: str = "f"):
    """A results.json of one person a case, its Sim(GT) about `sim_gt`."""
    rows = []
    for case in range(cases):
        value = sim_gt + 0.01 * (case % 3 - 1)
        scores = {"judge": {"sim_gt": value, "sim_ref": 0.5, "copy_paste": 0.1, "ceiling": 0.7}}
        person = {"found": True, "truth": True, "in_box": None, "scores": scores, "pose": None,
                  "pose_target": None, "pose_reference": None, "read": None, "asked": None}  # fmt: skip
        picture = {"people": [person], "values": {}, "blending": {}, "extra_faces": 0}
        rows.append({"case": f"{case:03d}", "num_persons": 1, "pictures": [picture]})
    figure = {"mean": sim_gt, "low": sim_gt - 0.01, "high": sim_gt + 0.01, "n": cases, "cases": cases}
    results = {
        "schema": SCHEMA, "method": "m", "identity_by": ["judge"], "judges": {"judge": "1"},
        "bench": {"name": "painted", "cases": cases, "world": "painted", "fingerprint": fingerprint},
        "settings": {"min_yaw_change": 0.1, "bootstrap": {"level": 0.95, "resamples": 200, "seed": 0}},
        "metrics": {"all": {"sim_gt": figure}, "single": {"sim_gt": figure}, "multi": {}},
        "problems": {}, "rows": rows, "environment": {}, "attributes": None,
    }  # fmt: skip
    path.write_text(json.dumps(results))
    return path


@pytest.fixture
def run(tmp_path):
    """A finished run's folder."""
    folder = tmp_path / "run"
    adapter = tiny.face_adapter(to_out_std=0.1)
    adapter.save_pretrained(folder / "adapter")
    config = make_config(
        {"pretrained": str(tmp_path / "base"), "output_dir": str(folder), "shards": "MultiID-2M"}
    )
    (tmp_path / "base").mkdir()
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "samples").mkdir()
    for step in (100, 200):
        Image.new("RGB", (32, 16), (step, 0, 0)).save(folder / "samples" / f"step_{step:08d}.png")
    tensors = {"adapter": adapter.state_dict(), "ema": {k: v + 1 for k, v in adapter.state_dict().items()}}
    state = {"adapter_config": {k: v for k, v in adapter.config.items() if not k.startswith("_")}}
    finish_checkpoint(begin_checkpoint(folder / "checkpoints", 200), 200, tensors, state, 1)
    return folder


def _release(run, tmp_path, **more):
    results = _results(tmp_path / "results.json", 0.6)
    return build(run, tmp_path / "out", FACTS, results=results, dtype=torch.float32, **more)


def test_a_release_holds_the_adapter_in_both_layouts_and_a_card_that_says_everything(run, tmp_path):
    out = _release(run, tmp_path)
    assert problems(out) == []
    own = FaceAdapter.from_pretrained(run / "adapter").state_dict()
    for adapter in (
        FaceAdapter.from_pretrained(out),
        FaceAdapter.from_single_file(out / "withanyone.safetensors"),
    ):
        assert all(torch.equal(adapter.state_dict()[k], v) for k, v in own.items())
    card = (out / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "apache-2.0" and head["base_model"] == "org/base"
    assert "Painted rectangles" in card and "| Sim(GT) | 0.600 [0.590, 0.610]" in card
    assert "| `num_negatives` | `4096` |" in card and "samples/step_00000200.png" in card
    assert str(tmp_path) not in card + (out / "training.yaml").read_text()
    assert yaml.safe_load((out / "training.yaml").read_text())["pretrained"] == "base"
    assert (out / "samples" / "step_00000200.png").exists()


def test_a_checkpoints_average_can_be_released(run, tmp_path):
    out = _release(run, tmp_path, which="step_00000200")
    own = FaceAdapter.from_pretrained(run / "adapter").state_dict()
    made = FaceAdapter.from_pretrained(out).state_dict()
    assert all(torch.equal(made[k], v + 1) for k, v in own.items())
    with pytest.raises(ValueError, match="best"):
        build(run, tmp_path / "other", FACTS, which="best")


def _break_weights(out):
    adapter = FaceAdapter.from_pretrained(out)
    next(adapter.parameters()).data[0] = float("nan")
    adapter.save_pretrained(out)


def _silence(out):
    adapter = FaceAdapter.from_pretrained(out)
    for attention in adapter.attentions("arc"):
        attention.to_out.weight.data.zero_()
    adapter.save_pretrained(out)
    adapter.save_single_file(out / "withanyone.safetensors")


DAMAGE = {
    "not finite": _break_weights,
    "different weights": _break_weights,
    "without any effect": _silence,
    "cannot be loaded": lambda out: (out / "withanyone.safetensors").write_bytes(b"x"),
    "does not belong": lambda out: (out / "weights.pkl").write_bytes(b"x"),
    "marks of the template": lambda out: (out / "README.md").write_text("---\nlicense: mit\n---\n{{data}}"),
    "does not give the licence": lambda out: (out / "README.md").write_text("no head"),
    "no card": lambda out: (out / "README.md").unlink(),
    "not there": lambda out: shutil.rmtree(out / "samples"),
    "local path": lambda out: (out / "training.yaml").write_text("shards: /home/me/photos/x\n"),
    "no figures": lambda out: (out / "results.json").unlink(),
    "cannot be judged": lambda out: (out / "results.json").write_text("{}"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_nothing_is_pushed_while_a_check_fails(run, tmp_path, monkeypatch, what):
    out = _release(run, tmp_path)
    DAMAGE[what](out)
    store = HubStore(tmp_path / "hub", monkeypatch)
    with pytest.raises(ValueError, match=f"(?s)nothing was pushed.*{what}"):
        push(out, "org/model")
    assert store.calls == []


def test_the_gate_refuses_what_is_worse_than_the_baseline(run, tmp_path, monkeypatch):
    out = _release(run, tmp_path)
    better, same, other = (
        _results(tmp_path / "better.json", 0.7), _results(tmp_path / "same.json", 0.6),
        _results(tmp_path / "other.json", 0.6, fingerprint="g"),
    )  # fmt: skip
    assert problems(out, same) == []
    assert any("worse than the baseline: all.sim_gt" in line for line in problems(out, better))
    assert any("other cases" in line for line in problems(out, other))
    store = HubStore(tmp_path / "hub", monkeypatch)
    with pytest.raises(ValueError, match="worse than the baseline"):
        push(out, "org/model", baseline=better)
    assert store.calls == []


def test_a_checked_release_is_pushed_as_asked(run, tmp_path, monkeypatch):
    out = _release(run, tmp_path)
    store = HubStore(tmp_path / "hub", monkeypatch)
    branches = []
    monkeypatch.setattr(
        huggingface_hub, "create_branch", lambda repo, **kwargs: branches.append(kwargs["branch"])
    )
    push(out, "org/model", private=True, revision="v2", token="t")
    created, uploaded = store.calls
    assert (
        created[:2] == ("create_repo", "org/model") and created[2]["private"] and created[2]["token"] == "t"
    )
    assert uploaded[0] == "upload_folder" and uploaded[2]["revision"] == "v2" and branches == ["v2"]
    assert not uploaded[2]["create_pr"]
    push(out, "org/model", create_pr=True)
    assert store.calls[-1][2]["create_pr"] and branches == ["v2"]
    assert "README.md" in store.files("org/model") and "withanyone.safetensors" in store.files("org/model")
    loaded = FaceAdapter.from_pretrained("org/model")
    own = FaceAdapter.from_pretrained(run / "adapter").state_dict()
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in own.items())


def test_the_command_builds_and_says_what_is_missing(run, tmp_path, capsys):
    from train.__main__ import main

    main(
        [
            "release",
            str(run),
            "--out",
            str(tmp_path / "out"),
            "--name",
            "n",
            "--data",
            "d",
            "--licence",
            "mit",
        ]
    )
    assert "there are no figures" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(
            [
                "release",
                str(run),
                "--out",
                str(tmp_path / "o2"),
                "--name",
                "n",
                "--data",
                " ",
                "--licence",
                "mit",
            ]
        )
    assert "`data` is empty" in capsys.readouterr().err


def test_a_template_with_an_unknown_mark_is_refused():
    with pytest.raises(ValueError, match="colour"):
        fill_card(TEMPLATE.read_text() + "{{colour}}", FACTS, {}, tiny.face_adapter(), None, [])
