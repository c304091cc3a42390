"""The catalogue: every good record of a set of shards, where its bytes lie, and what was wrong with the
others.

Built once by a pass over the shards, kept as arrays in a folder, rebuilt when a shard changed. It makes the
order of samples a matter of numbers alone (a permutation of record numbers, whatever the number of shards,
workers or machines), and the place in the data stream a single counter.

Landmarks of the targets are found in the same pass: taken from the record where it carries them, else
detected once and matched to the record's boxes by overlap. A face without a match has NaN landmarks. Records
without a `.npy` get their embeddings from these landmarks, once.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock

from withanyone.bench.metrics import box_iou

from .pack import PackReader
from .shards import (
    REASONS,
    BadRecord,
    Member,
    Record,
    ShardReader,
    check_boxes,
    decode_image,
    file_stamp,
    group_members,
    image_size,
    list_shards,
    parse_record,
    parse_sides,
    scan_shard,
)

logger = logging.getLogger(__name__)

Built = TypeVar("Built")

# Reconstruction learns from everything, paired (copy-paste) tuning from identified people alone.
SUBSETS = {"rec": ("train_rec", "train_cp"), "cp": ("train_cp",)}
PARTS = ("image", "json", "npy")
VERSION = 1
MATCH_IOU = 0.4


def match_landmarks(
    bboxes: np.ndarray, found_bboxes: np.ndarray, found_kps: np.ndarray, min_iou: float = MATCH_IOU
) -> np.ndarray:
    """Landmarks (N, 5, 2) for the boxes (N, 4): of the detection that overlaps most, each used once, best
    first.

    NaN where no detection overlaps by `min_iou`.
    """
    kps = np.full((len(bboxes), 5, 2), np.nan, np.float32)
    if len(found_bboxes) == 0:
        return kps
    overlap = box_iou(bboxes, found_bboxes)  # (N, M)
    while overlap.max() >= min_iou:
        person, detection = np.unravel_index(overlap.argmax(), overlap.shape)
        kps[person] = found_kps[detection]
        overlap[person], overlap[:, detection] = -1, -1
    return kps


@dataclass
class Catalogue:
    """Good records of one subset. Record i: shard `shards[shard[i]]`, member bytes `offsets[i]`,
    `sizes[i]`."""

    shards: list[str]
    paired: bool
    shard: np.ndarray  # (R,) int32
    keys: np.ndarray  # (R,) text
    offsets: np.ndarray  # (R, 3) int64: image, json, npy
    sizes: np.ndarray  # (R, 3) int64
    width: np.ndarray  # (R,) int32
    height: np.ndarray  # (R,) int32
    aesthetics: np.ndarray  # (R,) float32, NaN where unknown
    face_start: np.ndarray  # (R + 1,) int64: faces of record i are rows face_start[i]:face_start[i + 1] of
    kps: np.ndarray  # (T, 5, 2) float32, NaN where no landmarks were found
    names: np.ndarray  # (T,) text, "" where unidentified
    embeddings: np.ndarray  # (T, 512) float32 raw where records have no `.npy`, else (0, 512)
    bad: dict[str, int]  # reason -> records left out

    def __len__(self) -> int:
        return len(self.shard)

    @property
    def bad_share(self) -> float:
        total = len(self) + sum(self.bad.values())
        return sum(self.bad.values()) / total if total else 0.0

    def faces(self, index: int) -> slice:
        return slice(int(self.face_start[index]), int(self.face_start[index + 1]))

    def read(self, index: int, reader: ShardReader) -> Record:
        """Record `index` with the catalogue's landmarks. Raises `BadRecord` where the shard changed since."""
        path = self.shards[self.shard[index]]
        parts = {
            part: reader.read(path, int(self.offsets[index, k]), int(self.sizes[index, k]))
            for k, part in enumerate(PARTS)
            if self.sizes[index, k] > 0
        }
        record = parse_record(str(self.keys[index]), parts, paired=self.paired)
        faces = self.faces(index)
        if faces.stop - faces.start != len(record.bboxes):
            raise BadRecord("length_mismatch", "the shard changed since it was catalogued")
        record.kps = np.array(self.kps[faces])
        if record.embeddings is None:
            record.embeddings = np.array(self.embeddings[faces])
        return record


def _read_parts(members: dict[str, Member], path: str, reader: ShardReader) -> dict[str, bytes]:
    for part, reason in (("image", "missing_image"), ("json", "missing_json")):
        if part not in members:
            raise BadRecord(reason)
    return {p: reader.read(path, members[p].offset, members[p].size) for p in PARTS if p in members}


def complete_faces(
    sides: dict[str, Any], picture: np.ndarray, pack: PackReader | None
) -> tuple[np.ndarray, np.ndarray]:
    """Landmarks (N, 5, 2) and embeddings (N, 512) of a record's faces: its own, else by `pack`.

    `sides` has `bboxes`, `kps` and `embeddings`, the last two perhaps None. NaN landmarks where none were
    found. Raises `BadRecord` where an embedding is missing and cannot be made.
    """
    kps, rows = sides["kps"], sides["embeddings"]
    if kps is None:
        kps = np.full((len(sides["bboxes"]), 5, 2), np.nan, np.float32)
        if pack is not None:
            kps = match_landmarks(sides["bboxes"], *pack.detect(picture))
    if rows is None:
        if pack is None or not np.isfinite(kps).all():
            raise BadRecord("missing_embeddings", "" if pack is None else "a face was not found")
        rows = pack.embed(picture, kps)
    return kps, rows


def _complete(
    sides: dict[str, Any], image: bytes, pack: PackReader | None, where: tuple[str, str]
) -> tuple[np.ndarray, np.ndarray]:
    """`complete_faces` of a record whose picture is still encoded; decoded no further than needed.

    `BadRecord` where the picture is broken, too.
    """
    if pack is None or (sides["kps"] is not None and sides["embeddings"] is not None):
        return complete_faces(sides, decode_image(image, check_only=True), None)
    if where not in pack.made:
        pack.made[where] = complete_faces(sides, decode_image(image), pack)
    return pack.made[where]


def build_catalogue(
    shards: Sequence[str],
    *,
    paired: bool,
    known_names: set[str] | None = None,
    pack: PackReader | None = None,
    progress: Callable[[int, int], Any] | None = None,
) -> Catalogue:
    """One pass over `shards`: every record is read and checked, pictures decoded far enough to see they are
    whole.

    Args:
        paired: records must name their people (train_cp).
        known_names: people with reference photos; a paired record with anybody else is left out.
        pack: finds landmarks and embeddings where a record carries none. Without it landmarks stay unknown,
            and records without a `.npy` are left out.
        progress: called with (shards done, shards).
    """
    rows: dict[str, list] = {
        k: [] for k in ("shard", "keys", "offsets", "sizes", "wh", "aesthetics", "count")
    }
    kps_rows, name_rows, embedding_rows, bad = [], [], [], Counter()
    for number, path in enumerate(shards):
        scan, reader = scan_shard(path), ShardReader()
        bad.update(scan.bad)
        for key, members in group_members(scan.members).items():
            try:
                parts = _read_parts(members, path, reader)
                sides = parse_sides(parts["json"], parts.get("npy"), paired=paired)
                width, height = image_size(parts["image"])
                check_boxes(sides["bboxes"], width, height)
                names = sides["names"] or [""] * len(sides["bboxes"])
                if paired and known_names is not None and not known_names.issuperset(names):
                    raise BadRecord("name_without_references", ", ".join(set(names) - known_names))
                kps, embeddings = _complete(sides, parts["image"], pack, (path, key))
            except BadRecord as error:
                logger.debug("%s: %s: %s", path, key, error)
                bad[error.reason] += 1
                continue
            rows["shard"].append(number)
            rows["keys"].append(key)
            rows["offsets"].append([members[p].offset if p in members else 0 for p in PARTS])
            rows["sizes"].append([members[p].size if p in members else 0 for p in PARTS])
            rows["wh"].append((width, height))
            score = sides["aesthetics_score"]
            rows["aesthetics"].append(np.nan if score is None else score)
            rows["count"].append(len(names))
            kps_rows.append(kps)
            name_rows.extend(names)
            # kept for all faces as soon as one record needs it, so that rows stay in step
            embedding_rows.append((embeddings, "npy" not in members))
        reader.close()
        if progress:
            progress(number + 1, len(shards))
    wh = np.array(rows["wh"], np.int32).reshape(-1, 2)
    kept = [e for e, _ in embedding_rows] if any(made for _, made in embedding_rows) else []
    return Catalogue(
        shards=list(shards),
        paired=paired,
        shard=np.array(rows["shard"], np.int32),
        keys=np.array(rows["keys"], dtype=str),
        offsets=np.array(rows["offsets"], np.int64).reshape(-1, 3),
        sizes=np.array(rows["sizes"], np.int64).reshape(-1, 3),
        width=wh[:, 0],
        height=wh[:, 1],
        aesthetics=np.array(rows["aesthetics"], np.float32),
        face_start=np.concatenate([[0], np.cumsum(rows["count"])]).astype(np.int64),
        kps=np.concatenate(kps_rows).astype(np.float32) if kps_rows else np.zeros((0, 5, 2), np.float32),
        names=np.array(name_rows, dtype=str),
        embeddings=np.concatenate([np.zeros((0, 512), np.float32), *kept]),
        bad=dict(bad),
    )


_ARRAYS = (
    "shard", "keys", "offsets", "sizes", "width", "height", "aesthetics", "face_start", "kps", "names",
    "embeddings",
)  # fmt: skip


def lock_of(folder: Path) -> FileLock:
    """To be held while `folder` is written: others that would write it wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.with_name(folder.name + ".lock"))


def ensure_built(
    folder: Path,
    info_name: str,
    *,
    version: int,
    shards: Sequence[str],
    pack: PackReader | None,
    open_folder: Callable[[Path], Built],
    build: Callable[[], None],
) -> Built:
    """What `folder` keeps, opened; built first where it is missing or made of other shards or by another face
    pack, which its JSON `info_name` tells. Of runs that begin at once one builds, the others wait."""

    def is_current() -> bool:
        if not (folder / info_name).exists():
            return False
        info = json.loads((folder / info_name).read_text())
        same_pack = pack is None or info["pack"] in ("", pack.stamp)
        same_shards = info["stamps"] == [file_stamp(s) for s in shards]
        return info["version"] == version and same_shards and same_pack

    if not is_current():
        with lock_of(folder):
            if not is_current():  # still, behind a run that was quicker
                if folder.exists():
                    logger.info("%s: shards or the face pack changed, building it again", folder)
                build()
    return open_folder(folder)


def write_folder(
    folder: str | Path, arrays: dict[str, np.ndarray], info_name: str, info: dict[str, Any]
) -> None:
    """`arrays` as `.npy` (to be opened memory-mapped) and `info` as the JSON `info_name`; written aside, then
    put in the place of `folder`."""
    folder = Path(folder)
    fresh = folder.with_name(folder.name + ".partial")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for name, array in arrays.items():
        np.save(fresh / f"{name}.npy", array, allow_pickle=False)
    (fresh / info_name).write_text(json.dumps(info, indent=1))
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(fresh, folder)


def save_catalogue(catalogue: Catalogue, folder: str | Path, pack_stamp: str = "") -> None:
    """Arrays as `.npy`, the rest as `catalogue.json`. `pack_stamp` names the face pack that completed the
    records."""
    info = {
        "version": VERSION,
        "paired": catalogue.paired,
        "shards": catalogue.shards,
        "stamps": [file_stamp(s) for s in catalogue.shards],
        "pack": pack_stamp,
        "records": len(catalogue),
        "bad": catalogue.bad,
    }
    write_folder(folder, {name: getattr(catalogue, name) for name in _ARRAYS}, "catalogue.json", info)


def open_catalogue(folder: str | Path) -> Catalogue:
    """A saved catalogue, its arrays memory-mapped. `ValueError` where a shard changed since."""
    folder = Path(folder)
    info = json.loads((folder / "catalogue.json").read_text())
    if info["version"] != VERSION or info["stamps"] != [file_stamp(s) for s in info["shards"]]:
        raise ValueError(f"`folder` {folder} is out of date: a shard changed. Delete it to build it again.")
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS}
    return Catalogue(shards=info["shards"], paired=info["paired"], bad=info["bad"], **arrays)


def subset_shards(roots: str | Sequence[str], subset: str) -> list[str]:
    """The tars of one subset under one or several folders."""
    folders = [roots] if isinstance(roots, str) else roots
    return [
        shard
        for root in folders
        for name in SUBSETS[subset]
        for shard in list_shards(f"{root.rstrip('/')}/{name}")
    ]


def ensure_catalogue(
    roots: str | Sequence[str],
    subset: str,
    cache: str | Path,
    *,
    known_names: set[str] | None = None,
    pack: PackReader | None = None,
) -> Catalogue:
    """The catalogue of all records ("rec") or of the identified ones ("cp"), built where missing or old."""
    shards = subset_shards(roots, subset)
    if not shards:
        raise ValueError(
            f"`shards` {roots!r} holds no .tar under {' or '.join(SUBSETS[subset])}. Expected MultiID-2M's: "
            "train_rec/*.tar, train_cp/*.tar, ref/tars/*.tar."
        )
    folder = Path(cache) / f"catalogue_{subset}"

    def build() -> None:
        catalogue = build_catalogue(
            shards,
            paired=subset == "cp",
            known_names=known_names if subset == "cp" else None,
            pack=pack,
            progress=lambda done, total: logger.info("%s: shard %d of %d read", subset, done, total),
        )
        save_catalogue(catalogue, folder, pack.stamp if pack else "")
        report = ", ".join(f"{n} {reason} ({REASONS[reason]})" for reason, n in sorted(catalogue.bad.items()))
        logger.info(
            "%s: %d records, %d faces, %d without landmarks; left out: %s",
            subset, len(catalogue), len(catalogue.kps), int(np.isnan(catalogue.kps).any((1, 2)).sum()),
            report or "none",
        )  # fmt: skip

    return ensure_built(
        folder, "catalogue.json", version=VERSION, shards=shards, pack=pack,
        open_folder=open_catalogue, build=build,
    )  # fmt: skip
