"""Phase 4's stylised variants: pictures that the model makes of known people, kept where identity holds.

Each attempt takes a paired record, gives every person by a reference photo, and asks for the record's caption
in a style. A picture is kept if every person's face is found in the box and is alike enough to the mean of
their photos. Kept ones are written as shards of `train_cp` (with `names`, boxes, landmarks and embeddings),
to be named in `extra_shards`; they keep their source's aesthetic score.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from withanyone import Face, FaceAdapter, WithAnyonePipeline, slider_scales
from withanyone.tars import record_members, write_tar

from .catalogue import Catalogue
from .config import TrainConfig
from .data import open_data
from .examples import assign_buckets, crop_window
from .references import ReferenceBank, choose_reference, same_person_quantile, unit
from .shards import BadRecord, Record, ShardReader
from .validation import face_in_box

logger = logging.getLogger(__name__)

STYLES = (
    "as an oil painting",
    "as a watercolour",
    "as a pencil drawing",
    "in comic style",
    "as a black and white photograph",
    "in warm evening light",
    "in neon light at night",
    "as a film still",
)


@dataclass(frozen=True)
class Plan:
    """What is made: `count` attempts in all, `per_shard` attempts a shard."""

    out: Path
    count: int
    per_shard: int = 200
    styles: tuple[str, ...] = STYLES
    min_similarity: float = 0.0  # cosine of a made face to its person's mean
    diversity: float = 0.5  # slider while making
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("count", "per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not self.styles:
            raise ValueError("`styles` is empty: give at least one.")


def person_centers(bank: ReferenceBank, identities: list[int]) -> np.ndarray:
    """Mean direction (N, 512) of each person's reference photos."""
    rows = [unit(np.asarray(bank.embeddings[bank.photos(identity)])).mean(0) for identity in identities]
    return unit(np.stack(rows))


def judge(
    made: list[Face], bboxes: np.ndarray, centers: np.ndarray, min_similarity: float
) -> tuple[list[Face], str]:
    """The faces in the boxes (N, 4), in their order; and why the picture is refused, "" where it is kept."""
    faces = [face_in_box(made, tuple(box)) for box in bboxes]
    if any(face is None for face in faces) or len({id(face) for face in faces}) < len(faces):
        return [], "face_not_found"
    if len(made) > len(faces):
        return [], "more_faces_than_people"
    cosines = (unit(np.stack([face.embedding for face in faces])) * centers).sum(1)  # (N,)
    return faces, "" if cosines.min() >= min_similarity else "another_person"


class Stylist:
    """Makes and judges one variant at a time; attempt i is the same whenever it is made."""

    def __init__(
        self,
        config: TrainConfig,
        plan: Plan,
        pipeline: WithAnyonePipeline,
        catalogue: Catalogue,
        bank: ReferenceBank,
    ) -> None:
        self.config, self.plan, self.pipeline = config, plan, pipeline
        self.catalogue, self.bank, self.reader = catalogue, bank, ShardReader()
        keep = np.diff(catalogue.face_start) <= config.max_faces
        if config.min_aesthetic_score is not None:
            keep &= np.nan_to_num(catalogue.aesthetics, nan=-np.inf) >= config.min_aesthetic_score
        self.records = np.random.default_rng([plan.seed, 6]).permutation(np.flatnonzero(keep))
        if len(self.records) == 0:
            raise ValueError("`min_aesthetic_score` and `max_faces` leave no paired record.")
        pipeline.set_progress_bar_config(disable=True)

    def attempt(self, number: int) -> tuple[dict[str, bytes], str]:
        """The members of variant `number`, and why it was refused ("" where it was not)."""
        plan = self.plan
        record = self.catalogue.read(int(self.records[number % len(self.records)]), self.reader)
        style = plan.styles[number % len(plan.styles)]
        rng = np.random.default_rng([plan.seed, 7, number])
        identities = [self.bank.identity(name) for name in record.names]
        if min(identities) < 0:
            raise BadRecord("name_without_references", record.key)
        rows = [choose_reference(self.bank, identity, rng) for identity in identities]
        photos = [self._face(row) for row in rows]
        (width, height), bboxes = self._layout(record)
        prompt = f"{record.caption}, {style}"
        id_scale, siglip_scale = slider_scales(1.0, plan.diversity)
        picture = self.pipeline(
            prompt=prompt, faces=photos, bboxes=[tuple(map(float, b)) for b in bboxes], width=width,
            height=height, id_scale=id_scale, siglip_scale=siglip_scale,
            generator=torch.Generator().manual_seed(int(rng.integers(2**62))),
        ).images[0]  # fmt: skip
        made = self.pipeline.face_analyzer.detect(picture)
        faces, refused = judge(made, bboxes, person_centers(self.bank, identities), plan.min_similarity)
        if refused:
            return {}, refused
        info = {
            "url": f"made:{record.key}",
            "caption_en": prompt,
            "style": style,
            "names": record.names,
            "bboxes": [face.bbox.tolist() for face in faces],
            "kps": [face.kps.tolist() for face in faces],
            "aesthetics_score": record.aesthetics_score,
        }
        embeddings = np.stack([face.embedding for face in faces])
        return record_members(f"{number:07d}", picture, info, embeddings), ""

    def _face(self, row: int) -> Face:
        """A reference photo as a `Face`: box and embedding are the bank's."""
        photo, box = self.bank.read_photo(row, self.reader), self.bank.bbox[row]
        crop = self.pipeline.face_analyzer.crop_size
        return make_face(photo, box, np.asarray(self.bank.embeddings[row], np.float32), crop)

    def _layout(self, record: Record) -> tuple[tuple[int, int], np.ndarray]:
        """The bucket's size, and the record's boxes (N, 4) in it."""
        height, width = record.image.shape[:2]
        bucket = int(assign_buckets(np.array([width]), np.array([height]), self.config.buckets)[0])
        size = tuple(self.config.buckets[bucket][:2])
        window = crop_window(width, height, *size, record.bboxes)
        scale = size[0] / (window[2] - window[0])
        bboxes = (record.bboxes - np.tile(window[:2], 2)) * scale
        bboxes = np.clip(bboxes, 0, [*size, *size])
        if not ((bboxes[:, 2:] - bboxes[:, :2]) > 0).all():
            raise BadRecord("no_people", "a face is cut off by the size bucket")
        return size, bboxes


def make_face(photo: Image.Image, bbox: np.ndarray, embedding: np.ndarray, crop_size: int) -> Face:
    """A `Face` of a known box and embedding; its landmarks are not used."""
    from withanyone.faces import crop_face

    return Face(
        bbox=np.asarray(bbox, np.float32), kps=np.zeros((5, 2), np.float32), det_score=1.0,
        embedding=embedding, face_crop=crop_face(photo, bbox, crop_size),
    )  # fmt: skip


def stylise(stylist: Stylist) -> Counter[str]:
    """Writes the plan's shards that are not there yet; counts of kept and refused pictures over all."""
    plan, total = stylist.plan, Counter()
    settings = {**dataclasses.asdict(plan), "out": str(plan.out), "styles": list(plan.styles)}
    stamp = plan.out / "stylise.json"
    if stamp.exists() and json.loads(stamp.read_text()) != settings:
        raise ValueError(f"`out` {plan.out} was begun with other settings: {stamp.read_text()}")
    plan.out.mkdir(parents=True, exist_ok=True)
    stamp.write_text(json.dumps(settings, indent=1))
    for shard, first in enumerate(range(0, plan.count, plan.per_shard)):
        path = plan.out / "train_cp" / f"{shard:05d}.tar"
        said = path.with_suffix(".json")
        if not (path.exists() and said.exists()):
            members, counts = {}, Counter()
            for number in range(first, min(first + plan.per_shard, plan.count)):
                try:
                    made, refused = stylist.attempt(number)
                except BadRecord as error:
                    made, refused = {}, error.reason
                counts[refused or "kept"] += 1
                members.update(made)
            write_tar(path, members.items())
            said.write_text(json.dumps(counts))
            logger.info("%s: %s", path, dict(counts))
        total.update(json.loads(said.read_text()))
    return total


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a phase file: pretrained, shards, buckets")
    parser.add_argument("--adapter", required=True, help="folder of the adapter that makes the pictures")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--count", type=int, default=10_000, help="pictures made (default: %(default)s)")
    parser.add_argument("--per-shard", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--styles", type=Path, help="a file with one style a line")
    parser.add_argument(
        "--quantile", type=float, default=0.1,
        help="keep faces above this quantile of the bank's same-person cosines (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--diversity", type=float, default=0.5, help="slider (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", help="key=value")


def run(args: argparse.Namespace) -> str:
    from .config import load_config

    config = load_config(args.config, [*args.overrides, "paired_ratio=1.0"])
    adapter = FaceAdapter.from_pretrained(args.adapter)
    pipeline = WithAnyonePipeline.from_pretrained(config.pretrained, face_adapter=adapter)
    if torch.cuda.is_available() and not config.cpu:
        pipeline.to("cuda", torch.bfloat16)
    catalogues, bank = open_data(config, pipeline.face_analyzer)
    styles = STYLES
    if args.styles:
        styles = tuple(line.strip() for line in args.styles.read_text().splitlines() if line.strip())
    plan = Plan(
        out=args.out, count=args.count, per_shard=args.per_shard, styles=styles,
        min_similarity=same_person_quantile(bank, args.quantile), diversity=args.diversity, seed=args.seed,
    )  # fmt: skip
    counts = stylise(Stylist(config, plan, pipeline, catalogues["cp"], bank))
    return f"{args.out}: {dict(counts)}; name it in `extra_shards`"
