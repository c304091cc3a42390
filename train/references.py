"""The reference bank: embeddings of everybody's reference photos, and where each photo lies in the `ref`
tars.

Built once (`python -m train references`), opened memory-mapped. Photos are sorted by identity, so one
person's photos are a range of rows and leaving people out of a draw is arithmetic on ranges:

    embeddings.npy (P, 512) float32, raw      bbox.npy (P, 4) the face in its photo
    names.npy (I,) people, sorted             start.npy (I + 1,) rows of person i: start[i]:start[i + 1]
    location.npy (P, 3) shard, offset, size   bank.json shards, counts
    features.npy (P, T, C) float16: image features of the face crops, if they were kept
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .catalogue import ensure_built, write_folder
from .pack import PackReader
from .shards import (
    BadRecord,
    Member,
    ShardReader,
    decode_image,
    file_stamp,
    group_members,
    list_shards,
    load_npy,
    open_image,
    parse_info,
    scan_shard,
)

logger = logging.getLogger(__name__)

VERSION = 1
REFERENCE_TARS = "ref/tars"
_ARRAYS = ("embeddings", "bbox", "names", "start", "location")


@dataclass
class ReferenceBank:
    """Reference photos of I people, P in all. `identity` is a person's number here, -1 where unknown."""

    shards: list[str]
    embeddings: np.ndarray  # (P, 512) float32, raw
    bbox: np.ndarray  # (P, 4) float32 xyxy in the photo's pixels
    names: np.ndarray  # (I,) text, sorted
    start: np.ndarray  # (I + 1,) int64
    location: np.ndarray  # (P, 3) int64: shard, offset, size
    features: np.ndarray | None = None  # (P, T, C) float16

    def __post_init__(self) -> None:
        self._number = {str(name): i for i, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.embeddings)

    @property
    def known_names(self) -> set[str]:
        return set(self._number)

    def identity(self, name: str) -> int:
        """The person's number, -1 for somebody without reference photos."""
        return self._number.get(name, -1)

    def photos(self, identity: int) -> range:
        """Rows of one person's photos."""
        if not 0 <= identity < len(self.names):
            raise ValueError(f"`identity` is {identity}; the bank knows 0 to {len(self.names) - 1}.")
        return range(int(self.start[identity]), int(self.start[identity + 1]))

    def read_photo(self, row: int, reader: ShardReader) -> Image.Image:
        """The photo itself, read from its tar. Raises `BadRecord`."""
        shard, offset, size = (int(v) for v in self.location[row])
        return open_image(reader.read(self.shards[shard], offset, size))


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows (..., D) at length 1."""
    rows = np.asarray(rows, dtype=np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


# --- choosing a reference, drawing negatives --------------------------------------------------------------


def choose_reference(
    bank: ReferenceBank,
    identity: int,
    rng: np.random.Generator,
    *,
    rule: str = "random",
    target_embeddings: np.ndarray | None = None,
    draws: int = 20,
    stop_above: float = 0.8,
    drop_below: float = 0.6,
) -> int | None:
    """A row of the bank to be person `identity`'s reference, or None where the sample should be dropped.

    "random" (paper, section 4.2): any of the person's photos. "released" (the released loader): of `draws`
    photos drawn the one most similar to any face of the target (`target_embeddings` (N, 512)); the first
    above `stop_above` is taken at once, and where the best is below `drop_below` there is none. It favours
    copying.
    """
    photos = bank.photos(identity)
    if rule == "random":
        return photos[int(rng.integers(len(photos)))]
    if rule != "released":
        raise ValueError(f"`rule` is {rule!r}; use 'random' or 'released'.")
    if target_embeddings is None:
        raise ValueError("`target_embeddings` are needed by the released rule: (N, 512), the target's faces.")
    drawn = np.asarray(photos)[rng.permutation(len(photos))[:draws]]
    cosines = (unit(bank.embeddings[np.sort(drawn)]) @ unit(target_embeddings).T).max(axis=1)  # (draws,)
    cosines = cosines[np.argsort(np.argsort(drawn))]  # back in the order drawn
    above = np.flatnonzero(cosines > stop_above)
    best = int(above[0]) if len(above) else int(cosines.argmax())
    return int(drawn[best]) if cosines[best] >= drop_below else None


def same_person_quantile(bank: ReferenceBank, quantile: float, pairs: int = 4096, seed: int = 0) -> float:
    """The `quantile` of cosines between two photos of one person: thresholds relative to the data at hand."""
    rng = np.random.default_rng(seed)
    count = np.diff(bank.start)
    people = rng.choice(np.flatnonzero(count > 1), pairs)
    first = rng.integers(0, count[people])
    second = (first + rng.integers(1, count[people])) % count[people]
    rows = bank.start[people]
    a, b = unit(bank.embeddings[rows + first]), unit(bank.embeddings[rows + second])
    return float(np.quantile((a * b).sum(1), quantile))


def draw_negatives(
    bank: ReferenceBank, identities: Sequence[int] | np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
    """`count` rows of other people's photos, one set for a whole batch: nobody of `identities` is among them.

    Uniform over the rows that remain, with replacement. Vectorised: numbers below the remaining count are
    drawn and moved past the ranges of rows that are left out. Entries of -1 (unidentified) leave nobody out.
    """
    out = np.unique(np.asarray(identities, dtype=np.int64))
    out = out[out >= 0]
    first, lengths = bank.start[out], bank.start[out + 1] - bank.start[out]
    skipped = np.concatenate([[0], np.cumsum(lengths)])  # rows left out before the k-th gap
    remaining = len(bank) - int(skipped[-1])
    if remaining < 1:
        raise ValueError("`identities` are all people of the bank: nobody is left to draw negatives from.")
    drawn = rng.integers(0, remaining, count)
    gap = np.searchsorted(first - skipped[:-1], drawn, side="right")
    return drawn + skipped[gap]


# --- building ----------------------------------------------------------------------------------------------


def _embedding_and_box(
    members: dict[str, Member], shard: str, reader: ShardReader, pack: PackReader | None
) -> tuple[np.ndarray, np.ndarray]:
    """A photo's raw embedding (512,) and face box (4,): from its `.npy` (the box perhaps from a `.json`),
    else by `pack`."""
    picture = members["image"]
    if "npy" in members:
        value = load_npy(reader.read(shard, members["npy"].offset, members["npy"].size))
        box = None
        if isinstance(value, dict):
            box = value.get("bboxes", value.get("bbox"))
            value = value.get("embeddings", value.get("embedding"))
        if value is None:
            raise BadRecord("missing_key", "embedding")
        if box is None and "json" in members:
            box = parse_info(reader.read(shard, members["json"].offset, members["json"].size)).get("bboxes")
        try:
            embedding = np.asarray(value, dtype=np.float32).reshape(-1, 512)
            box = None if box is None else np.asarray(box, dtype=np.float32).reshape(-1, 4)
        except (TypeError, ValueError) as error:
            raise BadRecord("nan_embedding", str(error)) from error
        if len(embedding) != 1 or not np.isfinite(embedding).all() or not np.abs(embedding).max() > 0:
            raise BadRecord("nan_embedding" if len(embedding) == 1 else "length_mismatch")
        image = decode_image(reader.read(shard, picture.offset, picture.size), check_only=box is not None)
        if box is None:  # a photo cut to the face
            box = np.array([[0, 0, image.shape[1], image.shape[0]]], np.float32)
        if len(box) != 1 or not np.isfinite(box).all() or not (box[0, 2:] > box[0, :2]).all():
            raise BadRecord("bad_box")
        return embedding[0], box[0]
    image = decode_image(reader.read(shard, picture.offset, picture.size))
    if pack is None:
        raise BadRecord("missing_embeddings", picture.name)
    found = pack.largest(image)
    if found is None:
        raise BadRecord("no_people", picture.name)
    box, embedding = found
    return np.asarray(embedding, np.float32), np.asarray(box, np.float32)


def build_bank(
    shards: Sequence[str], folder: str | Path, *, pack: PackReader | None = None
) -> tuple[ReferenceBank, dict[str, int]]:
    """Writes the bank of `shards` (tars with one folder a person) to `folder`; returns it and what was left
    out.

    A photo `person/photo.jpg` takes its embedding from `person/photo.npy` beside it (an array (512,), or a
    dict with `embedding` and `bboxes`) or, where there is none, its largest face by `pack`.
    """
    rows: list[tuple[str, tuple[int, int, int], np.ndarray, np.ndarray]] = []
    bad: Counter[str] = Counter()
    for number, shard in enumerate(shards):
        scan, reader = scan_shard(shard), ShardReader()
        bad.update(scan.bad)
        for key, members in group_members(scan.members).items():
            if "image" not in members:
                bad["missing_image"] += 1
                continue
            try:
                embedding, box = _embedding_and_box(members, shard, reader, pack)
            except BadRecord as error:
                logger.debug("%s: %s: %s", shard, key, error)
                bad[error.reason] += 1
                continue
            person = key.rpartition("/")[0] or Path(shard).stem
            rows.append((person, (number, members["image"].offset, members["image"].size), embedding, box))
        reader.close()
    if not rows:
        raise ValueError(
            f"`shards` hold no usable reference photo. Left out: {dict(bad) or 'nothing was there'}."
        )
    rows.sort(key=lambda row: row[:2])
    names, start = np.unique([row[0] for row in rows], return_index=True)
    arrays = {
        "embeddings": np.stack([row[2] for row in rows]).astype(np.float32),
        "bbox": np.stack([row[3] for row in rows]).astype(np.float32),
        "names": names,
        "start": np.append(start, len(rows)).astype(np.int64),
        "location": np.array([row[1] for row in rows], np.int64),
    }
    info = {
        "version": VERSION,
        "shards": list(shards),
        "stamps": [file_stamp(s) for s in shards],
        "pack": pack.stamp if pack else "",
        "photos": len(rows),
        "people": len(names),
        "bad": dict(bad),
    }
    write_folder(folder, arrays, "bank.json", info)
    return open_bank(folder), dict(bad)


def open_bank(folder: str | Path) -> ReferenceBank:
    """A bank on disk, memory-mapped. `ValueError` where there is none, or its shards changed."""
    folder = Path(folder)
    if not (folder / "bank.json").exists():
        raise ValueError(f"`folder` {folder} holds no reference bank; build one: python -m train references.")
    info = json.loads((folder / "bank.json").read_text())
    if info["version"] != VERSION or info["stamps"] != [file_stamp(s) for s in info["shards"]]:
        raise ValueError(
            f"`folder` {folder}: the bank's shards changed; build it again: python -m train references."
        )
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS}
    features = folder / "features.npy"
    return ReferenceBank(
        shards=info["shards"],
        **{**arrays, "start": np.array(arrays["start"])},
        features=np.load(features, mmap_mode="r", allow_pickle=False) if features.exists() else None,
    )


def ensure_bank(root: str, folder: str | Path, *, pack: PackReader | None = None) -> ReferenceBank:
    """The bank of `root`/ref/tars at `folder`, built where it is missing or its shards changed."""
    shards = list_shards(f"{root.rstrip('/')}/{REFERENCE_TARS}")
    if not shards:
        raise ValueError(f"`shards` {root!r} holds no .tar under {REFERENCE_TARS}/: no reference photos.")

    def build() -> None:
        bank, bad = build_bank(shards, folder, pack=pack)
        logger.info(
            "%d reference photos of %d people; left out: %s", len(bank), len(bank.names), bad or "none"
        )

    return ensure_built(
        Path(folder), "bank.json", version=VERSION, shards=shards, pack=pack,
        open_folder=open_bank, build=build,
    )  # fmt: skip


def cache_features(
    bank: ReferenceBank,
    folder: str | Path,
    encode: Callable[[list[Image.Image]], np.ndarray],
    crop: Callable[[Image.Image, np.ndarray], Image.Image],
    batch_size: int = 64,
) -> ReferenceBank:
    """Keeps the image features of every reference's face crop (`features.npy`), so that training reads no
    photo.

    `crop(photo, bbox)` cuts the face; `encode(crops)` gives (B, T, C).
    """
    reader, out = ShardReader(), None
    fresh = Path(folder) / "features.partial.npy"
    for begin in range(0, len(bank), batch_size):
        rows = range(begin, min(begin + batch_size, len(bank)))
        features = encode([crop(bank.read_photo(row, reader), bank.bbox[row]) for row in rows])
        if out is None:
            out = np.lib.format.open_memmap(fresh, "w+", np.float16, (len(bank), *features.shape[1:]))
        out[begin : begin + len(rows)] = features
    reader.close()
    if out is not None:
        out.flush()
        fresh.replace(Path(folder) / "features.npy")
    return open_bank(folder)
