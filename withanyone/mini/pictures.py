"""Training pictures of the drawn world, rendered once and kept in shards that every generative part reads.

A shard holds pictures of one size as a safetensors file: pixels, captions, boxes, landmarks, attributes. Its
content follows from the seed and its number alone, so rendering can stop and go on anywhere.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from withanyone.layout import default_bboxes

from . import world
from .parts import RUNS

logger = logging.getLogger(__name__)

SHARD_SIZE, VALIDATION_SHARD_SIZE = 500, 100
CAPTIONS_PER_PICTURE = 2
MAX_PEOPLE = 4
#: Share of pictures whose faces stand where the pipeline's default boxes are, give or take, and not where the
#: world would put them.
BOXED_SHARE = 0.3


@dataclass(frozen=True)
class Bucket:
    """Pictures of one size. `people`: how often 0, 1, ... people; `close_up`: share of single portraits
    close up."""

    width: int
    height: int
    people: tuple[float, ...]
    close_up: float = 0.0

    @property
    def num_tokens(self) -> int:
        """FLUX tokens of 16 x 16 pixels."""
        return (self.width // 16) * (self.height // 16)


PORTRAIT = Bucket(128, 128, (0.04, 0.96), close_up=0.12)
PAIR = Bucket(192, 192, (0.01, 0.09, 0.90))
GROUP = Bucket(256, 256, (0.0, 0.02, 0.08, 0.50, 0.40))
WIDE = Bucket(192, 128, (0.0, 0.35, 0.65))
TALL = Bucket(128, 192, (0.0, 1.0))
WIDE_GROUP = Bucket(256, 192, (0.0, 0.0, 0.4, 0.4, 0.2))
#: The shards' buckets, over and over: more than half of all pictures are portraits.
CYCLE = (
    *(PORTRAIT, PAIR, PORTRAIT, GROUP, PORTRAIT, WIDE, PORTRAIT, PAIR),
    *(PORTRAIT, PORTRAIT, GROUP, TALL, PORTRAIT, PAIR, PORTRAIT, WIDE_GROUP),
)


def bucket_of(shard: int) -> Bucket:
    """The bucket of a shard's pictures."""
    return CYCLE[shard % len(CYCLE)]


def moved_boxes(count: int, bucket: Bucket, rng: np.random.Generator) -> np.ndarray:
    """The default boxes of `count` people, each moved and resized a little: (N, 4) xyxy pixels inside the
    picture."""
    boxes = np.array(default_bboxes(count, bucket.height, bucket.width), np.float64)
    sizes = boxes[:, 2:] - boxes[:, :2]
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2 + sizes * rng.uniform(-0.12, 0.12, (count, 2))
    halves = sizes * rng.uniform(0.8, 1.05, (count, 1)) / 2
    limits = np.array([bucket.width, bucket.height] * 2, np.float64)
    return np.clip(np.concatenate([centers - halves, centers + halves], axis=1), 0, limits)


def draw_picture(bucket: Bucket, split: str, key: tuple[int, ...]) -> tuple[world.Picture, list[str]]:
    """One picture and its captions; `key` (any integers) decides everything about it."""
    rng = np.random.default_rng(key)
    count = int(rng.choice(len(bucket.people), p=bucket.people))
    # An index is drawn: given the range itself, numpy would make an array of all its people every time.
    identities = [world.RANGES[split][i] for i in rng.choice(len(world.RANGES[split]), size=count)]
    close_up = bool(count == 1 and rng.random() < bucket.close_up)
    boxed = bool(count and not close_up and rng.random() < BOXED_SHARE)
    picture = world.render(
        identities,
        int(rng.integers(2**31)),
        width=bucket.width,
        height=bucket.height,
        bboxes=moved_boxes(count, bucket, rng) if boxed else None,
        close_up=close_up,
    )
    captions = [
        world.caption_of(picture.people, picture.scene, picture.light, rng)
        for _ in range(CAPTIONS_PER_PICTURE)
    ]
    return picture, captions


def attribute_indices(person: world.Person) -> list[int]:
    """The person's attributes as indices into PERSON_ATTRIBUTES' values, in its order."""
    attributes = person.attributes()
    return [values.index(attributes[name]) for name, values in world.PERSON_ATTRIBUTES.items()]


def render_shard(
    folder: Path, shard: int, split: str = "train", seed: int = 0, size: int = SHARD_SIZE
) -> Path:
    """Renders one shard into `folder` unless it is there; returns its path."""
    path = folder / f"{split}_{shard:05d}.safetensors"
    if path.exists():
        return path
    bucket = bucket_of(shard)
    tensors = {
        "pixels": np.zeros((size, bucket.height, bucket.width, 3), np.uint8),
        "bboxes": np.zeros((size, MAX_PEOPLE, 4), np.float32),
        "kps": np.zeros((size, MAX_PEOPLE, 5, 2), np.float32),
        "identities": np.full((size, MAX_PEOPLE), -1, np.int64),  # -1: nobody
        "attributes": np.full((size, MAX_PEOPLE, len(world.PERSON_ATTRIBUTES)), -1, np.int64),
        "angles": np.zeros((size, MAX_PEOPLE, 3), np.float32),  # yaw, pitch, roll in radians
        "setting": np.zeros((size, len(world.PICTURE_ATTRIBUTES)), np.int64),
    }
    texts = []
    for index in range(size):
        picture, captions = draw_picture(bucket, split, (seed, world.RANGES[split].start, shard, index))
        tensors["pixels"][index] = picture.image
        for place, person in enumerate(picture.people):
            tensors["bboxes"][index, place] = person.bbox
            tensors["kps"][index, place] = person.kps
            tensors["identities"][index, place] = person.identity
            tensors["attributes"][index, place] = attribute_indices(person)
            look = person.appearance
            tensors["angles"][index, place] = look.yaw, look.pitch, look.roll
        told = {"scene": picture.scene, "light": picture.light}
        tensors["setting"][index] = [
            values.index(told[name]) for name, values in world.PICTURE_ATTRIBUTES.items()
        ]  # fmt: skip
        texts.append(captions)
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"captions": json.dumps(texts), "bucket": json.dumps(vars(bucket))})
    os.replace(partial, path)
    return path


def read_shard(path: Path, *names: str) -> tuple[dict[str, np.ndarray], list[list[str]]]:
    """The named arrays of a shard (all where none is named) and its captions, a list a picture."""
    with safe_open(path, framework="np") as file:
        arrays = {name: file.get_tensor(name) for name in (names or file.keys())}
        return arrays, json.loads(file.metadata()["captions"])


MIRRORED = {"left": "right", "right": "left"}


@dataclass(frozen=True)
class Told:
    """A person of a shard, as far as a caption needs one."""

    told: dict[str, str]

    def attributes(self) -> dict[str, str]:
        """Value of every person attribute."""
        return self.told


def captions_from_attributes(
    shard: Mapping[str, np.ndarray], count: int, rng: np.random.Generator, mirrored: bool = False
) -> list[list[str]]:
    """`count` new captions for every picture of a shard; `mirrored`: for the pictures flipped left to
    right."""
    result = []
    for attributes, setting in zip(shard["attributes"], shard["setting"], strict=True):
        people = []
        for row in attributes[attributes[:, 0] >= 0]:
            told = {
                name: values[index]
                for (name, values), index in zip(world.PERSON_ATTRIBUTES.items(), row, strict=True)
            }
            if mirrored:
                told["pose"] = MIRRORED.get(told["pose"], told["pose"])
            people.append(Told(told))
        scene, light = (
            values[index] for values, index in zip(world.PICTURE_ATTRIBUTES.values(), setting, strict=True)
        )
        people = people[::-1] if mirrored else people
        result.append([world.caption_of(people, scene, light, rng) for _ in range(count)])
    return result


def shard_paths(folder: Path, split: str = "train") -> list[Path]:
    """The whole shards that are there, in order."""
    return sorted(folder.glob(f"{split}_*.safetensors"))


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=RUNS / "pictures")
    parser.add_argument("--shards", type=int, default=96, help=f"shards of {SHARD_SIZE} training pictures")
    parser.add_argument(
        "--validation-shards", type=int, default=16,
        help=f"shards of {VALIDATION_SHARD_SIZE} validation pictures",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)


def _run(args: argparse.Namespace) -> None:
    for shard in range(args.validation_shards):
        render_shard(args.out, shard, "validation", args.seed, size=VALIDATION_SHARD_SIZE)
    started, new = time.monotonic(), 0
    for shard in range(args.shards):
        if (args.out / f"train_{shard:05d}.safetensors").exists():
            continue
        render_shard(args.out, shard, "train", args.seed, size=SHARD_SIZE)
        new += 1
        left = (time.monotonic() - started) / new * (args.shards - shard - 1) / 60
        logger.info("pictures: shard %d of %d, %.1f minutes left", shard + 1, args.shards, left)


COMMANDS = {"pictures": (_add_arguments, _run)}
