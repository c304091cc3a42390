"""Checkpoints of a run: safetensors and JSON, written aside and renamed, old ones pruned.

    OUT/checkpoints/step_00001200/   adapter.safetensors, ema.safetensors, optimizer.safetensors, state.json

Only the adapter is in them. Nothing random is: every draw of the run follows from seed and step
(train/data.py).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

logger = logging.getLogger(__name__)

STATE = "state.json"


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded (FSDP2), whole: every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, example: Tensor) -> Tensor:
    """`tensor` on the device of `example`, sharded as that is."""
    if isinstance(example, DTensor):
        tensor = tensor.to(example.device_mesh.device_type)
        return distribute_tensor(tensor, example.device_mesh, example.placements)
    return tensor.to(example.device)


@torch.no_grad()
def load_weights(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copies `tensors` into the module's parameters, sharded or not; the names must be the same."""
    own = dict(module.named_parameters())
    if own.keys() != tensors.keys():
        differ = sorted(own.keys() ^ tensors.keys())
        raise ValueError(f"the checkpoint's weights are not this adapter's: {', '.join(differ[:5])} ...")
    for name, parameter in own.items():
        parameter.copy_(like(tensors[name], parameter))


def flatten_optimizer(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """An optimiser's state as tensors: `<parameter>/<field>`, parameters in the order of `names`."""
    out = {}
    for number, fields in optimizer.state_dict()["state"].items():
        for field, value in fields.items():
            out[f"{names[number]}/{field}"] = whole(torch.as_tensor(value).detach()).cpu().contiguous()
    return out


def restore_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor]) -> None:
    """Puts `flatten_optimizer`'s tensors back; learning rates stay the optimiser's own."""
    numbers = {name: i for i, name in enumerate(names)}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        number = numbers[name]
        if value.shape == parameters[number].shape:
            value = like(value, parameters[number])
        state.setdefault(number, {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def checkpoint_folders(root: Path) -> list[Path]:
    """Finished checkpoints under `root`, oldest first."""
    return sorted(p for p in root.glob("step_*") if p.suffix == "" and (p / STATE).exists())


def begin_checkpoint(root: Path, step: int) -> Path:
    """An empty folder beside the checkpoints, to be filled and then put in its place."""
    partial = root / f"step_{step:08d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def finish_checkpoint(
    partial: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int
) -> Path:
    """Writes `tensors` (file stem -> tensors) and `state` into `partial` and renames it: checkpoint `step`.

    The `keep` newest checkpoints stay.
    """
    root, folder = partial.parent, partial.with_suffix("")
    for stem, group in tensors.items():
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in group.items()}, partial / f"{stem}.safetensors"
        )
    (partial / STATE).write_text(json.dumps({"step": step, **state}, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    for stale in (*checkpoint_folders(root)[:-keep], *root.glob("*.partial")):
        shutil.rmtree(stale, ignore_errors=True)
    return folder


def load_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(file stem -> tensors, state) of a checkpoint folder."""
    if not (folder / STATE).exists():
        raise ValueError(f"`resume_from_checkpoint` {str(folder)!r} is no checkpoint: it has no {STATE}.")
    state = json.loads((folder / STATE).read_text())
    return {p.stem: load_file(p) for p in sorted(folder.glob("*.safetensors"))}, state


def find_checkpoint(root: Path, which: str | None) -> Path | None:
    """The checkpoint to go on from: "latest", a folder, or None (start anew)."""
    if which is None:
        return None
    if which != "latest":
        return Path(which)
    found = checkpoint_folders(root)
    return found[-1] if found else None
