"""Whole processes: `kill -9`, several processes, FSDP2 over gloo, accelerate's configuration files."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests import tiny
from tests import train_world as tw
from tests.test_train_trainer import _log, _write_case


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(shards, pipeline)."""
    folder = tmp_path_factory.mktemp("world")
    return tw.write_shards(folder / "shards", people=16, photos=3), tw.tiny_pipeline(folder / "pack")


@pytest.fixture(scope="module")
def pretrained(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    world[1].register_modules(face_adapter=None)
    world[1].save_pretrained(folder)
    return folder


def _phase(world, pretrained, tmp_path, out, **overrides):
    values = tw.settings(world[0], out, pretrained=str(pretrained), **overrides)
    path = tmp_path / f"{out.name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def _start(*args, module="train", processes=1):
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port",
              str(random.randint(20000, 40000))] if processes > 1 else []  # fmt: skip
    return subprocess.Popen(
        [sys.executable, *launch, "-m", module, *map(str, args)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def _run(*args, **kwargs) -> str:
    process = _start(*args, **kwargs)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
def test_five_kills_at_random_moments_change_nothing(world, pretrained, tmp_path):
    """`kill -9` anywhere: in a step, while a checkpoint is written, while the run is being set up."""
    settings = {"max_train_steps": 40, "checkpointing_steps": 3, "paired_ratio": 0.5, "optimizer": "muon",
                "cache_latents": True, "cache_text": True}  # fmt: skip
    begin = time.monotonic()
    _run("--config", _phase(world, pretrained, tmp_path, tmp_path / "whole", **settings))
    length = time.monotonic() - begin
    parts = _phase(world, pretrained, tmp_path, tmp_path / "parts", **settings)
    log = tmp_path / "parts" / "log.jsonl"
    rng = random.Random(time.time_ns())
    steps_at_kill = []
    for kill in range(5):
        process = _start("--config", parts)
        # a random moment: some steps into what is left, and a little later
        behind = len(log.read_text().splitlines()) if log.exists() else 0
        after = behind + rng.randrange(0, max(1, (38 - behind) // (5 - kill)))
        deadline = time.monotonic() + 20 + 2 * length
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and len(log.read_text().splitlines()) > after:
                break
            time.sleep(0.005)
        time.sleep(rng.random() * 0.2)
        process.kill()
        process.communicate()
        steps_at_kill.append(len(log.read_text().splitlines()) if log.exists() else 0)
    output = _run("--config", parts)
    assert "going on from" in output, steps_at_kill
    assert _log(tmp_path / "parts") == _log(tmp_path / "whole"), steps_at_kill
    assert len(_log(tmp_path / "whole")) == 40
    assert "is finished, passed over" in _run("--config", parts)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(world, pretrained, tmp_path):
    # Adam's first step is a gradient's sign: the learning rate keeps what rounding does to tiny ones small
    settings = {"max_train_steps": 4, "paired_ratio": 0.5, "id_faces_per_step": 64, "learning_rate": 1e-5}
    for name, processes in (("one", 1), ("two", 2)):
        phase = _phase(world, pretrained, tmp_path, tmp_path / name, **settings)
        _run("--config", phase, processes=processes)
    _same_losses(tmp_path / "one", tmp_path / "two")


def _same_losses(one, two):
    for a, b in zip(_log(one), _log(two), strict=True):
        for name in ("loss", "diffusion_loss", "id_loss", "id_contrastive_loss"):
            assert a[name] == pytest.approx(b[name], abs=1e-5), (a["step"], name)
    assert _log(one)[0]["grad_norm"] == pytest.approx(_log(two)[0]["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_fsdp2_on_two_processes_has_the_gradients_of_one(world, pretrained, tmp_path):
    adapter = tiny.face_adapter(to_out_std=0.1)
    adapter.save_pretrained(tmp_path / "adapter")
    phase = _phase(world, pretrained, tmp_path, tmp_path / "run", id_faces_per_step=64, paired_ratio=0.5,
                   init_from=str(tmp_path / "adapter"))  # fmt: skip
    _run("gradients", phase, tmp_path / "one.safetensors", module="tests.train_ranks")
    _run("gradients", phase, tmp_path / "two.safetensors", "shard", module="tests.train_ranks", processes=2)
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert sum(g.abs().max() > 0 for g in one.values()) > 50
    assert one.keys() <= two.keys()
    for name, gradient in two.items():
        expected = one.get(name, torch.zeros_like(gradient))
        # rounding goes with the terms of a sum, not with what is left of them: some CPUs' kernels round more
        atol = max(1e-6, 1e-4 * expected.abs().max().item())
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=atol, msg=name)


@pytest.mark.slow
def test_fsdp2_trains_validates_and_goes_on_as_one_process_does(world, pretrained, tmp_path):
    _write_case(tmp_path / "cases" / "0")
    settings = {"max_train_steps": 4, "paired_ratio": 0.5, "id_faces_per_step": 64, "learning_rate": 1e-5,
                "checkpointing_steps": 2, "validation_cases": str(tmp_path / "cases"), "validation_steps": 2,
                "best_metric": "sim_gt"}  # fmt: skip
    for name, more, processes in (("one", [], 1), ("two", ["shard"], 2)):
        phase = _phase(world, pretrained, tmp_path, tmp_path / name, **settings)
        run = ["train", phase, "-", *more]
        _run(*run, "max_train_steps=2", module="tests.train_ranks", processes=processes)
        output = _run(*run, module="tests.train_ranks", processes=processes)
        assert len(_log(tmp_path / name)) == 4, output
    _same_losses(tmp_path / "one", tmp_path / "two")
    one, two = (load_file(tmp_path / n / "withanyone.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-4)
    assert (tmp_path / "two" / "best" / "best.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_two_processes_see_every_sample_of_an_epoch_once_also_behind_a_resume(
    world, pretrained, tmp_path, streaming
):
    """Two processes; half an epoch with one worker each, the rest with two."""
    shards = tmp_path / "shards"
    for shard in range(4):
        made = {f"{shard}{k}": tw.record([k], 10 * shard + k, named=False) for k in range(4)}
        tw.write_tar(shards / "train_rec" / f"{shard}.tar", tw.flat(made))
    phase = _phase(
        (shards, None), pretrained, tmp_path, tmp_path / "run", streaming=streaming, stream_lanes=4,
        stream_shuffle=3, contrastive_loss_weight=0.0,
    )  # fmt: skip
    out, seen = tmp_path / "seen.json", []
    for start, count, workers in ((0, 2, 1), (2, 2, 2)):  # batches of 4: 16 samples are an epoch
        _run("keys", phase, out, start, count, workers, module="tests.train_ranks", processes=2)
        ranks = json.loads(out.read_text())["seen"]
        assert [len(batch) for rank in ranks for batch in rank] == [2, 2, 2, 2]
        seen += [key for rank in ranks for batch in rank for key in batch]
    assert len(seen) == len(set(seen)) == 16
