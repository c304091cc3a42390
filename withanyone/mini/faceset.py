"""Rendered pictures and aligned faces for the face pack's networks, kept on disk in rounds.

A round shows each identity of a set once, in pictures of one to eight people at the sizes real requests have.
Rounds are independent of each other: any number of processes may render them, a stopped run goes on with the
next missing round, and the first n rounds are the same whatever comes after them.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from ..arcface import similarity_transform
from .pictures import read_shard
from .world import RANGES, Picture, make_identity, render

logger = logging.getLogger(__name__)

FACE_SIZE = 112
CROP_SIZE = 128  # an aligned face with 8 px of margin, so that training can shift it
MIN_FACE_HEIGHT = 20  # pixels; smaller faces train the detector only


@dataclass(frozen=True)
class PictureKind:
    """How often pictures of this kind are made, of how many people, at which sizes (width, height)."""

    share: float
    people: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    close_up: bool = False


KINDS = (
    PictureKind(0.35, (1,), ((128, 128), (128, 128), (160, 160), (192, 192), (256, 256)), close_up=True),
    PictureKind(0.33, (1,), ((128, 128), (128, 128), (128, 128), (96, 128), (160, 128), (192, 192))),
    PictureKind(0.16, (2,), ((192, 192), (192, 192), (192, 128), (256, 192))),
    PictureKind(0.10, (3, 4), ((256, 256), (256, 256), (256, 192), (320, 192))),
    PictureKind(0.02, (5, 6, 7, 8), ((256, 256), (320, 256))),
    PictureKind(0.04, (0,), ((128, 128), (192, 192), (256, 256))),
)


@dataclass(frozen=True)
class PictureSpec:
    """One picture to render."""

    identities: tuple[int, ...]
    seed: int
    width: int
    height: int
    close_up: bool

    def render(self) -> Picture:
        return render(
            self.identities, self.seed, width=self.width, height=self.height, close_up=self.close_up
        )


def plan_round(identities: Sequence[int], seed: int, number: int) -> list[PictureSpec]:
    """The pictures of one round: every identity in exactly one of them, some pictures without people."""
    rng = np.random.default_rng((0xFACE, seed, number))
    waiting = list(rng.permutation(np.asarray(identities)))
    shares = np.array([kind.share for kind in KINDS])
    plan = []
    while waiting:
        kind = KINDS[rng.choice(len(KINDS), p=shares / shares.sum())]
        count = int(rng.choice(kind.people))
        if count > len(waiting):
            continue
        people = tuple(int(waiting.pop()) for _ in range(count))
        width, height = kind.sizes[rng.integers(len(kind.sizes))]
        plan.append(PictureSpec(people, int(rng.integers(2**40)), width, height, kind.close_up))
    return plan


def align_crop(image: np.ndarray, kps: np.ndarray) -> np.ndarray:
    """Aligned face with margin (128, 128, 3) uint8 of a picture (H, W, 3); black outside the picture.

    Its inner 112 px are what insightface's `norm_crop` makes of the same landmarks.
    """
    points = torch.from_numpy(np.asarray(kps, np.float64))
    matrix = similarity_transform(points[None], FACE_SIZE)[0].numpy()  # (2, 3)
    matrix[:, 2] += (CROP_SIZE - FACE_SIZE) // 2
    return cv2.warpAffine(image, matrix, (CROP_SIZE, CROP_SIZE), borderValue=0.0)


def trait_rows(identities: Sequence[int]) -> np.ndarray:
    """What makes up each identity, as numbers: (N, T) float32."""
    rows = []
    for number in identities:
        identity = make_identity(int(number))
        colors = (*identity.skin, *identity.lips, *identity.iris, *identity.brows)
        marks = [(1.0, *mark) for mark in identity.moles] + [(0.0,) * 4] * (3 - len(identity.moles))
        marks.append((1.0, *identity.scar) if identity.scar else (0.0,) * 4)
        rows.append((*identity.traits.values(), *colors, *np.ravel(marks)))
    return np.array(rows, np.float32)


def mirrored_traits(rows: np.ndarray) -> np.ndarray:
    """Traits (N, T) of the people in mirrored pictures: what was left is right, all else as it was."""
    names = list(make_identity(0).traits)
    signs = np.ones(rows.shape[1], np.float32)
    signs[[names.index(name) for name in names if name.endswith("_asymmetry")]] = -1
    signs[[-15, -11, -7]] = -1  # where moles are, across the face
    signs[[-3, -1]] = -1  # where the scar is, and its slope
    return rows * signs


@dataclass
class Scene:
    """A picture (H, W, 3) uint8 with its faces: bboxes (F, 4) xyxy and kps (F, 5, 2), both in pixels."""

    image: np.ndarray
    bboxes: np.ndarray
    kps: np.ndarray


class FaceSet:
    """Rounds of rendered faces under one folder.

    Args:
        folder: one folder per set, e.g. `runs/mini/faces/train`.
        split: whose identities (a name in `world.RANGES`).
        identities: how many of them, from the start of the split's range plus `first`.
        seed: of plans and pictures.
    """

    def __init__(
        self, folder: str | Path, split: str, identities: int, *, first: int = 0, seed: int = 0
    ) -> None:
        if split not in RANGES:
            raise ValueError(f"`split` must be one of {', '.join(RANGES)}, got {split!r}")
        self.folder = Path(folder)
        start = RANGES[split].start + first
        self.identities = range(start, start + identities)
        if identities < 1 or self.identities[-1] not in RANGES[split]:
            raise ValueError(f"`identities` must be 1 or more within the range of {split}, got {identities}")
        self.seed = seed
        description = {"split": split, "first": first, "identities": identities, "seed": seed}
        path = self.folder / "set.json"
        if path.exists():
            found = json.loads(path.read_text())
            if found != description:
                raise ValueError(
                    f"`folder` {folder} holds another set ({found}, asked for {description}): remove it, or "
                    "give another folder"
                )
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(description))

    def round_folder(self, number: int) -> Path:
        return self.folder / f"round_{number:03d}"

    def render(self, rounds: int, *, picture_rounds: int = 0, workers: int = 1) -> None:
        """Renders the rounds that are missing; the first `picture_rounds` keep whole pictures too."""
        missing = [n for n in range(rounds) if not (self.round_folder(n) / "faces.npy").exists()]
        started = time.monotonic()
        jobs = [(self, number, number < picture_rounds) for number in missing]
        if workers == 1:
            done = map(_render_round, jobs)
        else:
            pool = ProcessPoolExecutor(workers)
            done = pool.map(_render_round, jobs)
        for count, number in enumerate(done, 1):
            left = (time.monotonic() - started) / count * (len(missing) - count) / 60
            logger.info("%s: round %d of %d, %.1f minutes left", self.folder, number + 1, rounds, left)
        if workers > 1:
            pool.shutdown()

    def folders(self, rounds: int) -> list[Path]:
        """Of the first rounds, for `FaceBank`."""
        return [self.round_folder(number) for number in range(rounds)]

    def faces(self, rounds: int) -> tuple[np.ndarray, np.ndarray]:
        """Crops (N, 128, 128, 3) uint8 and identities (N,) of the first rounds."""
        bank = FaceBank(self.folders(rounds))
        return bank[np.arange(len(bank))], bank.identities

    def scenes(self, rounds: int) -> list[Scene]:
        """Whole pictures of the first rounds (rendered with `picture_rounds`)."""
        scenes = []
        for number in range(rounds):
            folder = self.round_folder(number)
            pixels, shapes = np.load(folder / "pixels.npy", mmap_mode="r"), np.load(folder / "shapes.npy")
            bboxes, kps = np.load(folder / "bboxes.npy"), np.load(folder / "kps.npy")
            pixel = face = 0
            for height, width, count in shapes.tolist():
                image = pixels[pixel : pixel + height * width * 3].reshape(height, width, 3)
                scenes.append(Scene(image, bboxes[face : face + count], kps[face : face + count]))
                pixel, face = pixel + height * width * 3, face + count
        return scenes

    def people(self, rounds: int) -> list[np.ndarray]:
        """Identities (F,) of the faces of each of `scenes`."""
        people = []
        for number in range(rounds):
            folder = self.round_folder(number)
            counts = np.load(folder / "shapes.npy")[:, 2]
            people += np.split(np.load(folder / "people.npy"), np.cumsum(counts)[:-1])
        return people


def crops_of_shard(shard: Path, folder: Path) -> Path:
    """Aligned faces of a shard of `pictures`, in a folder of its own with the files of a round.

    Done once: a folder that is there is taken as it is.
    """
    target = folder / shard.stem
    if target.exists():
        return target
    arrays, _ = read_shard(shard, "pixels", "kps", "bboxes", "identities")
    shown = arrays["identities"] >= 0  # (P, people)
    shown &= arrays["bboxes"][..., 3] - arrays["bboxes"][..., 1] >= MIN_FACE_HEIGHT
    places = np.argwhere(shown)
    crops = np.stack([align_crop(arrays["pixels"][p], arrays["kps"][p, n]) for p, n in places])
    partial = target.with_name(f"{target.name}.partial{os.getpid()}")
    partial.mkdir(parents=True)
    np.save(partial / "faces.npy", crops)
    np.save(partial / "identities.npy", arrays["identities"][shown])
    np.save(partial / "traits.npy", trait_rows(arrays["identities"][shown]))
    partial.rename(target)
    return target


def scenes_of_shard(shard: Path) -> list[Scene]:
    """The pictures of a shard of `pictures` with their faces."""
    arrays, _ = read_shard(shard, "pixels", "kps", "bboxes", "identities")
    shown = arrays["identities"] >= 0
    return [
        Scene(image, bboxes[here], kps[here])
        for image, bboxes, kps, here in zip(
            arrays["pixels"], arrays["bboxes"], arrays["kps"], shown, strict=True
        )
    ]


class FaceBank:
    """Crops of many rounds, read from disk as asked for: `bank[indices]` is (B, 128, 128, 3) uint8."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.identities = np.concatenate([np.load(folder / "identities.npy") for folder in folders])
        self.traits = np.concatenate([np.load(folder / "traits.npy") for folder in folders])  # (N, T)
        self._parts = [np.load(folder / "faces.npy", mmap_mode="r") for folder in folders]
        self._starts = np.cumsum([0, *map(len, self._parts)])

    def __len__(self) -> int:
        return len(self.identities)

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        parts = np.searchsorted(self._starts, indices, side="right") - 1
        rows = indices - self._starts[parts]
        return np.stack([self._parts[part][row] for part, row in zip(parts, rows, strict=True)])


def _render_round(job: tuple[FaceSet, int, bool]) -> int:
    """Renders one round into its folder (whole or not at all)."""
    faceset, number, keep_pictures = job
    cv2.setNumThreads(1)
    crops, identities, pixels, shapes, bboxes, kps, people = [], [], [], [], [], [], []
    for spec in plan_round(faceset.identities, faceset.seed, number):
        picture = spec.render()
        for person in picture.people:
            if person.bbox[3] - person.bbox[1] >= MIN_FACE_HEIGHT:
                crops.append(align_crop(picture.image, person.kps))
                identities.append(person.identity)
            bboxes.append(person.bbox)
            kps.append(person.kps)
            people.append(person.identity)
        shapes.append((*picture.image.shape[:2], len(picture.people)))
        if keep_pictures:
            pixels.append(picture.image.reshape(-1))
    arrays = {"faces": np.stack(crops), "identities": np.array(identities), "traits": trait_rows(identities)}
    if keep_pictures:
        arrays |= {"pixels": np.concatenate(pixels), "shapes": np.array(shapes)}
        arrays |= {"bboxes": np.array(bboxes, np.float32), "kps": np.array(kps, np.float32)}
        arrays["people"] = np.array(people)
    folder = faceset.round_folder(number)
    partial = folder.with_name(f"{folder.name}.partial{os.getpid()}")
    partial.mkdir()
    for name, array in arrays.items():
        np.save(partial / f"{name}.npy", array)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return number
