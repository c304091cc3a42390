"""Reconstruction records (`train_rec`) of the pictures that the generative parts are trained on.

Those pictures are rendered already, each of other people, so writing them as MultiID-2M records costs little.
The records have no `.npy`: training makes the embeddings with its face pack.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ..tars import jpeg_bytes, write_tar
from .parts import RUNS
from .pictures import read_shard, shard_paths

logger = logging.getLogger(__name__)


def record_members(path: Path) -> Iterator[tuple[str, bytes]]:
    """The `.jpg` and `.json` of every picture with people in one shard of pictures."""
    arrays, captions = read_shard(path, "pixels", "bboxes", "kps", "identities")
    for index, image in enumerate(arrays["pixels"]):
        there = arrays["identities"][index] >= 0
        if not there.any():
            continue
        key = f"{path.stem}_{index:05d}"
        info = {
            "url": f"drawn:pictures/{key}",
            "bboxes": np.round(arrays["bboxes"][index][there].astype(float), 3).tolist(),
            "caption_en": captions[index][0],
            "aesthetics_score": 5.0,
            "kps": np.round(arrays["kps"][index][there].astype(float), 3).tolist(),
        }
        yield f"{key}.jpg", jpeg_bytes(image)
        yield f"{key}.json", json.dumps(info).encode()


def write_records(pictures: str | Path, out: str | Path, split: str = "train") -> list[Path]:
    """Writes `out`/train_rec/<shard>.tar for each shard of `pictures` without one; returns the new paths."""
    written = []
    for path in shard_paths(Path(pictures), split):
        tar = Path(out) / "train_rec" / f"pictures_{path.stem}.tar"
        if not tar.exists():
            write_tar(tar, record_members(path))
            written.append(tar)
            logger.info("%s", tar)
    return written


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Reconstruction records of the rendered training pictures; adds what is new."
    parser.add_argument("--pictures", type=Path, default=RUNS / "pictures")
    parser.add_argument("--out", type=Path, default=RUNS / "shards", help="folder for train_rec")


def _run(args: argparse.Namespace) -> None:
    written = write_records(args.pictures, args.out)
    logger.info("%d new shards in %s", len(written), args.out)


COMMANDS: dict[
    str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None]]
] = {"records": (_add_arguments, _run)}
