"""Shards read one after another: for data that lies far away (`hf://datasets/...`, any fsspec address).

No pass ahead and no random access. The order still is a function of seed and pass alone. The shards of a
subset are shuffled for each pass and dealt to `stream_lanes` *lanes*; a lane reads its shards in sequence,
`stream_shuffle` records at a time, which it shuffles (a block). Sample number n of the stream is sample
n // L of lane n mod L. A lane is read by one data worker of one process, so nothing is read twice, and as
long as processes times workers divide L the samples and their order are the same whatever their numbers.
With one size bucket so are the batches. With several, each process fills its batches from its own lanes,
since nobody knows the sizes of pictures that others read: which samples share a batch then depends on the
number of processes. A lane that is shorter than others begins its next pass earlier.

Going on needs a *place* for each lane: pass, shard, byte where the block begins, and how many of its records
are behind. datasets' own shuffle buffer cannot say that; `IterableDataset` is used for what it does well,
handing parts to workers, by `from_generator` over our own reader (its webdataset builder drops every JSON key
that the first five records lack).

The landmarks that records lack are found once and kept (`faces_*.sqlite` in `cache_dir`).
"""

from __future__ import annotations

import heapq
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import IterableDataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from withanyone import FaceAnalyzer

from .catalogue import complete_faces, subset_shards
from .config import TrainConfig
from .data import batch_sizes, subsets_of
from .entries import Entry, Place, lane_entries, read_entries
from .examples import Batch, Example, ExampleMaker, collate
from .facestore import FaceStore
from .pack import PackReader
from .references import ReferenceBank, open_bank
from .shards import BadRecord, Record, ShardReader, load_npy, parse_info, parse_record

logger = logging.getLogger(__name__)

GOLDEN = 0.6180339887498949  # spreads the paired samples over the lanes


def _raw_records(shards: list[str]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        for entry in read_entries(shard):
            info, arrays, bad = None, None, entry.reason
            try:
                if "json" in entry.parts:
                    info = parse_info(entry.parts["json"])
                if "npy" in entry.parts:
                    arrays = load_npy(entry.parts["npy"])
            except BadRecord as error:
                bad = error.reason
            yield {
                "shard": shard,
                "key": entry.key,
                "image": entry.parts.get("image"),
                "json": info,
                "npy": arrays,
                "bad": bad,
            }


def open_records(shards: Sequence[str]) -> IterableDataset:
    """The records of `shards` as they are, as an HF `IterableDataset`: for looking at, `map` and `filter`.

    Columns: shard, key, image (bytes), json (every key of it), npy (read safely), bad (why an entry is no
    record, or ""). Splits by shards among data workers and nodes.
    """
    return IterableDataset.from_generator(_raw_records, gen_kwargs={"shards": list(shards)})


@dataclass(frozen=True)
class LaneState:
    """A lane's next sample (`count` are behind) and its place in each subset."""

    count: int = 0
    places: dict[str, Place] = field(default_factory=dict)

    def as_json(self) -> list:
        return [self.count, {k: [p.epoch, p.shard, p.offset, p.index] for k, p in self.places.items()}]

    @classmethod
    def from_json(cls, value: list) -> LaneState:
        return cls(int(value[0]), {k: Place(*map(int, v)) for k, v in value[1].items()})


@dataclass(frozen=True)
class Sample:
    """A sample with all that is needed to go on behind it, or to read it again."""

    lane: int
    after: LaneState
    subset: str
    shard: str
    offset: int
    bucket: int
    example: Example


def subset_of(count: int, lane: int, paired_ratio: float) -> str:
    """The subset of a lane's sample number `count`: cp every 1 / paired_ratio, out of step among lanes."""
    phase = lane * GOLDEN % 1
    return "cp" if int((count + 1) * paired_ratio + phase) > int(count * paired_ratio + phase) else "rec"


class LaneReader:
    """Samples of lanes. Light to send to a worker: what is large or bound to a process is opened there."""

    def __init__(
        self,
        config: TrainConfig,
        shards: dict[str, list[str]],
        bank: ReferenceBank | None,
        analyzer: FaceAnalyzer,
    ) -> None:
        self.config, self.shards, self.crop_size = config, shards, analyzer.crop_size
        self.bank = bank
        self.store = None
        self._analyzer = None
        if config.complete_records:
            self._analyzer = {
                "folder": str(analyzer.folder), "det_size": analyzer.det_size,
                "det_thresh": analyzer.det_thresh, "crop_size": analyzer.crop_size,
                "enlarge": analyzer.enlarge, "pack": analyzer.pack,
            }  # fmt: skip
            stamp = PackReader(analyzer).stamp
            self.store = FaceStore(Path(config.cache_path) / f"faces_{stamp}.sqlite")
        self._forget()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._reader, self._pack = ShardReader(), None
        self._maker: ExampleMaker | None = None

    def __getstate__(self) -> dict[str, Any]:
        folder = self.config.cache_path / "bank" if self.bank is not None else None
        return {**self.__dict__, "bank": folder, "_reader": None, "_pack": None, "_maker": None}

    def _own(self) -> None:
        """Opens what this process needs."""
        if self._process != os.getpid():
            self._forget()
        if isinstance(self.bank, Path):
            self.bank = open_bank(self.bank)
        if self._maker is None:
            self._reader = ShardReader()
            self._maker = ExampleMaker(self.config, self.bank, self.crop_size)

    def samples(self, lane: int, state: LaneState) -> Iterator[Sample]:
        """A lane's samples for ever, from `state` on. What cannot be used is named in the next example."""
        self._own()
        config = self.config
        places = dict(state.places)
        entries: dict[str, Iterator[tuple[Entry, Place]]] = {}
        for count in range(state.count, 2**62):
            subset = subset_of(count, lane, config.paired_ratio)
            if subset not in entries:
                entries[subset] = lane_entries(
                    self.shards[subset], places.get(subset, Place()), seed=config.seed, subset=subset,
                    lane=lane, lanes=config.stream_lanes, shuffle=config.stream_shuffle,
                )  # fmt: skip
            bad: list[str] = []
            first = places.get(subset, Place()).epoch
            for entry, place in entries[subset]:
                places[subset] = place
                if place.epoch > first + 1:
                    raise ValueError(
                        f"`shards`: lane {lane} of {subset!r} has no record that can be used; reasons: "
                        f"{sorted(set(bad)) or 'settings leave all of them out'}."
                    )
                sample = self._sample(entry, subset, count * config.stream_lanes + lane, bad)
                if sample is not None:
                    bucket, example = sample
                    after = LaneState(count + 1, dict(places))
                    yield Sample(lane, after, subset, entry.shard, entry.offset, bucket, example)
                    break

    def _sample(self, entry: Entry, subset: str, position: int, bad: list[str]) -> tuple[int, Example] | None:
        """Bucket and example of an entry; None, with the reason in `bad`, where it cannot be used."""
        try:
            record = self._record(entry, subset)
            if not self._is_wanted(record):
                return None
            bucket = self._maker.bucket_of(record)
            example = self._maker.make(
                record, position=position, subset=subset, bucket=bucket, reader=self._reader, bad=list(bad)
            )
        except BadRecord as error:
            logger.debug("%s: %s: %s", entry.shard, entry.key, error)
            bad.append(error.reason)
            return None
        return bucket, example

    def _is_wanted(self, record: Record) -> bool:
        """Not left out by the settings."""
        floor, score = self.config.min_aesthetic_score, record.aesthetics_score
        good = floor is None or (score is not None and score >= floor)
        return good and len(record.bboxes) <= self.config.max_faces

    def _record(self, entry: Entry, subset: str) -> Record:
        """The entry parsed, checked, and with landmarks and embeddings. Raises `BadRecord`."""
        if entry.reason:
            raise BadRecord(entry.reason, entry.key)
        record = parse_record(entry.key, entry.parts, paired=subset == "cp")
        if subset == "cp" and self.bank is not None and not self.bank.known_names.issuperset(record.names):
            raise BadRecord("name_without_references", record.key)
        if record.kps is None or record.embeddings is None:
            found = self.store.get(record) if self.store else None
            if found is None:
                pack = self._face_pack()
                sides = {"kps": record.kps, "embeddings": record.embeddings, "bboxes": record.bboxes}
                found = complete_faces(sides, record.image, pack)
                if self.store:
                    self.store.put(record, *found)
            record.kps, record.embeddings = found
        return record

    def _face_pack(self) -> PackReader | None:
        if self._pack is None and self._analyzer is not None:
            analyzer = FaceAnalyzer(**self._analyzer, providers=["CPUExecutionProvider"])
            self._pack = PackReader(analyzer)
        return self._pack

    def read_again(self, waiting: Sequence) -> Sample:
        """A sample by [subset, shard, offset, position, bucket], as it was."""
        self._own()
        subset, shard, offset, position, bucket = waiting
        entry = next(read_entries(shard, offset))
        found = self._sample(entry, subset, position, bad := [])
        if found is None:
            raise ValueError(f"`shards`: {shard} changed since the checkpoint: {bad} at byte {offset}.")
        return Sample(-1, LaneState(), subset, shard, offset, bucket, found[1])


def read_lanes(parts: list[list[tuple[int, list]]], reader: LaneReader) -> Iterator[dict[str, Sample]]:
    """The samples of one worker's lanes, (lane, state) each, by their place in the stream."""
    turns = []
    for lane, state in (pair for part in parts for pair in part):
        state = LaneState.from_json(state)
        samples = reader.samples(lane, state)
        heapq.heappush(turns, (state.count * reader.config.stream_lanes + lane, lane, samples))
    while turns:
        position, lane, samples = turns[0]
        yield {"sample": next(samples)}
        heapq.heapreplace(turns, (position + reader.config.stream_lanes, lane, samples))


class StreamedBatches:
    """This process's batches of the stream, with the places to go on from.

    `state()` says where this process stands; `load_state` takes the states of all processes, whose number
    may have been another one.
    """

    def __init__(
        self,
        config: TrainConfig,
        bank: ReferenceBank | None,
        analyzer: FaceAnalyzer,
        *,
        rank: int = 0,
        world_size: int = 1,
        prepare: Callable[[list[Image.Image]], Tensor] | None = None,
    ) -> None:
        lanes, workers = config.stream_lanes, max(1, config.dataloader_num_workers)
        if lanes % (world_size * workers):
            raise ValueError(
                f"`stream_lanes` {lanes} does not divide among {world_size} processes of {workers} workers: "
                "set it to a multiple of their product."
            )
        shards = {name: subset_shards(config.roots, name) for name in subsets_of(config)}
        for name, paths in shards.items():
            if len(paths) < lanes:
                raise ValueError(
                    f"`stream_lanes` is {lanes}, but {name!r} has {len(paths)} shards: at most that many."
                )
        self.config, self.prepare, self.rank, self.world_size = config, prepare, rank, world_size
        self.sizes = [size // world_size for size in batch_sizes(config, world_size)]
        self.reader = LaneReader(config, shards, bank, analyzer)
        self.states = {lane: LaneState() for lane in range(rank, lanes, world_size)}
        self.waiting: list[list[Sample]] = [[] for _ in self.sizes]
        self._fresh = True

    def parts(self) -> list[list[tuple[int, list]]]:
        """The lanes of each worker with their states: worker 0 has the stream's next sample."""
        workers = max(1, self.config.dataloader_num_workers)
        lanes = self.config.stream_lanes
        turn = {
            lane: (state.count * lanes + lane - self.rank) // self.world_size
            for lane, state in self.states.items()
        }
        first = min(turn.values())
        parts: list[list[tuple[int, list]]] = [[] for _ in range(workers)]
        for lane, state in self.states.items():
            parts[(turn[lane] - first) % workers].append((lane, state.as_json()))
        return parts

    def dataset(self) -> IterableDataset:
        """This process's samples as an HF dataset, one part a worker."""
        return IterableDataset.from_generator(
            read_lanes, gen_kwargs={"parts": self.parts(), "reader": self.reader}
        )

    def batches(self, start: int) -> Iterator[Batch]:
        """Batches from where the states stand, for ever; `start` must be 0 where no state was loaded."""
        if start and self._fresh:
            raise ValueError(
                "the checkpoint was made without `streaming`, so it does not say where the stream was: go on "
                "with the setting it was made with."
            )
        loader = DataLoader(
            self.dataset(), batch_size=None, collate_fn=_same,
            num_workers=self.config.dataloader_num_workers,
        )  # fmt: skip
        for row in loader:
            sample: Sample = row["sample"]
            self.states[sample.lane] = sample.after
            queue = self.waiting[sample.bucket]
            queue.append(sample)
            if len(queue) == self.sizes[sample.bucket]:
                examples = [s.example for s in queue]
                queue.clear()
                yield collate(examples, self.prepare)

    def state(self) -> dict[str, Any]:
        """Places of this process's lanes, and samples that wait for a full batch."""
        return {
            "lanes": {str(lane): state.as_json() for lane, state in self.states.items()},
            "waiting": [
                [s.subset, s.shard, s.offset, s.example.position, s.bucket] for q in self.waiting for s in q
            ],
        }

    def load_state(self, states: list[dict[str, Any]]) -> None:
        """Goes on where `states` (of all processes of the run before) stood."""
        lanes = {
            int(k): LaneState.from_json(v) for state in states for k, v in state.get("lanes", {}).items()
        }
        if not lanes:
            return
        if sorted(lanes) != list(range(self.config.stream_lanes)):
            raise ValueError(
                f"the checkpoint was made with {len(lanes)} lanes, `stream_lanes` is "
                f"{self.config.stream_lanes}: it cannot change within a run."
            )
        self._fresh = False
        self.states = {lane: lanes[lane] for lane in self.states}
        waiting = sorted((w for state in states for w in state["waiting"]), key=lambda w: w[3])
        self.waiting = [[] for _ in self.sizes]
        for entry in waiting:
            if entry[3] % self.world_size == self.rank:
                self.waiting[entry[4]].append(self.reader.read_again(entry))


def _same(row: Any) -> Any:
    return row
