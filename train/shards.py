"""Records of MultiID-2M as released: tar shards of `<key>.jpg`, `<key>.json`, `<key>.npy`.

Two steps. `scan_shard` reads a tar's headers and says where each record's members lie; `read_record` fetches
the bytes and `parse_record` turns them into a checked `Record`. Nothing is ever unpacked to disk, and a
pickle is read by an unpickler that admits numpy arrays and plain containers only. Whatever is wrong with a
record is a `BadRecord` with one of `REASONS`, so that damage is counted by kind.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import pickle
import posixpath
import struct
import tarfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np
from PIL import Image

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
MAX_PEOPLE = 8
MAX_IMAGE_PIXELS = 100_000_000
MAX_SIDE_FILE_BYTES = 64 * 2**20

REASONS: dict[str, str] = {
    "broken_shard": "the tar ends early or is no tar; what lies behind the break is lost",
    "path_escape": "a member's name leads out of the shard",
    "not_a_file": "a member is a link or a device",
    "missing_image": "no picture under this key",
    "missing_json": "no .json under this key",
    "missing_embeddings": "no .npy under this key, and no face pack to make it, or no face found",
    "bad_image": "the picture cannot be decoded, or is cut off",
    "bad_json": "the .json is not a JSON object",
    "bad_npy": "the .npy cannot be read as arrays",
    "unsafe_pickle": "the .npy asks for something else than numpy arrays and plain containers",
    "missing_key": "boxes, embeddings, caption or names are not there",
    "length_mismatch": "boxes, embeddings and names are not equally many",
    "bad_box": "a box is not four finite numbers",
    "zero_area_box": "a box has no area inside the picture",
    "nan_embedding": "an embedding is not 512 finite numbers, or is zero",
    "no_people": "no person in the record",
    "too_many_people": f"more than {MAX_PEOPLE} people",
    "name_without_references": "a person of a paired record has no reference photo",
    "reference_dropped": "the released rule found no reference similar enough (a choice, not damage)",
}


class BadRecord(ValueError):
    """A record that cannot be used; `reason` is a key of `REASONS`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


# --- .npy without running anything ---------------------------------------------------------------------


class _ArrayType:
    """Stands for `numpy.ndarray` in a pickle: an argument of `_reconstruct`, never callable."""


def _reconstruct(subtype: type, shape: tuple, typecode: bytes) -> np.ndarray:
    """numpy's pickles build an empty array and fill it: any other start would reserve memory at will."""
    if subtype is not _ArrayType or tuple(shape) != (0,):
        raise pickle.UnpicklingError("refused: an array that does not start empty")
    return np.empty(0, dtype=np.dtype(typecode))


def _frombuffer(buffer: bytes, dtype: np.dtype, shape: tuple, order: str) -> np.ndarray:
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order).copy()


def _scalar(dtype: np.dtype, data: bytes) -> Any:
    return np.frombuffer(data, dtype=dtype, count=1)[0]


def _bytes(text: str, encoding: str) -> bytes:
    """Protocols up to 2 store bytes as Latin-1 text."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"refused: the encoding {encoding!r}")
    return text.encode("latin1")


_ADMITTED: dict[tuple[str, str], Any] = {("numpy", "ndarray"): _ArrayType, ("numpy", "dtype"): np.dtype}
_ADMITTED["_codecs", "encode"] = _bytes
for _core in ("core", "_core"):  # the name before and since numpy 2
    _ADMITTED[f"numpy.{_core}.multiarray", "_reconstruct"] = _reconstruct
    _ADMITTED[f"numpy.{_core}.multiarray", "scalar"] = _scalar
    _ADMITTED[f"numpy.{_core}.numeric", "_frombuffer"] = _frombuffer


class _ArrayUnpickler(pickle.Unpickler):
    """Admits numpy arrays, numbers and plain containers. Everything else is refused before it is looked
    up."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"refused: {module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("refused: a persistent id")


# what the pickle machine raises on damaged input; none of these is raised by code of the pickle's own
_DAMAGED_PICKLE = (
    EOFError, IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError, MemoryError,
    RecursionError, struct.error, UnicodeDecodeError, ImportError,
)  # fmt: skip


def _unpickle(stream: BinaryIO) -> Any:
    try:
        return _ArrayUnpickler(stream).load()
    except pickle.UnpicklingError as error:
        raise BadRecord("unsafe_pickle" if "refused" in str(error) else "bad_npy", str(error)) from error
    except _DAMAGED_PICKLE as error:
        raise BadRecord("bad_npy", f"{type(error).__name__}: {error}") from error


def load_npy(data: bytes) -> Any:
    """The content of a `.npy` member: an array, or the dict that MultiID-2M stores as a pickled object array.

    Raises `BadRecord` ("unsafe_pickle", "bad_npy"). No object is built but arrays and plain containers, so
    nothing of the file's choosing is executed.
    """
    stream = io.BytesIO(data)
    if not data.startswith(b"\x93NUMPY"):
        return _unpickle(stream)
    try:
        version = np.lib.format.read_magic(stream)
        header = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        _, _, dtype = header(stream)
        if not dtype.hasobject:
            stream.seek(0)
            return np.load(stream, allow_pickle=False)
    except (ValueError, EOFError, SyntaxError, TypeError, MemoryError) as error:
        raise BadRecord("bad_npy", str(error)) from error
    value = _unpickle(stream)
    return value.item() if isinstance(value, np.ndarray) and value.shape == () else value


# --- where records lie -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """One file inside a tar: bytes `offset` to `offset + size`."""

    name: str
    offset: int
    size: int


@dataclass
class ShardScan:
    """A tar's members in their order, and what was wrong with the others (reason -> count)."""

    members: list[Member] = field(default_factory=list)
    bad: dict[str, int] = field(default_factory=dict)

    def count(self, reason: str) -> None:
        self.bad[reason] = self.bad.get(reason, 0) + 1


def is_outside(name: str) -> bool:
    """Whether a member's name leads out of the shard."""
    return (
        name.startswith(("/", "\\"))
        or ".." in name.replace("\\", "/").split("/")
        or ":" in name.split("/")[0]
    )


def list_shards(folder: str) -> list[str]:
    """The `.tar` files of a folder (a path or any fsspec address), sorted."""
    filesystem, path = fsspec.core.url_to_fs(str(folder))
    if not filesystem.exists(path):
        return []
    return sorted(filesystem.unstrip_protocol(p) if "://" in str(folder) else p
                  for p in filesystem.ls(path, detail=False) if p.endswith(".tar"))  # fmt: skip


def scan_shard(path: str) -> ShardScan:
    """Reads a tar's headers only. Members that are no plain files inside the shard are counted, not kept."""
    scan = ShardScan()
    with fsspec.open(path, "rb") as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                for info in tar:
                    if info.isdir():
                        continue
                    if is_outside(info.name):
                        scan.count("path_escape")
                    elif not info.isreg():
                        scan.count("not_a_file")
                    else:
                        scan.members.append(Member(info.name, info.offset_data, info.size))
                if not ends_well(stream, tar.offset):
                    raise tarfile.ReadError("a damaged header")
        except (tarfile.TarError, EOFError, ValueError) as error:
            logger.warning("%s: %s", path, error)
            scan.count("broken_shard")
    return scan


def ends_well(stream: BinaryIO, offset: int) -> bool:
    """Whether a tar, read up to byte `offset`, ends there: with zeros or with the file, not with a damaged
    header."""
    stream.seek(offset)
    return not stream.read(512).strip(b"\0")


def split_name(name: str) -> tuple[str, str]:
    """A member's record and part: (the path without its last suffix, `image` or the suffix)."""
    key, _, suffix = name.rpartition(".")
    suffix = suffix.lower()
    return posixpath.normpath(key or name), "image" if suffix in IMAGE_SUFFIXES else suffix


def group_members(members: list[Member]) -> dict[str, dict[str, Member]]:
    """Members by record: key (the path without its last suffix) -> suffix -> member."""
    records: dict[str, dict[str, Member]] = {}
    for member in members:
        key, part = split_name(member.name)
        records.setdefault(key, {})[part] = member
    return records


class ShardReader:
    """Bytes of members, with the most recently used shards kept open."""

    def __init__(self, max_open: int = 32) -> None:
        self._open: OrderedDict[str, BinaryIO] = OrderedDict()
        self._max_open = max_open
        self._process = os.getpid()

    def read(self, path: str, offset: int, size: int) -> bytes:
        """`size` bytes of shard `path` from `offset` on; `BadRecord("broken_shard")` where the file is
        shorter."""
        if self._process != os.getpid():  # a forked worker shares its parent's file positions
            self._open, self._process = OrderedDict(), os.getpid()
        stream = self._open.pop(path, None) or fsspec.open(path, "rb").open()
        self._open[path] = stream
        if len(self._open) > self._max_open:
            self._open.popitem(last=False)[1].close()
        stream.seek(offset)
        data = stream.read(size)
        if len(data) != size:
            raise BadRecord("broken_shard", f"{path} ends before byte {offset + size}")
        return data

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def __getstate__(self) -> dict[str, Any]:  # open files stay behind when a data worker is started
        return {**self.__dict__, "_open": OrderedDict()}


# --- one record --------------------------------------------------------------------------------------------


@dataclass
class Record:
    """One group photo with its people, everything in the picture's own pixels."""

    key: str
    image: np.ndarray  # (H, W, 3) uint8 RGB
    caption: str
    bboxes: np.ndarray  # (N, 4) float32 xyxy
    embeddings: np.ndarray | None  # (N, 512) float32, raw; None: the record has no `.npy`
    names: list[str] | None  # one a box; None: unidentified
    kps: np.ndarray | None  # (N, 5, 2) float32, where the record carries them
    aesthetics_score: float | None
    info: dict[str, Any] = field(default_factory=dict)  # the whole .json, every key
    digest: str = ""  # of the picture's bytes


def open_image(data: bytes, *, check_only: bool = False) -> Image.Image:
    """RGB picture of encoded bytes. No EXIF turn: the boxes were found on the stored pixels.

    `check_only` decodes a JPEG at an eighth of its size, which finds a cut-off file at a fraction of the
    time. Raises `BadRecord("bad_image")`.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise BadRecord("bad_image", f"{image.width} x {image.height} pixels")
            if check_only and image.format == "JPEG":
                image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except (OSError, SyntaxError, struct.error, EOFError, Image.DecompressionBombError) as error:
        raise BadRecord("bad_image", str(error)) from error


def decode_image(data: bytes, *, check_only: bool = False) -> np.ndarray:
    """What `open_image` opens, as (H, W, 3) uint8."""
    return np.asarray(open_image(data, check_only=check_only))


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) of encoded bytes, from the header alone."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except (OSError, SyntaxError, struct.error, EOFError, Image.DecompressionBombError) as error:
        raise BadRecord("bad_image", str(error)) from error


def _array(value: Any, columns: int, reason: str) -> np.ndarray:
    """`value` as (N, columns) float32, all finite."""
    try:
        array = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise BadRecord(reason, str(error)) from error
    if array.size == 0:
        array = array.reshape(0, columns)
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2 or array.shape[1] != columns or not np.isfinite(array).all():
        raise BadRecord(reason, f"shape {array.shape}")
    return array


def _names(info: Mapping[str, Any], people: int, *, required: bool) -> list[str] | None:
    """Identities, one a box: `names`, or `name` / `keyword` of a single person."""
    names = info.get("names", info.get("name", info.get("keyword") if required else None))
    if isinstance(names, str):
        names = [names]
    if not names:
        if required:
            raise BadRecord("missing_key", "names")
        return None
    if len(names) != people:
        if required:
            raise BadRecord("length_mismatch", f"{len(names)} names for {people} boxes")
        return None  # a reconstruction record: the search word, not who is where
    return [str(name) for name in names]


def _landmarks(info: Mapping[str, Any], people: int) -> np.ndarray | None:
    """Landmarks that a record carries (`kps`, one (5, 2) a box: an addition to the released layout)."""
    if info.get("kps") is None:
        return None
    try:
        kps = np.asarray(info["kps"], dtype=np.float32)
    except (TypeError, ValueError):
        return None
    return kps if kps.shape == (people, 5, 2) else None


def parse_info(json_bytes: bytes) -> dict[str, Any]:
    """The object in a record's `.json`. Raises `BadRecord("bad_json")`."""
    if len(json_bytes) > MAX_SIDE_FILE_BYTES:
        raise BadRecord("bad_json", "too large")
    try:
        info = json.loads(json_bytes)
    except (ValueError, RecursionError) as error:
        raise BadRecord("bad_json", str(error)) from error
    if not isinstance(info, dict):
        raise BadRecord("bad_json", f"a {type(info).__name__}")
    return info


def parse_sides(json_bytes: bytes, npy_bytes: bytes | None, *, paired: bool) -> dict[str, Any]:
    """The `.json` and `.npy` of a record, checked: every field of `Record` but the picture.

    `npy_bytes` None: a record without a `.npy`, whose embeddings then are None.

    Boxes are moved by the corner of `crop` where there is one (released layout: boxes are in the pixels of
    the uncropped picture).
    """
    info = parse_info(json_bytes)
    if len(npy_bytes or b"") > MAX_SIDE_FILE_BYTES:
        raise BadRecord("bad_npy", "too large")
    arrays = {} if npy_bytes is None else load_npy(npy_bytes)
    if isinstance(arrays, np.ndarray):  # without a pickle: the embeddings alone
        arrays = {"embeddings": arrays}
    if not isinstance(arrays, dict):
        raise BadRecord("missing_key", "the .npy holds no dict")
    boxes = info["bboxes"] if info.get("bboxes") is not None else arrays.get("bboxes")
    rows = arrays["embeddings"] if arrays.get("embeddings") is not None else arrays.get("embedding")
    if boxes is None or (rows is None and npy_bytes is not None):
        raise BadRecord("missing_key", "bboxes" if boxes is None else "embeddings")
    bboxes = _array(boxes, 4, "bad_box")
    embeddings = None if rows is None else _array(rows, 512, "nan_embedding")
    if embeddings is not None and len(bboxes) != len(embeddings):
        raise BadRecord("length_mismatch", f"{len(bboxes)} boxes, {len(embeddings)} embeddings")
    if len(bboxes) == 0:
        raise BadRecord("no_people")
    if len(bboxes) > MAX_PEOPLE:
        raise BadRecord("too_many_people", str(len(bboxes)))
    if embeddings is not None and not (np.abs(embeddings).max(axis=1) > 0).all():
        raise BadRecord("nan_embedding", "all zero")
    corner = np.zeros(2, np.float32)
    if info.get("crop") is not None:
        corner = _array(np.ravel(info["crop"])[:2], 2, "bad_box")[0]
    kps = _landmarks(info, len(bboxes))
    caption = info.get("caption_en", info.get("caption"))
    if not isinstance(caption, str):
        raise BadRecord("missing_key", "caption_en")
    score = info.get("aesthetics_score")
    return {
        "caption": caption,
        "bboxes": bboxes - np.tile(corner, 2),
        "embeddings": embeddings,
        "names": _names(info, len(bboxes), required=paired),
        "kps": None if kps is None else kps - corner,
        "aesthetics_score": float(score) if isinstance(score, (int, float)) else None,
        "info": info,
    }


def check_boxes(bboxes: np.ndarray, width: int, height: int) -> None:
    """Every box must have an area inside the picture."""
    x1, y1, x2, y2 = bboxes.T
    inside_w, inside_h = np.minimum(x2, width) - np.maximum(x1, 0), np.minimum(y2, height) - np.maximum(y1, 0)
    if not ((inside_w > 0) & (inside_h > 0)).all():
        raise BadRecord("zero_area_box", f"in a picture of {width} x {height}")


def parse_record(key: str, parts: Mapping[str, bytes], *, paired: bool) -> Record:
    """A checked `Record` of the members' bytes (`image`, `json`, perhaps `npy`). Raises `BadRecord`."""
    for part, reason in (("image", "missing_image"), ("json", "missing_json")):
        if part not in parts:
            raise BadRecord(reason, key)
    sides = parse_sides(parts["json"], parts.get("npy"), paired=paired)
    image = decode_image(parts["image"])
    check_boxes(sides["bboxes"], image.shape[1], image.shape[0])
    digest = hashlib.blake2b(parts["image"], digest_size=16).hexdigest()
    return Record(key=key, image=image, digest=digest, **sides)


def file_stamp(path: str) -> str:
    """Name, size and time of a local file, name and size of a remote one: changes when the shard does."""
    filesystem, inner = fsspec.core.url_to_fs(path)
    info = filesystem.info(inner)
    return f"{Path(inner).name}:{info.get('size')}:{info.get('mtime', '')}"
