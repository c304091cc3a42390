"""What a run says while it goes: `log.jsonl` (a line a step), the screen, `validation.jsonl`."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

LOG, VALIDATION = "log.jsonl", "validation.jsonl"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file; a line cut off by a kill is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    with path.open("a") as stream:
        stream.write(json.dumps(row) + "\n")


def truncate(path: Path, step: int) -> None:
    """Drops the lines of steps after `step`, where the run goes on from."""
    if path.exists():
        kept = [row for row in read_lines(path) if row["step"] <= step]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))


def tracker_kwargs(output_dir: Path) -> dict[str, dict[str, Any]]:
    """What the trackers with runs of their own are started with: a run that goes on is one run there too.

    The run's id is drawn once and kept in `output_dir`.
    """
    path = output_dir / "run_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:8])
    name, run_id = output_dir.resolve().name, path.read_text().strip()
    return {
        "wandb": {"name": name, "id": run_id, "resume": "allow", "dir": str(output_dir)},
        "trackio": {"name": f"{name}-{run_id}", "resume": "allow"},
    }


class Progress:
    """Smoothed values, speed and remaining time, on the screen every `every` steps."""

    def __init__(self, step: int, steps: int, every: int) -> None:
        self.steps, self.every = steps, every
        self.averages: dict[str, float] = {}
        self._clock: deque[tuple[float, int]] = deque([(time.monotonic(), step)], maxlen=20)

    def update(self, step: int, logs: Mapping[str, float], bad: Mapping[str, int]) -> None:
        for name, value in logs.items():
            last = self.averages.get(name, value)
            self.averages[name] = last + 0.05 * (value - last)
        if step % self.every == 0:
            self._report(step, bad)

    def _report(self, step: int, bad: Mapping[str, int]) -> None:
        now = time.monotonic()
        begin, first = self._clock[0]
        self._clock.append((now, step))
        speed = (step - first) / max(now - begin, 1e-9)
        left = (self.steps - step) / max(speed, 1e-9)
        values = " ".join(f"{k} {v:.4g}" for k, v in self.averages.items() if k != "learning_rate")
        logger.info(
            "step %d/%d  %s  %.2f steps/s  %d:%02d left%s",
            step, self.steps, values, speed, left // 60, left % 60,
            f"  passed over: {dict(bad)}" if bad else "",
        )  # fmt: skip
