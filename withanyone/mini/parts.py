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
from withanyone.precision import avoid_cudnn_attention

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


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """--device, for the parts that a GPU trains too."""
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")


def device_name(device: str) -> str:
    """What figures call a device."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "CPU"


def part_of(text: str) -> tuple[int, int]:
    """The argument i/n: every n-th piece of work from the i-th on."""
    index, _, count = text.partition("/")
    return int(index), int(count)


def start_part(args: argparse.Namespace) -> None:
    """Sets the number of threads and the arithmetic, and makes the folder of the run."""
    torch.set_num_threads(args.threads)
    if torch.device(getattr(args, "device", "cpu")).type == "cpu":
        # Plain products in bf16 are faster on a CPU than the fused attention at the miniature's sizes.
        torch.backends.cuda.enable_flash_sdp(False)
    else:
        torch.set_float32_matmul_precision("high")
        avoid_cudnn_attention()
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
