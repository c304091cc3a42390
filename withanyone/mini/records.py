"""The drawn world on disk: shards in MultiID-2M's released layout, and cases in MultiID-Bench's.

Shards (facts: method.md section 3): `train_rec/*.tar` (people not named), `train_cp/*.tar` (people named,
with reference photos), `ref/tars/*.tar` (one folder a person), `ref/cluster_centers.tar` (one `.npy` a
person). A shard depends on the seed and its own number alone, so any processes may write any of them, a
stopped run goes on with the next missing one, and the same seed gives the same bytes. Beyond the released
keys a record's `.json` carries `kps` (five landmarks a box) and `world` (what the drawing knows about
itself).
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import pickle
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from ..faces import FaceAnalyzer
from ..tars import array_bytes, jpeg_bytes, write_tar
from .faceset import CROP_SIZE, FACE_SIZE, align_crop
from .parts import part_of
from .world import RANGES, Picture, contact_sheet, render

logger = logging.getLogger(__name__)

#: aligned RGB faces, each (112, 112, 3) uint8 -> (N, 512) raw embeddings
Embed = Callable[[list[np.ndarray]], np.ndarray]

#: people in a picture -> sizes (width, height) it may have; one that is named twice is made twice as often
BUCKETS: dict[int, tuple[tuple[int, int], ...]] = {
    1: ((128, 128), (128, 128), (128, 128), (128, 128), (192, 128), (128, 192)),
    2: ((192, 192), (192, 192), (192, 192), (192, 128), (256, 192)),
    3: ((256, 256), (256, 256), (256, 192)),
    4: ((256, 256), (256, 256), (256, 192)),
}
CASE_SIZES = {1: (128, 128), 2: (192, 192), 3: (256, 256), 4: (256, 256)}
REFERENCE_SIZE = (128, 128)
MAX_IN_RECORD = max(BUCKETS)
CROP_MARGIN = 32  # pixels by which a picture is larger before it is cropped

# streams of random numbers: one a purpose, so that no two ever meet
_REC, _CP, _REF, _CASE = 0xEC, 0xC9, 0xEF, 0xCA5E


@dataclass(frozen=True)
class ShardPlan:
    """What a set of shards holds. Every number is part of what the bytes depend on."""

    out: Path
    split: str = "train"
    seed: int = 0
    rec_scenes: int = 2000
    cp_scenes: int = 2000
    identities: int = 1000  # named people, with reference photos: the first of the split's range
    references: int = 8  # photos a person
    people_shares: Mapping[int, float] = field(default_factory=lambda: {1: 0.4, 2: 0.3, 3: 0.15, 4: 0.15})
    crop_share: float = 0.1  # records cut out of a larger picture
    scenes_per_shard: int = 500
    people_per_shard: int = 100

    def __post_init__(self) -> None:
        if self.split not in RANGES:
            raise ValueError(f"`split` must be one of {', '.join(RANGES)}, got {self.split!r}.")
        if not self.people_shares or not set(self.people_shares) <= set(BUCKETS):
            raise ValueError(
                f"`people_shares` must give shares for 1 to {MAX_IN_RECORD} people, "
                f"got {dict(self.people_shares)}."
            )
        for name in ("rec_scenes", "cp_scenes", "references", "identities"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        needed = max(self.people_shares) if self.cp_scenes else 0
        if not needed <= self.identities <= len(RANGES[self.split]):
            raise ValueError(
                f"`identities` must be {needed} to {len(RANGES[self.split])} for these scenes, "
                f"got {self.identities}."
            )

    def jobs(self) -> list[tuple[str, int]]:
        """All shards: (subset, number)."""
        counts = {
            "train_rec": -(-self.rec_scenes // self.scenes_per_shard),
            "train_cp": -(-self.cp_scenes // self.scenes_per_shard),
            "ref": -(-self.identities // self.people_per_shard) if self.references else 0,
        }
        return [(subset, number) for subset, count in counts.items() for number in range(count)]

    def path(self, subset: str, number: int) -> Path:
        """Where a shard lies."""
        folder = self.out / "ref" / "tars" if subset == "ref" else self.out / subset
        return folder / f"{number:05d}.tar"


# ---- members -----------------------------------------------------------------------------------------------


def npy_bytes(bboxes: np.ndarray, embeddings: np.ndarray) -> bytes:
    """As released: a dict of boxes (N, 4) and raw embeddings (N, 512), pickled inside an object array."""
    stream = io.BytesIO()
    value = {"bboxes": bboxes.astype(np.float32), "embeddings": embeddings.astype(np.float32)}
    np.save(stream, np.array(value, dtype=object))
    return stream.getvalue()


def align(image: np.ndarray, kps: np.ndarray) -> np.ndarray:
    """(112, 112, 3) uint8: the face with landmarks (5, 2), warped as insightface's `norm_crop` does."""
    margin = (CROP_SIZE - FACE_SIZE) // 2
    return np.ascontiguousarray(align_crop(image, kps)[margin:-margin, margin:-margin])


@dataclass(frozen=True)
class PackEmbedder:
    """An :data:`Embed` by the recogniser of a face pack's folder; can be sent to other processes."""

    folder: str

    def __call__(self, aligned_faces: list[np.ndarray]) -> np.ndarray:
        return _pack(self.folder).embed(aligned_faces)


@lru_cache(maxsize=1)
def _pack(folder: str) -> FaceAnalyzer:
    return FaceAnalyzer.from_pretrained(folder)


def world_of(picture: Picture) -> dict:
    """What the drawing knows: identities, attributes, yaw (left to right), scene, light."""
    return {
        "identities": [person.identity for person in picture.people],
        "people": [person.attributes() for person in picture.people],
        "yaw": [round(person.appearance.yaw, 4) for person in picture.people],
        "scene": picture.scene,
        "light": picture.light,
    }


# ---- scenes ------------------------------------------------------------------------------------------------


def _bucket(count: int, rng: np.random.Generator) -> tuple[int, int]:
    sizes = BUCKETS[count]
    return sizes[int(rng.integers(len(sizes)))]


def _people(plan: ShardPlan, subset: str, count: int, rng: np.random.Generator) -> list[int]:
    """Seeds of different people: named ones from the bank's, others from the whole range of the split."""
    seeds = RANGES[plan.split]
    pool = plan.identities if subset == "train_cp" else len(seeds)
    chosen: list[int] = []
    while len(chosen) < count:
        identity = seeds[int(rng.integers(pool))]
        if identity not in chosen:
            chosen.append(identity)
    return chosen


def crop_corner(picture: Picture, size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int] | None:
    """A corner (x, y) from which a cut of this size holds every face box, or None."""
    boxes = np.stack([person.bbox for person in picture.people])
    room = np.array(picture.image.shape[1::-1]) - size
    first = np.maximum(np.ceil(boxes[:, 2:].max(0)).astype(int) - size, 0)
    last = np.minimum(np.floor(boxes[:, :2].min(0)).astype(int), room)
    if (first > last).any():
        return None
    x, y = (int(rng.integers(low, high + 1)) for low, high in zip(first, last, strict=True))
    return x, y


def _scene(plan: ShardPlan, subset: str, rng: np.random.Generator) -> tuple[Picture, tuple[int, int] | None]:
    """A picture and, for some, the corner of the cut that becomes the record."""
    counts = sorted(plan.people_shares)
    shares = np.array([plan.people_shares[count] for count in counts], float)
    count = int(rng.choice(counts, p=shares / shares.sum()))
    width, height = _bucket(count, rng)
    people, seed = _people(plan, subset, count, rng), int(rng.integers(2**40))
    if rng.random() < plan.crop_share:
        large = render(people, seed, width=width + CROP_MARGIN, height=height + CROP_MARGIN)
        corner = crop_corner(large, (width, height), rng)
        if corner is not None:
            image = large.image[corner[1] : corner[1] + height, corner[0] : corner[0] + width]
            large.image = np.ascontiguousarray(image)
            return large, corner
    return render(people, seed, width=width, height=height), None


def scene_members(
    plan: ShardPlan, subset: str, key: str, rng: np.random.Generator, embed: Embed | None
) -> Iterator[tuple[str, bytes]]:
    """The `.jpg`, `.json` and (with ``embed``) `.npy` of one record."""
    picture, corner = _scene(plan, subset, rng)
    shift = np.zeros(2, np.float32) if corner is None else np.array(corner, np.float32)
    boxes = np.stack([person.bbox for person in picture.people])
    kps = np.stack([person.kps for person in picture.people])
    height, width = picture.image.shape[:2]
    info = {
        "url": f"drawn:{plan.split}/{subset}/{key}",
        "ram_score": 1.0,
        "bboxes": np.round(boxes, 3).tolist(),
        "aesthetics_score": 5.0,
        "caption_en": picture.caption,
        "kps": np.round(kps, 3).tolist(),
        "world": world_of(picture),
    }
    if corner is not None:
        info["crop"] = [*corner, corner[0] + width, corner[1] + height]
    if subset == "train_cp":
        info["names"] = [str(person.identity) for person in picture.people]
        if len(info["names"]) == 1:
            info["name"] = info["names"][0]
    yield f"{key}.jpg", jpeg_bytes(picture.image)
    yield f"{key}.json", json.dumps(info).encode()
    if embed is not None:
        aligned = [align(picture.image, points - shift) for points in kps]
        yield f"{key}.npy", npy_bytes(boxes, embed(aligned))


def _scene_shard(
    plan: ShardPlan, subset: str, number: int, embed: Embed | None
) -> Iterator[tuple[str, bytes]]:
    stream = _REC if subset == "train_rec" else _CP
    total = plan.rec_scenes if subset == "train_rec" else plan.cp_scenes
    first = number * plan.scenes_per_shard
    for index in range(first, min(first + plan.scenes_per_shard, total)):
        rng = np.random.default_rng([stream, plan.seed, index])
        yield from scene_members(plan, subset, f"{index:07d}", rng, embed)


# ---- references --------------------------------------------------------------------------------------------


def _reference_shard(plan: ShardPlan, number: int, embed: Embed | None) -> Iterator[tuple[str, bytes]]:
    """Photos of some people, a folder each; their centres wait in `ref/centers` for the others."""
    width, height = REFERENCE_SIZE
    first = number * plan.people_per_shard
    centers = {}
    for index in range(first, min(first + plan.people_per_shard, plan.identities)):
        identity = RANGES[plan.split][index]
        seeds = np.random.default_rng([_REF, plan.seed, identity]).integers(2**40, size=plan.references)
        rows = []
        for photo, seed in enumerate(seeds):
            picture = render([identity], int(seed), width=width, height=height, close_up=True)
            person = picture.people[0]
            yield f"{identity}/{photo:03d}.jpg", jpeg_bytes(picture.image)
            if embed is not None:
                row = embed([align(picture.image, person.kps)])
                yield f"{identity}/{photo:03d}.npy", npy_bytes(person.bbox[None], row)
                rows.append(row[0] / np.linalg.norm(row[0]))
        if rows:
            centers[str(identity)] = np.mean(rows, axis=0).astype(np.float32)
    if centers:
        folder = plan.out / "ref" / "centers"
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / f"{number:05d}.npz", **centers)


def _write_centers(plan: ShardPlan) -> None:
    """`ref/cluster_centers.tar`, once every reference shard has left its part."""
    folder = plan.out / "ref" / "centers"
    parts = [folder / f"{number:05d}.npz" for subset, number in plan.jobs() if subset == "ref"]
    if not parts or not all(part.exists() for part in parts):
        return

    def members() -> Iterator[tuple[str, bytes]]:
        for part in parts:
            with np.load(part, allow_pickle=False) as centers:
                for name in centers.files:
                    yield f"{name}.npy", array_bytes(centers[name])

    write_tar(plan.out / "ref" / "cluster_centers.tar", members())
    shutil.rmtree(folder)


# ---- writing -----------------------------------------------------------------------------------------------


def _write_shard(job: tuple[ShardPlan, str, int, Embed | None]) -> Path:
    """One shard, unless it is there."""
    plan, subset, number, embed = job
    path = plan.path(subset, number)
    if not path.exists():
        members = (
            _reference_shard(plan, number, embed)
            if subset == "ref"
            else _scene_shard(plan, subset, number, embed)
        )
        write_tar(path, members)
    return path


def write_shards(
    out: str | Path,
    *,
    embed: Embed | None = None,
    workers: int = 1,
    part: tuple[int, int] = (0, 1),
    **settings,
) -> list[Path]:
    """Write shards in MultiID-2M's layout; goes on where it stopped. The same arguments give the same bytes.

    Args:
        out: folder of `train_rec`, `train_cp` and `ref`.
        embed: gives the embeddings of the `.npy` members; None leaves these and the cluster centres out.
            With several workers it must be picklable, as :class:`PackEmbedder` is.
        workers: processes.
        part: (i, n): write every n-th shard from the i-th on, so that n calls share the work.
        settings: fields of :class:`ShardPlan`: split, seed, rec_scenes, cp_scenes, identities, ...

    Returns:
        Paths of this call's shards.

    Raises:
        ValueError: for settings out of range; the message names the setting.
    """
    plan = ShardPlan(out=Path(out), **settings)
    index, count = part
    if not 0 <= index < count:
        raise ValueError(f"`part` must be (i, n) with 0 <= i < n, got {part}.")
    if workers > 1 and embed is not None:
        _check_picklable(embed)
    _stamp(plan, embed is not None)
    jobs = [(plan, subset, number, embed) for subset, number in plan.jobs()[index::count]]
    start, paths = time.monotonic(), []
    with ProcessPoolExecutor(workers) if workers > 1 else _InThisProcess() as pool:
        for path in pool.map(_write_shard, jobs):
            paths.append(path)
            left = (time.monotonic() - start) / len(paths) * (len(jobs) - len(paths))
            logger.info("%d of %d shards, %s, %.0f s left", len(paths), len(jobs), path.name, left)
    if embed is not None:
        _write_centers(plan)
    return paths


def _stamp(plan: ShardPlan, embedded: bool) -> None:
    """Keep the plan beside the shards; ValueError where the folder holds shards of another one."""
    settings = {name: value for name, value in asdict(plan).items() if name != "out"} | {"embedded": embedded}
    text = json.dumps(settings, indent=1, sort_keys=True) + "\n"
    path = plan.out / "plan.json"
    if not path.exists():
        plan.out.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    elif path.read_text() != text:
        raise ValueError(
            f"`out` {str(plan.out)!r} holds shards of other settings, see its plan.json: give those settings "
            "or another folder."
        )


class _InThisProcess:
    """The part of an executor that `write_shards` uses, without processes."""

    map = staticmethod(map)

    def __enter__(self) -> _InThisProcess:
        return self

    def __exit__(self, *details: object) -> None:
        return None


def _check_picklable(embed: Embed) -> None:
    try:
        pickle.dumps(embed)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError("`embed` must be picklable with several workers: pass a PackEmbedder.") from error


# ---- cases -------------------------------------------------------------------------------------------------


def case_people(index: int) -> int:
    """Number of people of a case: in twenty cases 7, 7, 3 and 3 of one to four people."""
    return (1, 2, 1, 2, 3, 1, 2, 4, 1, 2, 3, 1, 2, 4, 1, 2, 3, 1, 2, 4)[index % 20]


def write_cases(out: str | Path, count: int, seed: int, split: str = "test") -> list[Path]:
    """Write ``count`` cases in MultiID-Bench's layout: `ori.jpg`, `ref_1.jpg`, ..., `meta.json`.

    A case is a target picture of one to four people and, for each of them, another picture (a portrait of
    another appearance). No person is in two cases of one seed, and none is of the training range.
    `meta.json`: `prompt` (the target's caption), `bboxes` (xyxy pixels of `ori.jpg`, left to right),
    `names` (identities in that order) and `world` (attributes of targets and references, landmarks, scene,
    light). The first cases of a longer list are those of a shorter one.

    Raises:
        ValueError: for a ``split`` that training sees, or a ``count`` out of range.
    """
    held_out = tuple(name for name in RANGES if name != "train")
    if split not in held_out:
        raise ValueError(
            f"`split` must be one of {', '.join(held_out)} (people never trained on), got {split!r}."
        )
    seeds = RANGES[split]
    if not 0 < count <= len(seeds) // MAX_IN_RECORD:
        raise ValueError(f"`count` must be 1 to {len(seeds) // MAX_IN_RECORD} cases, got {count!r}.")
    start = int(np.random.default_rng([_CASE, seed]).integers(len(seeds)))
    folders = []
    for index in range(count):
        people = [
            seeds[(start + index * MAX_IN_RECORD + number) % len(seeds)]
            for number in range(case_people(index))
        ]
        folder = Path(out) / f"{index:04d}"
        _write_case(folder, people, np.random.default_rng([_CASE, seed, index]))
        folders.append(folder)
    return folders


def _write_case(folder: Path, people: Sequence[int], rng: np.random.Generator) -> None:
    width, height = CASE_SIZES[len(people)]
    target = render(people, int(rng.integers(2**40)), width=width, height=height)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ori.jpg").write_bytes(jpeg_bytes(target.image))
    references = []
    for number, person in enumerate(target.people, 1):
        photo = render(
            [person.identity],
            int(rng.integers(2**40)),
            width=REFERENCE_SIZE[0],
            height=REFERENCE_SIZE[1],
            close_up=True,
        )
        (folder / f"ref_{number}.jpg").write_bytes(jpeg_bytes(photo.image))
        references.append(photo)
    known = world_of(target)
    meta = {
        "prompt": target.caption,
        "bboxes": [np.round(person.bbox.astype(float), 3).tolist() for person in target.people],
        "names": [str(person.identity) for person in target.people],
        "num_persons": len(people),
        "world": {
            "target": known["people"],
            "references": [photo.people[0].attributes() for photo in references],
            "scene": target.scene,
            "light": target.light,
            "kps": [np.round(person.kps.astype(float), 3).tolist() for person in target.people],
            "reference_bboxes": [
                np.round(photo.people[0].bbox.astype(float), 3).tolist() for photo in references
            ],
            "reference_kps": [
                np.round(photo.people[0].kps.astype(float), 3).tolist() for photo in references
            ],
        },
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


# ---- commands ----------------------------------------------------------------------------------------------


def _add_cases(parser: argparse.ArgumentParser) -> None:
    parser.description = "Bench cases of drawn people that training never saw."
    parser.add_argument("--out", type=Path, required=True, help="folder for the cases")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", default="test", choices=[name for name in RANGES if name != "train"])


def _run_cases(args: argparse.Namespace) -> None:
    folders = write_cases(args.out, args.count, args.seed, args.split)
    logger.info("%d cases in %s", len(folders), args.out)


def _add_shards(parser: argparse.ArgumentParser) -> None:
    parser.description = "Training shards in MultiID-2M's layout; goes on where it stopped."
    parser.add_argument("--out", type=Path, required=True, help="folder for train_rec, train_cp and ref")
    parser.add_argument("--split", default="train", choices=list(RANGES))
    parser.add_argument("--seed", type=int, default=0)
    for name in (
        "rec_scenes",
        "cp_scenes",
        "identities",
        "references",
        "scenes_per_shard",
        "people_per_shard",
    ):
        default = ShardPlan.__dataclass_fields__[name].default
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument(
        "--face-pack", help="folder of a face pack whose recogniser writes the embeddings (.npy)"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--part", type=part_of, default=(0, 1), help="i/n: every n-th shard from the i-th on")


def _run_shards(args: argparse.Namespace) -> None:
    settings = {name: value for name, value in vars(args).items() if name in ShardPlan.__dataclass_fields__}
    embed = PackEmbedder(args.face_pack) if args.face_pack else None
    write_shards(**settings, embed=embed, workers=args.workers, part=args.part)


def _add_sheet(parser: argparse.ArgumentParser) -> None:
    parser.description = "A sheet of drawn people: rows of one person in many pictures, then of groups."
    parser.add_argument("--out", type=Path, required=True, help="picture file")
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--columns", type=int, default=8)
    parser.add_argument("--size", type=int, default=128, help="pixels of one picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", default="validation", choices=list(RANGES))


def _run_sheet(args: argparse.Namespace) -> None:
    sheet = contact_sheet(args.rows, args.columns, args.size, args.seed, args.split)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(args.out)
    logger.info("%s", args.out)


#: Command -> (adds its arguments to a parser, runs it)
COMMANDS: dict[
    str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None]]
] = {
    "cases": (_add_cases, _run_cases),
    "shards": (_add_shards, _run_shards),
    "sheet": (_add_sheet, _run_sheet),
}
