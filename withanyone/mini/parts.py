"""What the commands that train the miniature's parts share: arguments, folders, figures."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from withanyone import FaceAdapter

from . import PRETRAINED

logger = logging.getLogger(__name__)

RUNS = Path("runs/mini")


def add_part_arguments(parser: argparse.ArgumentParser, part: str, steps: int) -> None:
    """--out, --pretrained, --steps, --seed and --threads, the same for every part that is trained."""
    parser.add_argument(
        "--out", type=Path, default=RUNS / part, help="checkpoints; the same command resumes there"
    )
    parser.add_argument("--pretrained", type=Path, default=PRETRAINED, help="pipeline folder to export into")
    parser.add_argument("--steps", type=int, default=steps, help="length of the whole run (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)


def start_part(args: argparse.Namespace) -> None:
    """Sets the number of threads and makes the folder of the run."""
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)


def command_line() -> str:
    """The command that is running, as one would type it."""
    return " ".join(["python -m withanyone.mini", *sys.argv[1:]])


def write_figures(pretrained: Path, part: str, figures: Mapping[str, object]) -> None:
    """Prints a part's held-out figures and keeps them beside the weights, with the command that gave them."""
    path = Path(pretrained) / "figures" / f"{part}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"command": command_line(), **figures}, indent=2)
    path.write_text(text + "\n")
    logger.info("%s", text)


def save_half(model: PreTrainedModel, folder: Path) -> None:
    """Saves a transformers model in half precision, to be loaded in full unless a dtype is asked for.

    transformers takes the dtype from the config, diffusers float32: a pipeline needs both to be the same.
    """
    copied = type(model)(model.config)
    copied.load_state_dict(model.state_dict())
    copied.half().save_pretrained(folder)
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text()) | {"dtype": "float32"}
    path.write_text(json.dumps(config, indent=2) + "\n")


def export_adapter(adapter: FaceAdapter, folder: Path) -> None:
    """Writes an adapter in half precision."""
    copied = FaceAdapter(**{name: adapter.config[name] for name in adapter.config if name[0] != "_"})
    copied.load_state_dict(adapter.state_dict())  # a new one, that does not remember where it came from
    copied.to(torch.bfloat16).save_pretrained(folder)
