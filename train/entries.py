"""Shards read in sequence: the entries of one tar, and of one lane's shards in shuffled blocks."""

from __future__ import annotations

import logging
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import fsspec
import numpy as np

from .shards import ends_well, is_outside, split_name

logger = logging.getLogger(__name__)

MAX_MEMBER_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Entry:
    """A record as it lies in its shard, from byte `offset` on; or, with a `reason`, what stands in one's
    place."""

    shard: str
    offset: int
    key: str
    parts: dict[str, bytes]  # image, json, npy
    reason: str = ""


def read_entries(path: str, offset: int = 0) -> Iterator[Entry]:
    """The entries of a tar in their order, from the one that begins at byte `offset` on.

    Members of one record must lie side by side, as WebDataset writes them. Nothing is kept but the entry at
    work. A shard that breaks off ends with an entry "broken_shard".
    """
    waiting: Entry | None = None
    whole, end = False, offset
    with fsspec.open(path, "rb") as stream:
        stream.seek(offset)
        try:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                while (info := tar.next()) is not None:
                    tar.members = []  # tarfile remembers every header it has seen
                    end = info.offset
                    if info.isdir():
                        continue
                    key, part = split_name(info.name)
                    reason = _refused(info)
                    if waiting is not None and (reason or waiting.key != key):
                        yield waiting
                        waiting = None
                    if reason:
                        yield Entry(path, info.offset, info.name, {}, reason)
                        continue
                    stream.seek(info.offset_data)
                    data = stream.read(info.size)
                    if len(data) != info.size:
                        raise EOFError(f"ends inside {info.name}")
                    if waiting is None:
                        waiting = Entry(path, info.offset, key, {})
                    waiting.parts[part] = data
                end = tar.offset
                whole = ends_well(stream, end)
        except (tarfile.TarError, EOFError, ValueError) as error:
            logger.warning("%s: %s", path, error)
    if waiting is not None:
        yield waiting
    if not whole:
        yield Entry(path, end, "", {}, "broken_shard")


def _refused(info: tarfile.TarInfo) -> str:
    """Why a member is not read, "" where it is."""
    if is_outside(info.name):
        return "path_escape"
    if not info.isreg():
        return "not_a_file"
    return "bad_image" if info.size > MAX_MEMBER_BYTES else ""


@dataclass(frozen=True)
class Place:
    """Where the reading of one subset stands in a lane."""

    epoch: int = 0  # passes that are behind
    shard: int = 0  # of the lane's shards in this pass, the one where the block begins
    offset: int = 0  # the byte there
    index: int = 0  # records of the shuffled block that are behind


def lane_entries(
    shards: Sequence[str], place: Place, *, seed: int, subset: str, lane: int, lanes: int, shuffle: int
) -> Iterator[tuple[Entry, Place]]:
    """A lane's entries of one subset for ever, from `place` on, each with the place behind it."""
    code = int(subset == "cp")
    epoch, first, offset, behind = place.epoch, place.shard, place.offset, place.index
    while True:
        order = np.random.default_rng([seed, 4, epoch, code]).permutation(len(shards))[lane::lanes]
        block: list[Entry] = []
        begin = (first, offset)

        def shuffled(
            block: list[Entry], begin: tuple[int, int], behind: int, epoch: int = epoch
        ) -> Iterator[tuple[Entry, Place]]:
            rng = np.random.default_rng([seed, 5, epoch, code, lane, *begin])
            for index, k in enumerate(rng.permutation(len(block))[behind:].tolist(), behind + 1):
                yield block[k], Place(epoch, *begin, index)

        for number in range(first, len(order)):
            for entry in read_entries(shards[order[number]], offset):
                if len(block) == shuffle:
                    yield from shuffled(block, begin, behind)
                    block, behind = [], 0
                if not block:
                    begin = (number, entry.offset)
                block.append(entry)
            offset = 0
        if block:
            yield from shuffled(block, begin, behind)
        epoch, first, offset, behind = epoch + 1, 0, 0, 0
