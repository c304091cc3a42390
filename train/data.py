"""From records to batches, in an order that depends on seed and epoch alone.

`BatchPlan` says which records make up global batch number s: a pure function of the catalogue's sizes, the
settings and the seed. Whatever is random about a sample (its reference, noise level, noise, dropout, scales)
is drawn from a generator seeded by (seed, the sample's number). So the place in the data stream is one
counter, the stream is the same on one process and on sixteen with any number of workers, and going on from
a checkpoint needs no saved random state. Records are read at random places of their tars, which local disks
serve; for shards that lie far away `train/stream.py` reads them one after another.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from withanyone.faces import FaceAnalyzer

from .catalogue import Catalogue, ensure_catalogue
from .config import TrainConfig
from .examples import Batch, Collate, Example, ExampleMaker, assign_buckets
from .pack import PackReader
from .references import ReferenceBank, ensure_bank
from .shards import BadRecord, ShardReader

logger = logging.getLogger(__name__)

MAX_SUBSTITUTES = 50


# --- which records, in which order -------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """Sample number `position` of the stream: record `index` of `subset`, in size bucket `bucket`."""

    position: int
    subset: str
    index: int
    bucket: int


class BatchPlan:
    """The endless sequence of global batches.

    Each subset is passed through in a fresh permutation an epoch; paired samples come every 1 / paired_ratio
    positions; a batch is emitted whenever a size bucket has gathered enough. Nothing is dropped at the end of
    an epoch, so every record is seen once in it.

    Args:
        buckets_of: subset -> (R,) bucket of each record, -1 where the record is left out.
        batch_sizes: samples of a global batch, by bucket.
    """

    def __init__(
        self, buckets_of: dict[str, np.ndarray], batch_sizes: Sequence[int], paired_ratio: float, seed: int
    ) -> None:
        self.buckets_of = buckets_of
        self.batch_sizes = list(batch_sizes)
        self.paired_ratio = paired_ratio
        self.seed = seed
        self.pools = {name: np.flatnonzero(b >= 0) for name, b in buckets_of.items()}
        needed = [name for name, share in (("rec", 1 - paired_ratio), ("cp", paired_ratio)) if share > 0]
        for name in needed:
            if len(self.pools.get(name, ())) == 0:
                raise ValueError(
                    f"`paired_ratio` {paired_ratio} asks for {name!r} records, and there are none."
                )
        self._epoch: dict[str, tuple[int, np.ndarray]] = {}

    def _permutation(self, subset: str, epoch: int) -> np.ndarray:
        if self._epoch.get(subset, (-1,))[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch, subset == "cp"])
            self._epoch[subset] = (epoch, rng.permutation(self.pools[subset]))
        return self._epoch[subset][1]

    def item(self, position: int) -> Item:
        """The sample at a place of the stream, before batching."""
        before, after = (math.floor(n * self.paired_ratio) for n in (position, position + 1))
        subset, count = ("cp", before) if after > before else ("rec", position - before)
        epoch, place = divmod(count, len(self.pools[subset]))
        index = int(self._permutation(subset, epoch)[place])
        return Item(position, subset, index, int(self.buckets_of[subset][index]))

    def batches(self, start: int = 0) -> Iterator[list[Item]]:
        """Global batches from number `start` on. Skipping costs about a microsecond a sample: nothing is
        read."""
        waiting: list[list[Item]] = [[] for _ in self.batch_sizes]
        number = position = 0
        while True:
            item = self.item(position)
            position += 1
            queue = waiting[item.bucket]
            queue.append(item)
            if len(queue) == self.batch_sizes[item.bucket]:
                if number >= start:
                    yield list(queue)
                queue.clear()
                number += 1


class TrainDataset(Dataset):
    """Examples by plan item. A record that fails to be read is counted and another of its bucket taken."""

    def __init__(
        self,
        catalogues: dict[str, Catalogue],
        bank: ReferenceBank | None,
        config: TrainConfig,
        *,
        crop_size: int = 512,
    ) -> None:
        self.catalogues, self.bank, self.config, self.crop_size = catalogues, bank, config, crop_size
        self.maker = ExampleMaker(config, bank, crop_size)
        self.reader = ShardReader()
        self.buckets_of = {name: self._buckets(c) for name, c in catalogues.items()}

    def _buckets(self, catalogue: Catalogue) -> np.ndarray:
        buckets = assign_buckets(catalogue.width, catalogue.height, self.config.buckets)
        keep = np.diff(catalogue.face_start) <= self.config.max_faces
        if self.config.min_aesthetic_score is not None:
            keep &= np.nan_to_num(catalogue.aesthetics, nan=-np.inf) >= self.config.min_aesthetic_score
        return np.where(keep, buckets, -1)

    def __getitem__(self, item: Item) -> Example:
        bad: list[str] = []
        for index in self._substitutes(item):
            try:
                record = self.catalogues[item.subset].read(index, self.reader)
                return self.maker.make(
                    record, position=item.position, subset=item.subset, bucket=item.bucket,
                    reader=self.reader, bad=bad,
                )  # fmt: skip
            except BadRecord as error:
                logger.warning("record %d of %s passed over: %s", index, item.subset, error)
                bad.append(error.reason)
        raise ValueError(
            f"`shards`: {len(bad)} records in a row could not be used, for the reasons {sorted(set(bad))}."
        )

    def _substitutes(self, item: Item) -> Iterator[int]:
        yield item.index
        same = np.flatnonzero(self.buckets_of[item.subset] == item.bucket)
        place = int(np.searchsorted(same, item.index))
        for k in range(1, min(len(same), MAX_SUBSTITUTES)):
            yield int(same[(place + k) % len(same)])


# --- opening everything -------------------------------------------------------------------------------------


def subsets_of(config: TrainConfig) -> list[str]:
    """The subsets that a run reads, by `paired_ratio`."""
    shares = (("rec", 1 - config.paired_ratio), ("cp", config.paired_ratio))
    return [name for name, share in shares if share > 0]


def open_bank_of(config: TrainConfig, pack: PackReader | None) -> ReferenceBank | None:
    """The reference bank where the run needs one, built where it is missing."""
    if config.paired_ratio > 0 or config.contrastive_loss_weight > 0:
        return ensure_bank(config.shards, config.cache_path / "bank", pack=pack)
    return None


def open_data(
    config: TrainConfig, analyzer: FaceAnalyzer | None = None
) -> tuple[dict[str, Catalogue], ReferenceBank | None]:
    """Catalogues and reference bank of a run, built where they are missing (once, with `analyzer`'s help).

    Raises `ValueError` where more than `max_bad_share` of the records are damaged.
    """

    pack = PackReader(analyzer) if analyzer and config.complete_records else None
    bank = open_bank_of(config, pack)
    subsets = subsets_of(config)
    catalogues = {
        name: ensure_catalogue(
            config.roots, name, config.cache_path,
            known_names=bank.known_names if bank else None,
            pack=pack,
        )
        for name in subsets
    }  # fmt: skip
    for name, catalogue in catalogues.items():
        if catalogue.bad_share > config.max_bad_share:
            raise ValueError(
                f"`shards` {config.shards!r}: {catalogue.bad_share:.1%} of the {name!r} records are damaged, "
                f"more than `max_bad_share` ({config.max_bad_share:.1%}): {catalogue.bad}."
            )
    return catalogues, bank


class _RankBatches:
    """This process's part of each global batch, from batch `start` on."""

    def __init__(self, plan: BatchPlan, start: int, rank: int, world_size: int) -> None:
        self.plan, self.start, self.rank, self.world_size = plan, start, rank, world_size

    def __iter__(self) -> Iterator[list[Item]]:
        for items in self.plan.batches(self.start):
            share = len(items) // self.world_size
            yield items[self.rank * share : (self.rank + 1) * share]


def batch_sizes(config: TrainConfig, world_size: int) -> list[int]:
    """Samples of a global batch, by bucket; they must divide among the processes."""
    sizes = [bucket[2] if len(bucket) == 3 else config.train_batch_size for bucket in config.buckets]
    for size in sizes:
        if size % world_size:
            raise ValueError(
                f"`train_batch_size` (or a bucket's own) is {size} samples over all processes, which "
                f"does not divide among {world_size}."
            )
    return sizes


def make_plan(dataset: TrainDataset, config: TrainConfig, world_size: int = 1) -> BatchPlan:
    """The run's plan. Batch sizes count samples over all processes."""
    sizes = batch_sizes(config, world_size)
    return BatchPlan(dataset.buckets_of, sizes, config.paired_ratio, config.seed)


def make_loader(
    dataset: TrainDataset,
    plan: BatchPlan,
    *,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    prepare: Callable[[list[Image.Image]], Tensor] | None = None,
) -> DataLoader:
    """Batches of this process in the plan's order from batch `start` on, whatever the number of workers."""
    return DataLoader(
        dataset,
        batch_sampler=_RankBatches(plan, start, rank, world_size),
        num_workers=num_workers,
        collate_fn=Collate(prepare),
        persistent_workers=num_workers > 0,
    )


class PlannedBatches:
    """This process's batches in the plan's order: the place in the stream is the batch's number."""

    def __init__(
        self,
        dataset: TrainDataset,
        config: TrainConfig,
        rank: int = 0,
        world_size: int = 1,
        prepare: Callable[[list[Image.Image]], Tensor] | None = None,
    ) -> None:
        self.dataset, self.num_workers, self.prepare = dataset, config.dataloader_num_workers, prepare
        self.rank, self.world_size = rank, world_size
        self.plan = make_plan(dataset, config, world_size)

    def batches(self, start: int) -> Iterator[Batch]:
        """Batches from global number `start` on, for ever."""
        yield from make_loader(
            self.dataset, self.plan, start=start, rank=self.rank, world_size=self.world_size,
            num_workers=self.num_workers, prepare=self.prepare,
        )  # fmt: skip

    def state(self) -> dict:
        """Nothing: the batch's number says it all."""
        return {}

    def load_state(self, states: list[dict]) -> None:
        """Nothing to restore."""
