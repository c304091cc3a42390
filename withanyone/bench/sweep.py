"""The slider sweep: one result a position of `similarity` and `diversity`, and the front of the best."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import metrics
from .figures import METRICS
from .generate import SETTINGS_FILE

SCHEMA = "withanyone.bench.sweep/1"
#: What a position is chosen by: as alike as possible while copying as little as possible.
OBJECTIVES = ("sim_gt", "copy_paste")


def sweep_folders(pictures: Path) -> list[Path]:
    """The folders of a sweep under `pictures`, one a position; [] where it is a folder of pictures itself."""
    if (pictures / SETTINGS_FILE).is_file():
        return []
    return sorted(path.parent for path in pictures.glob(f"similarity-*_diversity-*/{SETTINGS_FILE}"))


def make_sweep(method: str, results: Sequence[dict], objectives: Sequence[str] = OBJECTIVES) -> dict:
    """{schema, method, bench, objectives, positions}; a position has its sliders, figures and `on_front`.

    Raises:
        ValueError: a result does not say which position it is of.
    """
    positions = []
    for result in results:
        stamp = result["generation"] or {}
        if stamp.get("similarity") is None or stamp.get("diversity") is None:
            raise ValueError(f"`results` of {result['method']}: no position of the sliders in `generation`.")
        positions.append(
            {
                "similarity": stamp["similarity"],
                "diversity": stamp["diversity"],
                "metrics": result["metrics"],
                "attributes": result["attributes"],
            }
        )
    positions.sort(key=lambda position: (position["similarity"], position["diversity"]))
    points = np.array(
        [
            [position["metrics"]["all"].get(name, {}).get("mean", np.nan) for name in objectives]
            for position in positions
        ]
    )
    front = metrics.pareto_front(points, [METRICS[name].better > 0 for name in objectives])
    for position, flag in zip(positions, front, strict=True):
        position["on_front"] = bool(flag)
    return {
        "schema": SCHEMA,
        "method": method,
        "bench": results[0]["bench"]["name"],
        "cases": results[0]["bench"]["cases"],
        "identity_by": results[0]["identity_by"],
        "objectives": list(objectives),
        "positions": positions,
    }


def is_sweep(path: str | os.PathLike) -> bool:
    """Is this file a sweep.json?"""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return False
    return isinstance(content, dict) and content.get("schema") == SCHEMA


def read_sweep(path: str | os.PathLike) -> dict:
    """A sweep.json. ValueError for what is none."""
    if not is_sweep(path):
        raise ValueError(f"`results` {path} is no sweep: score the folder of `bench generate --sweep`.")
    return json.loads(Path(path).read_text(encoding="utf-8"))
