"""From a record to an example, and from examples to a batch.

Pictures are cut to a size bucket, faces and landmarks follow; each person gets a reference; everything random
about a sample is drawn from a generator seeded by (seed, the sample's position in the stream).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from withanyone.faces import crop_face
from withanyone.pipeline import slider_scales

from .config import TrainConfig
from .references import ReferenceBank, choose_reference, same_person_quantile
from .shards import BadRecord, Record, ShardReader

MIN_VISIBLE_SHARE = 0.5  # a face cut off further than this by the bucket's edge is not given to the adapter


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


# --- one sample --------------------------------------------------------------------------------------------


def draw_scales(
    rng: np.random.Generator,
    branches: str,
    similarity_range: Sequence[float],
    corner_share: float,
    leans_to: float | None = None,
) -> tuple[float, float]:
    """(id_scale, siglip_scale) of a training sample: a random place of the two sliders.

    Every position that a user can set is seen: diversity 0 and 1 (one branch alone) by `corner_share`, the
    rest uniform between them; a single branch is trained at its own corner.

    leans_to: 0 or 1: the corner is this one, and between them the density falls linearly to 0 at the other.
    """
    similarity = float(rng.uniform(*similarity_range))
    corner, side, between = rng.random(3)
    if leans_to is not None:  # the smaller or larger of two uniform draws; the corner is the one leant to
        between, side = (max if leans_to else min)(side, between), 1 - leans_to
    diversity = float(side < 0.5) if corner < corner_share else float(between)
    if branches != "both":
        diversity = 1.0 if branches == "arc" else 0.0
    return slider_scales(similarity, diversity)


@dataclass
class Example:
    """One sample, ready to be collated. F faces; coordinates are the bucket's pixels."""

    position: int
    pixels: np.ndarray  # (H, W, 3) uint8
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
    latents_key: str  # names the picture as it is here: content, size, window
    bad: list[str] = field(default_factory=list)  # why other records were passed over for this one


class ExampleMaker:
    """Records to examples. What is random about one follows from (seed, its position in the stream)."""

    def __init__(self, config: TrainConfig, bank: ReferenceBank | None, crop_size: int = 512) -> None:
        self.config, self.bank, self.crop_size = config, bank, crop_size
        self.thresholds = (config.reference_stop_above, config.reference_drop_below)
        if config.reference_rule == "released" and config.reference_thresholds == "quantile" and bank:
            self.thresholds = tuple(same_person_quantile(bank, q) for q in self.thresholds)

    def bucket_of(self, record: Record) -> int:
        """The size bucket of a record."""
        height, width = record.image.shape[:2]
        return int(assign_buckets(np.array([width]), np.array([height]), self.config.buckets)[0])

    def make(
        self, record: Record, *, position: int, subset: str, bucket: int, reader: ShardReader, bad: list[str]
    ) -> Example:
        """The example at `position` of the stream. Raises `BadRecord` where the record cannot be used."""
        config = self.config
        rng = np.random.default_rng([config.seed, 1, position])
        # the same draws whatever is done with them, so that settings don't shift each other's random numbers
        dropped = rng.random() < config.text_dropout
        uniform = float(rng.uniform(1e-4, 1 - 1e-4))
        noise_seed = int(rng.integers(2**62))
        leans_to = float(subset == "cp") if config.diversity_by_subset else None
        scales = draw_scales(
            rng, config.branches, config.similarity_range, config.diversity_corner_share, leans_to
        )
        pixels, window, keep = self._fit(record, bucket)
        height, width = pixels.shape[:2]
        scale = width / (window[2] - window[0])
        bboxes = (record.bboxes[keep] - np.tile(window[:2], 2)) * scale
        limit = np.array([width, height] * 2, np.float32)
        kps = (record.kps[keep] - np.array(window[:2], np.float32)) * scale
        priority = rng.random(len(bboxes))
        names = [record.names[i] if record.names else "" for i in keep]
        identities = np.array([self.bank.identity(n) if self.bank else -1 for n in names], np.int64)
        if subset == "cp":
            embeddings, crops, features = self._paired(record, identities, rng, reader)
        else:
            source = Image.fromarray(record.image)
            embeddings, features = record.embeddings[keep], None
            crops = [self._crop(source, record.bboxes[i], rng) for i in keep]
        prompt = record.caption if config.prompt_source == "caption" else config.count_prompts[len(keep) - 1]
        return Example(
            position=position,
            pixels=pixels,
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
            paired=subset == "cp",
            latents_key=f"{record.digest} {width}x{height} {window}",
            bad=bad,
        )

    def _fit(self, record: Record, bucket: int) -> tuple[np.ndarray, tuple[float, ...], list[int]]:
        """The picture (H, W, 3) in its bucket's size, the window it was cut from, and the faces that remain
        visible."""
        width, height = self.config.buckets[bucket][:2]
        pixels = record.image
        window = crop_window(pixels.shape[1], pixels.shape[0], width, height, record.bboxes)
        low = np.maximum(record.bboxes[:, :2], window[:2])
        high = np.minimum(record.bboxes[:, 2:], window[2:])
        inside = np.clip(high - low, 0, None).prod(1)
        whole = (record.bboxes[:, 2:] - record.bboxes[:, :2]).prod(1)
        keep = [int(i) for i in np.flatnonzero(inside >= MIN_VISIBLE_SHARE * whole)]
        if not keep:
            raise BadRecord("no_people", "every face is cut off by the size bucket")
        if window != (0, 0, width, height) or pixels.shape[:2] != (height, width):
            image = Image.fromarray(pixels)
            image = image.resize((width, height), Image.Resampling.LANCZOS, box=window, reducing_gap=3.0)
            pixels = np.asarray(image)
        return pixels, window, keep

    def _paired(
        self, record: Record, identities: np.ndarray, rng: np.random.Generator, reader: ShardReader
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
        crops = [self._crop(bank.read_photo(row, reader), bank.bbox[row], rng) for row in rows]
        return bank.embeddings[rows], crops, None

    def _crop(self, photo: Image.Image, bbox: np.ndarray, rng: np.random.Generator) -> Image.Image:
        """The face crop as the pipeline makes it; with jitter, as an imperfect detector would."""
        side = float(max(bbox[2:] - bbox[:2]))
        shift = rng.uniform(-1, 1, 4) * self.config.reference_crop_jitter * side
        x1, y1, x2, y2 = bbox + shift
        x1, y1 = min(max(x1, 0), photo.width - 2), min(max(y1, 0), photo.height - 2)
        x2, y2 = min(max(x2, x1 + 2), photo.width), min(max(y2, y1 + 2), photo.height)
        return crop_face(photo, (x1, y1, x2, y2), self.crop_size)


# --- batches -----------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """B samples of one size; F is the largest number of faces among them, rows beyond a sample's own are
    zero."""

    positions: list[int]
    pixels: Tensor  # (B, 3, H, W) uint8: a quarter of the floats, on the way from the workers to the device
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
    latents_keys: list[str]
    bad: list[str]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.pixels.shape[-2], self.pixels.shape[-1]


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
    pixels = torch.from_numpy(np.stack([e.pixels for e in examples])).permute(0, 3, 1, 2).contiguous()
    return Batch(
        positions=[e.position for e in examples],
        pixels=pixels,
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
        latents_keys=[e.latents_key for e in examples],
        bad=[reason for e in examples for reason in e.bad],
    )


class Collate:
    """`collate` with its `prepare`, in a form that data workers can be sent."""

    def __init__(self, prepare: Callable[[list[Image.Image]], Tensor] | None) -> None:
        self.prepare = prepare

    def __call__(self, examples: list[Example]) -> Batch:
        return collate(examples, self.prepare)
