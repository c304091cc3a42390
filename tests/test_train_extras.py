"""What a trainer is expected to have around its steps: caches, schedules, optimisers, trackers, the best
adapter, branches merged."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tests import tiny, tiny_faces
from tests import train_world as tw
from tests.test_train_trainer import _log, _write_case
from train.cache import TensorCache, module_stamp
from train.config import make_config
from train.optim import learning_rate_factor, make_optimizers
from train.runlog import tracker_kwargs
from train.trainer import Trainer, merge_adapters
from train.validation import Best, read_cases, score_case
from withanyone import FaceAdapter


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(shards, pipeline)."""
    folder = tmp_path_factory.mktemp("world")
    pipeline = tw.tiny_pipeline(folder / "pack")
    pipeline.register_to_config(
        sampling_defaults={**pipeline.config.sampling_defaults, "num_inference_steps": 1}
    )
    return tw.write_shards(folder / "shards"), pipeline


def _trainer(world, out, **overrides) -> Trainer:
    return Trainer(make_config(tw.settings(world[0], out, **overrides)), world[1])


# --- caches ----------------------------------------------------------------------------------------------


def test_a_cache_gives_back_what_it_got_and_names_do_not_mix(tmp_path):
    cache = TensorCache(tmp_path)
    assert cache.get("a") is None
    cache.put("a", {"x": torch.arange(3.0), "y": torch.ones(2, 2, dtype=torch.bfloat16)})
    cache.put("b", {"x": torch.zeros(1)})
    found = TensorCache(tmp_path).get("a")
    assert torch.equal(found["x"], torch.arange(3.0)) and found["y"].dtype == torch.bfloat16
    assert not list(tmp_path.rglob("*.partial"))


def test_a_stamp_names_the_weights():
    one, two = nn.Linear(4, 4), nn.Linear(4, 4)
    assert module_stamp(one) != module_stamp(two) and module_stamp(one) == module_stamp(one)
    with torch.no_grad():
        before = module_stamp(one)
        one.bias.add_(1)
    assert module_stamp(one) != before


def test_training_with_caches_on_disk_is_training_without(world, tmp_path, monkeypatch):
    settings = {"max_train_steps": 3, "paired_ratio": 0.5, "cache_dir": str(tmp_path / "c")}
    _trainer(world, tmp_path / "plain", **settings).train()
    cached = {**settings, "cache_latents": True, "cache_text": True}
    _trainer(world, tmp_path / "filling", **cached).train()
    trainer = _trainer(world, tmp_path / "filled", **cached)

    def refuse(*args, **kwargs):
        raise AssertionError("everything is in the cache")

    monkeypatch.setattr(trainer.frozen, "_encode_pixels", refuse)
    monkeypatch.setattr(trainer.pipeline, "encode_prompt", refuse)
    trainer.train()
    for name in ("filling", "filled"):
        for a, b in zip(_log(tmp_path / "plain"), _log(tmp_path / name), strict=True):
            assert a == pytest.approx(b, rel=1e-5)


# --- optimisers and schedules ----------------------------------------------------------------------------


def test_adamw8bit_without_bitsandbytes_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="bitsandbytes.*pip install"):
        make_optimizers(make_config({"optimizer": "adamw8bit"}), nn.Linear(2, 2))


def test_adamw8bit_is_bitsandbytes_where_it_is_installed(monkeypatch):
    made = []

    class AdamW8bit(torch.optim.AdamW):
        def __init__(self, parameters, **settings):
            made.append(settings)
            super().__init__(parameters, **settings)

    module = SimpleNamespace(optim=SimpleNamespace(AdamW8bit=AdamW8bit), __spec__=object())
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)
    ((optimizer, names),) = make_optimizers(make_config({"optimizer": "adamw8bit"}), nn.Linear(2, 2))
    assert isinstance(optimizer, AdamW8bit) and names == ["weight", "bias"]
    assert made == [{"lr": 1e-4, "betas": (0.9, 0.999), "weight_decay": 0.01}]


def test_the_fused_optimiser_steps_as_the_plain_one_does():
    results = []
    for name in ("adamw", "adamw_fused"):
        torch.manual_seed(0)
        net = nn.Linear(3, 3)
        ((optimizer, _),) = make_optimizers(make_config({"optimizer": name, "learning_rate": 0.1}), net)
        net(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
        results.append(net.weight.detach())
    torch.testing.assert_close(*results)


def test_schedules_follow_their_formulas():
    def factor(step, **settings):
        values = {"lr_warmup_steps": 10, "max_train_steps": 100, "lr_end_share": 0.2, **settings}
        return learning_rate_factor(make_config(values), step)

    for name in ("constant", "linear", "cosine", "inverse_sqrt", "wsd"):
        assert factor(4, lr_scheduler=name, lr_decay_steps=10) == pytest.approx(0.5, rel=0.05)
    assert factor(50, lr_scheduler="linear") == pytest.approx(0.2 + 0.8 * 0.5)
    assert factor(100, lr_scheduler="linear") == pytest.approx(0.2)
    assert factor(39, lr_scheduler="inverse_sqrt") == pytest.approx(0.5)
    wsd = {"lr_scheduler": "wsd", "lr_decay_steps": 20}
    assert factor(79, **wsd) == 1.0 and factor(90, **wsd) == pytest.approx(0.2 + 0.8 * 0.5)
    assert factor(100, **wsd) == pytest.approx(0.2)


# --- branches --------------------------------------------------------------------------------------------


def test_branches_trained_apart_are_merged(world, tmp_path):
    for branch in ("arc", "sig"):
        trainer = _trainer(world, tmp_path / branch, branches=branch, max_train_steps=1, adapter_inner_dim=64)
        trainer.train()
    folders = [str(tmp_path / branch / "adapter") for branch in ("arc", "sig")]
    merged = merge_adapters(*folders)
    assert merged.branches == ("arc", "sig")
    for folder in folders:
        for name, value in FaceAdapter.from_pretrained(folder).state_dict().items():
            assert torch.equal(merged.state_dict()[name], value)
    both = _trainer(world, tmp_path / "both", merge_from=folders, max_train_steps=1)
    assert all(torch.equal(v, merged.state_dict()[k]) for k, v in both.adapter.state_dict().items())
    both.train()
    from train.__main__ import main

    main(["merge", "--arc", folders[0], "--sig", folders[1], "--out", str(tmp_path / "merged")])
    loaded = FaceAdapter.from_single_file(tmp_path / "merged" / "withanyone.safetensors")
    assert all(torch.equal(v, merged.state_dict()[k]) for k, v in loaded.state_dict().items())
    with pytest.raises(ValueError, match="the adapter for arc has the branches"):
        merge_adapters(folders[1], folders[0])


def test_adapters_of_other_sizes_are_not_merged(tmp_path):
    tiny.face_adapter(branches=("arc",)).save_pretrained(tmp_path / "arc")
    tiny.face_adapter(branches=("sig",), inner_dim=128).save_pretrained(tmp_path / "sig")
    with pytest.raises(ValueError, match="differ in inner_dim"):
        merge_adapters(tmp_path / "arc", tmp_path / "sig")


# --- validation ------------------------------------------------------------------------------------------


def test_the_best_adapter_is_the_one_with_the_best_number(tmp_path):
    best = Best(tmp_path / "best", "copy_paste", min_sim_gt=0.3)
    adapters = [tiny.face_adapter(seed=i) for i in range(4)]
    rows = [{"sim_gt": 0.4, "copy_paste": 0.2}, {"sim_gt": 0.1, "copy_paste": 0.0},
            {"sim_gt": 0.5, "copy_paste": 0.1}, {"sim_gt": 0.9, "copy_paste": 0.15}]  # fmt: skip
    kept = []
    for step, (adapter, row) in enumerate(zip(adapters, rows, strict=True)):
        if best.is_better(row):
            best.keep(adapter, step, row)
            kept.append(step)
    assert kept == [0, 2]  # 1 is blind to faces, 3 copies more
    loaded = FaceAdapter.from_pretrained(tmp_path / "best").state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in adapters[2].state_dict().items())
    again = Best(tmp_path / "best", "copy_paste")
    assert again.row["step"] == 2 and not again.is_better({"sim_gt": 0.5, "copy_paste": 0.1})
    assert Best(tmp_path / "none", "sim_gt").is_better({"sim_gt": 0.0})
    assert not Best(tmp_path / "none", None).is_better({"sim_gt": 1.0})


def test_pictures_of_several_people_have_a_blending(world, tmp_path):
    folder = tmp_path / "cases" / "0"
    folder.mkdir(parents=True)
    boxes = [[8, 8, 52, 52], [72, 8, 116, 52]]
    painted = tiny_faces.blank(128, 64)
    for number, (box, identity) in enumerate(zip(boxes, (1, 4), strict=True), 1):
        painted = tiny_faces.paint_face(painted, box, identity)
        photo = tiny_faces.paint_face(tiny_faces.blank(64, 64), (8, 8, 52, 52), identity)
        photo.save(folder / f"ref_{number}.jpg", quality=95)
    painted.save(folder / "ori.jpg", quality=95)
    (folder / "meta.json").write_text(json.dumps({"prompt": "b", "bboxes": boxes}))
    (case,) = read_cases(tmp_path / "cases", 1)
    rows = score_case(world[1], case, painted)
    analyzer = world[1].face_analyzer
    a, b = (face.normed_embedding for face in sorted(analyzer.detect(painted), key=lambda f: f.bbox[0]))
    r, q = (analyzer.detect(photo)[0].normed_embedding for photo in case.references)
    assert len(rows) == 2 and rows[0]["sim_gt"] > 0.8
    assert rows[0]["blending"] == pytest.approx(float(np.mean([a @ q, b @ r])), abs=1e-4)
    (alone,) = score_case(world[1], _one(case), painted)
    assert "blending" not in alone


def _one(case):
    from dataclasses import replace

    return replace(case, bboxes=case.bboxes[:1], references=case.references[:1])


def _scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return read.Tags()["scalars"]


def test_validation_goes_to_the_tracker_with_pictures_and_the_best_adapter_is_kept(world, tmp_path):
    _write_case(tmp_path / "cases" / "0")
    trainer = _trainer(
        world, tmp_path / "out", max_train_steps=2, validation_steps=1, report_to=["tensorboard"],
        validation_cases=str(tmp_path / "cases"), best_metric="sim_gt",
    )  # fmt: skip
    trainer.train()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folders = {path.parent for path in (tmp_path / "out").rglob("events.out.tfevents.*")}
    (events,) = (folder for folder in folders if "loss" in _scalars(folder))
    read = EventAccumulator(str(events))
    read.Reload()
    tags = read.Tags()
    assert {"loss", "id_loss", "learning_rate", "validation/sim_gt", "validation/found"} <= set(
        tags["scalars"]
    )
    assert [event.step for event in read.Scalars("validation/sim_gt")] == [1, 2]
    assert tags["images"]
    losses = [event.value for event in read.Scalars("loss")]
    assert losses == pytest.approx([row["loss"] for row in _log(tmp_path / "out")], rel=1e-6)
    best = json.loads((tmp_path / "out" / "best" / "best.json").read_text())
    assert best["step"] == 1  # a random model paints no face: nothing is better than the first
    FaceAdapter.from_pretrained(tmp_path / "out" / "best")


def test_trackio_has_one_run_with_pictures_whatever_stops_it(world, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read at its import, here
    from trackio.sqlite_storage import SQLiteStorage

    _write_case(tmp_path / "cases" / "0")
    for steps in (1, 2):  # the same command with more steps goes on
        _trainer(
            world, tmp_path / "out", max_train_steps=steps, validation_steps=1, report_to=["trackio"],
            validation_cases=str(tmp_path / "cases"),
        ).train()  # fmt: skip
    (run,) = SQLiteStorage.get_runs("withanyone")
    assert run.startswith("out-")
    rows = SQLiteStorage.get_logs("withanyone", run)
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert losses == pytest.approx({row["step"]: row["loss"] for row in _log(tmp_path / "out")})
    pictures = [row["validation/pictures"] for row in rows if "validation/pictures" in row]
    assert len(pictures) == 2 and len(list((tmp_path / "trackio").rglob("*.png"))) == 2
    assert [row["step"] for row in rows if "validation/sim_gt" in row] == [1, 2]


def test_a_run_that_goes_on_is_one_run_to_its_trackers(tmp_path):
    first = tracker_kwargs(tmp_path)
    assert tracker_kwargs(tmp_path) == first
    assert first["wandb"]["resume"] == first["trackio"]["resume"] == "allow"
    (tmp_path / "other").mkdir()
    assert tracker_kwargs(tmp_path / "other")["wandb"]["id"] != first["wandb"]["id"]


def test_a_validation_that_a_stop_prevented_is_made_up_for(world, tmp_path, monkeypatch):
    """Stopped between a checkpoint and its validation: the same command validates first."""
    _write_case(tmp_path / "cases" / "0")
    settings = {"max_train_steps": 4, "checkpointing_steps": 2, "validation_steps": 2,
                "validation_cases": str(tmp_path / "cases")}  # fmt: skip
    broken = _trainer(world, tmp_path / "out", **settings)

    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr(broken, "_validate", stop)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    _trainer(world, tmp_path / "out", **settings).train()
    lines = (tmp_path / "out" / "validation.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]


def test_a_tracker_that_is_not_installed_is_an_error(world, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None)
    with pytest.raises(ValueError, match="`report_to` names trackio"):
        _trainer(world, tmp_path, report_to=["trackio"])


def test_streamed_training_goes_on_as_if_it_had_not_stopped(world, tmp_path, monkeypatch):
    settings = {"streaming": True, "stream_lanes": 1, "stream_shuffle": 5, "paired_ratio": 0.5,
                "max_train_steps": 5, "checkpointing_steps": 2}  # fmt: skip
    _trainer(world, tmp_path / "whole", **settings).train()
    broken = _trainer(world, tmp_path / "parts", **settings)
    step, calls = broken._optimizer_step, iter(range(9))

    def stop_in_the_fourth(batches):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return step(batches)

    monkeypatch.setattr(broken, "_optimizer_step", stop_in_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    _trainer(world, tmp_path / "parts", **settings).train()
    assert _log(tmp_path / "parts") == _log(tmp_path / "whole")
    assert Path(tmp_path / "parts" / "adapter" / "config.json").exists()


def test_too_many_damaged_records_on_the_way_stop_the_run(world, tmp_path):
    trainer = _trainer(world, tmp_path, max_bad_share=0.1)
    trainer._count_reads(SimpleNamespace(positions=[0] * 180, bad=["bad_image"] * 19))  # 199 reads: too few
    trainer._count_reads(SimpleNamespace(positions=[0] * 100, bad=["reference_dropped"] * 50))
    with pytest.raises(ValueError, match=r"`shards`: 40 of 370 .*max_bad_share.*'bad_image': 40"):
        trainer._count_reads(SimpleNamespace(positions=[], bad=["bad_image"] * 21))


def test_preparing_a_streamed_run_reads_no_records(world, tmp_path, capsys):
    import yaml

    from train.__main__ import main

    settings = tw.settings(world[0], tmp_path / "out", streaming=True, cache_dir=str(tmp_path / "c"))
    (tmp_path / "phase.yaml").write_text(yaml.safe_dump(settings))
    main(["prepare", "--config", str(tmp_path / "phase.yaml")])
    assert "bank: 24 photos of 6 people" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "c").iterdir() if path.suffix != ".lock"] == ["bank"]
    main(["prepare", "--config", str(tmp_path / "phase.yaml"), "streaming=false"])
    assert "rec: 24 records" in capsys.readouterr().out
