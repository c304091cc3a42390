"""Putting the miniature together: the pipeline folder's index, and all parts in order (`make mini`)."""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusers import FluxTransformer2DModel
from transformers import (
    CLIPTextModel,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionModel,
    T5EncoderModel,
)

from withanyone import FaceAdapter, FaceAnalyzer, WithAnyonePipeline

from . import PRETRAINED
from .latents import PatchAutoencoder
from .parts import RUNS, export_adapter
from .scheduler import SeededFlowMatchScheduler

logger = logging.getLogger(__name__)

#: What a call's None means for the miniature; chosen on validation people.
SAMPLING_DEFAULTS = {
    "height": 128,
    "width": 128,
    "num_inference_steps": 14,
    "guidance_scale": 1.0,
    "true_cfg_scale": 3.0,
    "faces_in_negative": False,
    "id_scale": 0.5,
    "siglip_scale": 0.5,
    "num_candidates": 4,
}
COMPONENTS = {
    "scheduler": SeededFlowMatchScheduler,
    "vae": PatchAutoencoder,
    "text_encoder": CLIPTextModel,
    "tokenizer": PreTrainedTokenizerFast,
    "text_encoder_2": T5EncoderModel,
    "tokenizer_2": PreTrainedTokenizerFast,
    "transformer": FluxTransformer2DModel,
    "image_encoder": SiglipVisionModel,
    "feature_extractor": SiglipImageProcessor,
    "face_adapter": FaceAdapter,
    "face_analyzer": FaceAnalyzer,
}
#: The file that a component's folder gets last, where it is made by several commands.
LAST_FILES = {"face_analyzer": "recognition.onnx"}
#: Parts without which the folder still is a pipeline, of pictures without chosen people.
FACE_PARTS = ("image_encoder", "feature_extractor", "face_adapter", "face_analyzer")


def assemble(folder: Path = PRETRAINED) -> WithAnyonePipeline:
    """Loads the parts that are in `folder` and writes its model_index.json; face parts may still be missing.

    Raises:
        ValueError: another part is missing.
    """
    loaded = {}
    for name, kind in COMPONENTS.items():
        if (folder / name / LAST_FILES.get(name, "")).exists():
            loaded[name] = kind.from_pretrained(folder / name)
        elif name not in FACE_PARTS:
            raise ValueError(
                f"`folder` {folder} has no {name}: `python -m withanyone.mini build` makes all parts."
            )
        else:
            logger.warning("%s has no %s yet: the pipeline is assembled without", folder, name)
            loaded[name] = None
    pipeline = WithAnyonePipeline(**loaded, timestep_shift="flux", sampling_defaults=SAMPLING_DEFAULTS)
    pipeline.save_config(folder)
    return pipeline


# All parts in order


@dataclass(frozen=True)
class Stage:
    """One command of the build, and the minutes it takes on one core of the machine it was made on."""

    name: str
    module: str
    arguments: tuple[str, ...]
    minutes: float


MINI = "withanyone.mini"
STAGES: tuple[Stage, ...] = (
    Stage("text", MINI, ("text",), 10),
    Stage("linear code", MINI, ("latents",), 1),
    Stage("pictures", MINI, ("pictures",), 25),
    Stage("recognizer", MINI, ("recognizer",), 60),
    Stage("detector", MINI, ("detector",), 12),
    Stage("judge", MINI, ("judge",), 30),
    Stage("reader", MINI, ("reader",), 20),
    Stage("image encoder", MINI, ("image-encoder",), 15),
    Stage("base", MINI, ("base", "--with-faces"), 480),
    Stage("decoder", MINI, ("decoder", "--adapter", "runs/mini/base/face_adapter"), 15),
    Stage("shards", MINI, ("shards", "--out", "runs/mini/shards", "--identities", "1200", "--references", "6",
                           "--rec-scenes", "0", "--cp-scenes", "6000"), 15),
    Stage("records", MINI, ("records",), 2),
    Stage("index", MINI, ("assemble",), 1),
    Stage("adapter", "train", ("--config", "train/phases/mini_adapter.yaml"), 22),
    Stage("pipeline", MINI, ("assemble", "--adapter", "runs/mini/adapter/shipped/adapter"), 1),
)  # fmt: skip


def finished_stages(record: Path) -> list[str]:
    """Names in the record of finished stages."""
    return record.read_text().splitlines() if record.exists() else []


def build(record: Path, stages: Sequence[Stage] = STAGES) -> None:
    """Runs the stages that are not in `record` yet, in order, each as a process of its own.

    A stage that was stopped in the middle goes on from its last checkpoint.

    Raises:
        RuntimeError: a stage failed; the same command goes on with it.
    """
    record.parent.mkdir(parents=True, exist_ok=True)
    for index, stage in enumerate(stages):
        done = finished_stages(record)
        if stage.name in done:
            logger.info("%s: done before", stage.name)
            continue
        left = sum(other.minutes for other in stages[index:] if other.name not in done) / 60
        logger.info("%s: starts; about %.1f hours to go on one core", stage.name, left)
        started = time.monotonic()
        command = [sys.executable, "-m", stage.module, *stage.arguments]
        result = subprocess.run(command, check=False)
        if result.returncode:
            raise RuntimeError(
                f"{stage.name} ended with status {result.returncode}: {' '.join(command[1:])}. See the lines "
                "above; the same command goes on from here."
            )
        logger.info("%s: done in %.1f minutes", stage.name, (time.monotonic() - started) / 60)
        with record.open("a") as file:
            file.write(stage.name + "\n")


# Commands


def _add_assemble(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pretrained", type=Path, default=PRETRAINED, help="pipeline folder")
    parser.add_argument(
        "--adapter", type=Path, help="folder of a trained adapter to take over, in half precision"
    )


def _run_assemble(args: argparse.Namespace) -> None:
    if args.adapter is not None:
        export_adapter(FaceAdapter.from_pretrained(args.adapter), args.pretrained / "face_adapter")
    assemble(args.pretrained)
    size = sum(path.stat().st_size for path in args.pretrained.rglob("*") if path.is_file())
    logger.info("%s: %.1f MB", args.pretrained, size / 1e6)


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--record", type=Path, default=RUNS / "build.txt", help="names of finished stages")


def _run_build(args: argparse.Namespace) -> None:
    build(args.record)


COMMANDS = {"assemble": (_add_assemble, _run_assemble), "build": (_add_build, _run_build)}
