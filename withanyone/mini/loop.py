"""A training loop that can be stopped at any point and goes on exactly where it was.

Data is drawn from generators seeded by (seed, step), so model, optimiser and step number are all there is to
save: the same command again continues bit for bit, and a run in one go equals a run in two.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.safetensors"


def step_rng(seed: int, step: int) -> tuple[np.random.Generator, torch.Generator]:
    """The random numbers of one step, whatever was drawn before it."""
    rng = np.random.default_rng((seed, step))
    return rng, torch.Generator().manual_seed(int(rng.integers(2**62)))


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100, floor: float = 0.01) -> float:
    """Linear warm-up, then half a cosine down to `floor` of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share)))


class TrainingLoop:
    """Iterates over the steps that are left; loads, saves and reports on the way.

    Args:
        folder: where `checkpoint.safetensors` lives.
        steps: the whole run's number of steps, earlier parts counted in.
        modules: what is trained, by name.
        optimizer: its state is saved with the modules; its settings are the caller's (set them each step).
        config: what defines the run. A checkpoint of another config is refused.
        save_seconds: time between two checkpoints.
        writes: whether this process saves and reports; of several that train together, one does.

    Raises:
        ValueError: the folder holds a checkpoint of a run with another config.
    """

    def __init__(
        self,
        folder: str | Path,
        steps: int,
        modules: Mapping[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        config: Mapping[str, object],
        *,
        save_seconds: float = 120.0,
        log_seconds: float = 20.0,
        writes: bool = True,
    ) -> None:
        self.folder = Path(folder)
        self.steps = steps
        self.modules = dict(modules)
        self.optimizer = optimizer
        self.config = json.loads(json.dumps({**config, "steps": steps}))
        self.save_seconds = save_seconds
        self.log_seconds = log_seconds
        self.writes = writes
        self.step = 0
        self.averages: dict[str, float] = {}
        self.elapsed = 0.0
        if (self.folder / CHECKPOINT).exists():
            self.load()

    def __iter__(self) -> Iterator[int]:
        started, first = time.monotonic(), self.step
        before = self.elapsed
        saved = logged = started
        while self.step < self.steps:
            yield self.step
            self.step += 1
            now = time.monotonic()
            self.elapsed = before + now - started
            if self.writes and now - logged >= self.log_seconds:
                logged = now
                per_step = (now - started) / (self.step - first)
                values = " ".join(f"{name} {value:.4g}" for name, value in self.averages.items())
                left = per_step * (self.steps - self.step) / 60
                logger.info(
                    "%s: step %d of %d, %s, %.0f ms a step, %.1f minutes left",
                    self.folder.name, self.step, self.steps, values, per_step * 1e3, left,
                )  # fmt: skip
            if now - saved >= self.save_seconds:
                saved = now
                self.save()
        self.save()

    def log(self, **values: float) -> None:
        """Keeps a running average of each value for the progress line."""
        for name, value in values.items():
            self.averages[name] = 0.98 * self.averages.get(name, value) + 0.02 * value

    def save(self) -> None:
        """Writes the checkpoint; the old one stays until the new one is whole."""
        if not self.writes:
            return
        tensors: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            tensors |= {f"{name}/{key}": value for key, value in module.state_dict().items()}
        for index, entry in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{key}": value for key, value in entry.items()}
        tensors = {name: value.detach().contiguous().clone() for name, value in tensors.items()}
        metadata = {
            "config": json.dumps(self.config),
            "step": str(self.step),
            "elapsed": repr(self.elapsed),
            "averages": json.dumps(self.averages),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / (CHECKPOINT + ".partial")
        save_file(tensors, partial, metadata=metadata)
        os.replace(partial, self.folder / CHECKPOINT)

    def load(self) -> None:
        """Takes up the run of the folder's checkpoint."""
        path = self.folder / CHECKPOINT
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            config = json.loads(metadata["config"])
            if config != self.config:
                names = sorted(config.keys() | self.config.keys())
                changed = [f"{n}: {config.get(n)} there, {self.config.get(n)} now" for n in names
                           if config.get(n) != self.config.get(n)]  # fmt: skip
                raise ValueError(
                    f"`folder` {self.folder} holds a run with other settings ({'; '.join(changed)}): give "
                    "the same settings to continue it, or another folder to start anew"
                )
            groups: dict[str, dict[str, Tensor]] = {}
            for key in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                owner, _, name = key.partition("/")
                groups.setdefault(owner, {})[name] = file.get_tensor(key)
        for name, module in self.modules.items():
            module.load_state_dict(groups[name], strict=True)
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in groups.get("optimizer", {}).items():
            index, _, name = key.partition("/")
            state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.step = int(metadata["step"])
        self.elapsed = float(metadata["elapsed"])
        self.averages = json.loads(metadata["averages"])
        logger.info("%s: going on from step %d of %d", self.folder, self.step, self.steps)
