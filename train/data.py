"""From records to batches, in an order that depends on seed and epoch alone.

`BatchPlan` says which records make up global batch number s: a pure function of the catalogue's sizes, the
settings and the seed. Whatever is random about a sample (its reference, noise level, noise, dropout, scales)
is drawn from a generator seeded by (seed, the sample's number). So the place in the data stream is one
counter, the stream is the same on one process and on sixteen with any number of workers, and going on from
a checkpoint needs no saved random state. Records are read at random places of their tars, which local disks
and fsspec's range requests serve; a strictly sequential source would need another plan with the same
interface.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from withanyone.faces import FaceAnalyzer, crop_face
from withanyone.pipeline import slider_scales

from .catalogue import Catalogue, ensure_catalogue
from .config import TrainConfig
from .pack import PackReader
from .references import ReferenceBank, choose_reference, ensure_bank, same_person_quantile
from .shards import BadRecord, Record, ShardReader

logger = logging.getLogger(__name__)

MIN_VISIBLE_SHARE = 0.5  # a face cut off further than this by the bucket's edge is not given to the adapter
MAX_SUBSTITUTES = 50


# --- size buckets -----------------------------------------------------------------------------------------


def assign_buckets(width: np.ndarray, height: np.ndarray, buckets: Sequence[Sequence[int]]) -> np.ndarray:
    """The bucket (R,) nearest to each picture: in aspect ratio first, in area among equal ones."""
    w, h = np.array([b[:2] for b in buckets], np.float64).T
    width, height = np.asarray(width, np.float64)[:, None], np.asarray(height, np.float64)[:, None]
    aspect = np.abs(np.log(width / height) - np.log(w / h)).round(6)
    area = np.abs(np.log(width * height) - np.log(w * h))
    return (aspect * 1e3 + area).argmin(axis=1)


def crop_window(
    width: int, height: int, bucket_width: int, bucket_height: int, bboxes: np.ndarray
) -> tuple[float, float, float, float]:
    """The largest window of the bucket's shape inside the picture, moved towards the faces: (x1, y1, x2,
    y2)."""
    scale = min(width / bucket_width, height / bucket_height)
    w, h = bucket_width * scale, bucket_height * scale
    center = (bboxes[:, :2].min(0) + bboxes[:, 2:].max(0)) / 2
    left = float(np.clip(center[0] - w / 2, 0, width - w))
    top = float(np.clip(center[1] - h / 2, 0, height - h))
    return left, top, left + w, top + h


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


# --- one sample --------------------------------------------------------------------------------------------


def draw_scales(
    rng: np.random.Generator, branches: str, similarity_range: Sequence[float], corner_share: float
) -> tuple[float, float]:
    """(id_scale, siglip_scale) of a training sample: a random place of the two sliders.

    Every position that a user can set is seen: diversity 0 and 1 (one branch alone) by `corner_share`, the
    rest uniform between them; a single branch is trained at its own corner.
    """
    similarity = float(rng.uniform(*similarity_range))
    corner, side, between = rng.random(3)
    diversity = float(side < 0.5) if corner < corner_share else float(between)
    if branches != "both":
        diversity = 1.0 if branches == "arc" else 0.0
    return slider_scales(similarity, diversity)


@dataclass
class Example:
    """One sample, ready to be collated. F faces; coordinates are the bucket's pixels."""

    position: int
    pixel_values: Tensor  # (3, H, W) in [-1, 1]
    prompt: str
    bboxes: np.ndarray  # (F, 4)
    kps: np.ndarray  # (F, 5, 2), NaN where unknown
    embeddings: np.ndarray  # (F, 512) raw: of the references
    crops: list[Image.Image] | None  # the references' face crops, or
    features: np.ndarray | None  # (F, T, C) their image features
    identities: np.ndarray  # (F,) numbers in the reference bank, -1 unknown
    uniform: float  # in (0, 1): becomes sigma
    id_scale: float
    siglip_scale: float
    noise_seed: int
    priority: np.ndarray  # (F,) which faces the identity losses look at first
    paired: bool
    bad: list[str] = field(default_factory=list)  # why other records were passed over for this one


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
        self.reader = ShardReader()
        self.buckets_of = {name: self._buckets(c) for name, c in catalogues.items()}
        self.thresholds = (config.reference_stop_above, config.reference_drop_below)
        if config.reference_rule == "released" and config.reference_thresholds == "quantile" and bank:
            self.thresholds = tuple(same_person_quantile(bank, q) for q in self.thresholds)

    def _buckets(self, catalogue: Catalogue) -> np.ndarray:
        buckets = assign_buckets(catalogue.width, catalogue.height, self.config.buckets)
        keep = np.diff(catalogue.face_start) <= self.config.max_faces
        if self.config.min_aesthetic_score is not None:
            keep &= np.nan_to_num(catalogue.aesthetics, nan=-np.inf) >= self.config.min_aesthetic_score
        return np.where(keep, buckets, -1)

    def __getitem__(self, item: Item) -> Example:
        bad: list[str] = []
        for index in self._substitutes(item):
            rng = np.random.default_rng([self.config.seed, 1, item.position])
            try:
                record = self.catalogues[item.subset].read(index, self.reader)
                example = self._example(item, record, rng)
            except BadRecord as error:
                logger.warning("record %d of %s passed over: %s", index, item.subset, error)
                bad.append(error.reason)
                continue
            example.bad = bad
            return example
        raise ValueError(
            f"`shards`: {len(bad)} records in a row could not be used, for the reasons {sorted(set(bad))}."
        )

    def _substitutes(self, item: Item) -> Iterator[int]:
        yield item.index
        same = np.flatnonzero(self.buckets_of[item.subset] == item.bucket)
        place = int(np.searchsorted(same, item.index))
        for k in range(1, min(len(same), MAX_SUBSTITUTES)):
            yield int(same[(place + k) % len(same)])

    def _example(self, item: Item, record: Record, rng: np.random.Generator) -> Example:
        config = self.config
        # the same draws whatever is done with them, so that settings don't shift each other's random numbers
        dropped = rng.random() < config.text_dropout
        uniform = float(rng.uniform(1e-4, 1 - 1e-4))
        noise_seed = int(rng.integers(2**62))
        scales = draw_scales(rng, config.branches, config.similarity_range, config.diversity_corner_share)
        picture, window, keep = self._fit(record, item.bucket)
        scale = picture.width / (window[2] - window[0])
        bboxes = (record.bboxes[keep] - np.tile(window[:2], 2)) * scale
        limit = np.array([picture.width, picture.height] * 2, np.float32)
        kps = (record.kps[keep] - np.array(window[:2], np.float32)) * scale
        priority = rng.random(len(bboxes))
        names = [record.names[i] if record.names else "" for i in keep]
        identities = np.array([self.bank.identity(n) if self.bank else -1 for n in names], np.int64)
        if item.subset == "cp":
            embeddings, crops, features = self._paired(record, identities, rng)
        else:
            source = Image.fromarray(record.image)
            embeddings, features = record.embeddings[keep], None
            crops = [self._crop(source, record.bboxes[i], rng) for i in keep]
        prompt = record.caption if config.prompt_source == "caption" else config.count_prompts[len(keep) - 1]
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
        return Example(
            position=item.position,
            pixel_values=pixels,
            prompt="" if dropped else prompt,
            bboxes=np.clip(bboxes, 0, limit),
            kps=kps.astype(np.float32),
            embeddings=embeddings,
            crops=crops,
            features=features,
            identities=identities,
            uniform=uniform,
            id_scale=scales[0],
            siglip_scale=scales[1],
            noise_seed=noise_seed,
            priority=priority,
            paired=item.subset == "cp",
        )

    def _fit(self, record: Record, bucket: int) -> tuple[Image.Image, tuple[float, ...], list[int]]:
        """The picture in its bucket's size, the window it was cut from, and the faces that remain visible."""
        width, height = self.config.buckets[bucket][:2]
        image = Image.fromarray(record.image)
        window = crop_window(image.width, image.height, width, height, record.bboxes)
        low = np.maximum(record.bboxes[:, :2], window[:2])
        high = np.minimum(record.bboxes[:, 2:], window[2:])
        inside = np.clip(high - low, 0, None).prod(1)
        whole = (record.bboxes[:, 2:] - record.bboxes[:, :2]).prod(1)
        keep = [int(i) for i in np.flatnonzero(inside >= MIN_VISIBLE_SHARE * whole)]
        if not keep:
            raise BadRecord("no_people", "every face is cut off by the size bucket")
        if window != (0, 0, image.width, image.height) or image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.LANCZOS, box=window, reducing_gap=3.0)
        return image, window, keep

    def _paired(
        self, record: Record, identities: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, list[Image.Image] | None, np.ndarray | None]:
        """Another photo of each person: raw embeddings (F, 512), and face crops or kept image features."""
        config, bank = self.config, self.bank
        if (identities < 0).any():
            raise BadRecord("name_without_references", record.key)
        rows = [
            choose_reference(
                bank, int(identity), rng, rule=config.reference_rule, target_embeddings=record.embeddings,
                draws=config.reference_draws, stop_above=self.thresholds[0], drop_below=self.thresholds[1],
            )
            for identity in identities
        ]  # fmt: skip
        if None in rows:
            raise BadRecord("reference_dropped", record.key)
        if bank.features is not None:
            return bank.embeddings[rows], None, np.asarray(bank.features[rows], np.float32)
        crops = [self._crop(bank.read_photo(row, self.reader), bank.bbox[row], rng) for row in rows]
        return bank.embeddings[rows], crops, None

    def _crop(self, photo: Image.Image, bbox: np.ndarray, rng: np.random.Generator) -> Image.Image:
        """The face crop as the pipeline makes it; with jitter, as an imperfect detector would."""
        side = float(max(bbox[2:] - bbox[:2]))
        shift = rng.uniform(-1, 1, 4) * self.config.reference_crop_jitter * side
        x1, y1, x2, y2 = bbox + shift
        x1, y1 = min(max(x1, 0), photo.width - 2), min(max(y1, 0), photo.height - 2)
        x2, y2 = min(max(x2, x1 + 2), photo.width), min(max(y2, y1 + 2), photo.height)
        return crop_face(photo, (x1, y1, x2, y2), self.crop_size)


# --- opening everything -------------------------------------------------------------------------------------


def open_data(
    config: TrainConfig, analyzer: FaceAnalyzer | None = None
) -> tuple[dict[str, Catalogue], ReferenceBank | None]:
    """Catalogues and reference bank of a run, built where they are missing (once, with `analyzer`'s help).

    Raises `ValueError` where more than `max_bad_share` of the records are damaged.
    """

    pack = PackReader(analyzer) if analyzer and config.complete_records else None
    bank = None
    if config.paired_ratio > 0 or config.contrastive_loss_weight > 0:
        bank = ensure_bank(config.shards, config.cache_path / "bank", pack=pack)
    subsets = [
        name for name, share in (("rec", 1 - config.paired_ratio), ("cp", config.paired_ratio)) if share > 0
    ]
    catalogues = {
        name: ensure_catalogue(
            config.shards, name, config.cache_path,
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


# --- batches -----------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """B samples of one size; F is the largest number of faces among them, rows beyond a sample's own are
    zero."""

    positions: list[int]
    pixel_values: Tensor  # (B, 3, H, W) in [-1, 1]
    prompts: list[str]
    bboxes: list[list[tuple[float, ...]]]  # B lists of boxes in pixels
    kps: Tensor  # (B, F, 5, 2), NaN where unknown
    embeddings: Tensor  # (B, F, 512)
    crop_pixels: Tensor | None  # (sum of faces, 3, h, w): what the image encoder takes, sample after sample
    has_crops: Tensor  # (B,) bool: whose crops are in `crop_pixels`
    features: Tensor | None  # (B, F, T, C), where they were kept
    face_mask: Tensor  # (B, F) bool
    identities: Tensor  # (B, F) int64, -1 unknown
    uniform: Tensor  # (B,)
    id_scale: Tensor  # (B,)
    siglip_scale: Tensor  # (B,)
    noise_seeds: list[int]
    priority: Tensor  # (B, F)
    paired: Tensor  # (B,) bool
    bad: list[str]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.pixel_values.shape[-2], self.pixel_values.shape[-1]


def collate(
    examples: Sequence[Example], prepare: Callable[[list[Image.Image]], Tensor] | None = None
) -> Batch:
    """Examples with different numbers of faces as one batch. `prepare` turns face crops into encoder inputs.

    Kept features and fresh crops never mix in a batch: where some examples have crops, `prepare` is applied
    to those, and `features` holds the others' rows (zero elsewhere).
    """
    most = max(len(e.bboxes) for e in examples)

    def pad(rows: Sequence[np.ndarray], fill: float) -> Tensor:
        out = np.full((len(rows), most, *rows[0].shape[1:]), fill, rows[0].dtype)
        for b, row in enumerate(rows):
            out[b, : len(row)] = row
        return torch.from_numpy(out)

    with_features = [e.features for e in examples if e.features is not None]
    features = None
    if with_features:
        shape = (0, *with_features[0].shape[1:])
        features = pad(
            [np.zeros(shape, np.float32) if e.features is None else e.features for e in examples], 0
        )
    crops = [crop for e in examples if e.crops is not None for crop in e.crops]
    return Batch(
        positions=[e.position for e in examples],
        pixel_values=torch.stack([e.pixel_values for e in examples]),
        prompts=[e.prompt for e in examples],
        bboxes=[[tuple(map(float, box)) for box in e.bboxes] for e in examples],
        kps=pad([e.kps for e in examples], np.nan),
        embeddings=pad([np.asarray(e.embeddings, np.float32) for e in examples], 0),
        crop_pixels=prepare(crops) if crops and prepare else None,
        has_crops=torch.tensor([e.crops is not None for e in examples]),
        features=features,
        face_mask=pad([np.ones(len(e.bboxes), bool) for e in examples], False),
        identities=pad([e.identities for e in examples], -1),
        uniform=torch.tensor([e.uniform for e in examples]),
        id_scale=torch.tensor([e.id_scale for e in examples]),
        siglip_scale=torch.tensor([e.siglip_scale for e in examples]),
        noise_seeds=[e.noise_seed for e in examples],
        priority=pad([e.priority for e in examples], np.inf),
        paired=torch.tensor([e.paired for e in examples]),
        bad=[reason for e in examples for reason in e.bad],
    )


class _RankBatches:
    """This process's part of each global batch, from batch `start` on."""

    def __init__(self, plan: BatchPlan, start: int, rank: int, world_size: int) -> None:
        self.plan, self.start, self.rank, self.world_size = plan, start, rank, world_size

    def __iter__(self) -> Iterator[list[Item]]:
        for items in self.plan.batches(self.start):
            share = len(items) // self.world_size
            yield items[self.rank * share : (self.rank + 1) * share]


def make_plan(dataset: TrainDataset, config: TrainConfig, world_size: int = 1) -> BatchPlan:
    """The run's plan. Batch sizes count samples over all processes and must divide among them."""
    sizes = [bucket[2] if len(bucket) == 3 else config.train_batch_size for bucket in config.buckets]
    for size in sizes:
        if size % world_size:
            raise ValueError(
                f"`train_batch_size` (or a bucket's own) is {size} samples over all processes, which "
                f"does not divide among {world_size}."
            )
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
        collate_fn=_Collate(prepare),
        persistent_workers=num_workers > 0,
    )


class _Collate:
    """`collate` with its `prepare`, in a form that data workers can be sent."""

    def __init__(self, prepare: Callable[[list[Image.Image]], Tensor] | None) -> None:
        self.prepare = prepare

    def __call__(self, examples: list[Example]) -> Batch:
        return collate(examples, self.prepare)
