"""Own photos as shards: a folder of photos for each person, and group photos.

    people/ada/1.jpg  people/ada/2.jpg  people/bela/a.png     groups/party.jpg  groups/party.txt (its caption)

The people's photos become reference tars. Faces of group photos are found and given to the person they are
most alike, one to one; a photo whose faces are all somebody's becomes a paired record, another one a record
for reconstruction.
"""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.optimize import linear_sum_assignment

from withanyone import Face, FaceAnalyzer
from withanyone.faces import load_image
from withanyone.tars import record_members, write_tar

from .config import COUNT_PROMPTS
from .references import REFERENCE_TARS, unit
from .shards import IMAGE_SUFFIXES, MAX_PEOPLE

logger = logging.getLogger(__name__)


@dataclass
class Report:
    """What became of the photos."""

    people: int = 0
    references: int = 0
    paired: int = 0
    reconstruction: int = 0
    threshold: float = 0.0
    left_out: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [
            f"{self.references} reference photos of {self.people} people",
            f"{self.paired} group photos of known people (train_cp), "
            f"{self.reconstruction} others (train_rec)",
            f"a face is a person's from a cosine of {self.threshold:.3f} on",
        ]
        lines += [f"left out: {n} x {why}" for why, n in self.left_out.most_common()]
        return "\n".join(lines + [f"note: {n} x {what}" for what, n in self.notes.most_common()])


def photos_in(folder: Path) -> list[Path]:
    """Picture files of a folder, by name."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower().lstrip(".") in IMAGE_SUFFIXES)


def _read(path: Path, report: Report) -> Image.Image | None:
    try:
        return load_image(path)
    except ValueError as error:
        logger.warning("%s", error)
        report.left_out["a photo that cannot be read"] += 1
        return None


def write_references(
    people: Path, out: Path, analyzer: FaceAnalyzer, report: Report
) -> dict[str, np.ndarray]:
    """`ref/tars/0000.tar`; returns each person's embeddings (n, 512)."""
    rows: dict[str, list[np.ndarray]] = {}
    folders = sorted(p for p in people.iterdir() if p.is_dir())
    if not folders:
        raise ValueError(f"`people` {people} has no folder: one for each person, with photos, is expected.")

    def members():  # noqa: ANN202
        for folder in folders:
            for path in photos_in(folder):
                image = _read(path, report)
                faces = analyzer.detect(image, max_faces=2) if image is not None else []
                if image is not None and not faces:
                    logger.warning("%s: no face found", path)
                    report.left_out["a reference photo without a face"] += 1
                if not faces:
                    continue
                report.notes["a reference photo with several faces: the largest is taken"] += len(faces) > 1
                rows.setdefault(folder.name, []).append(faces[0].embedding)
                info = {"bboxes": [faces[0].bbox.tolist()], "kps": [faces[0].kps.tolist()]}
                made = record_members(f"{folder.name}/{path.stem}", image, info, faces[0].embedding[None])
                yield from made.items()

    write_tar(out / REFERENCE_TARS / "0000.tar", members())
    if not rows:
        raise ValueError(f"`people` {people}: no face was found in any photo.")
    report.people, report.references = len(rows), sum(map(len, rows.values()))
    for embeddings in rows.values():
        report.notes["a person with a single photo"] += len(embeddings) == 1
    return {name: np.stack(embeddings) for name, embeddings in rows.items()}


def natural_threshold(references: dict[str, np.ndarray]) -> float:
    """Half-way between what strangers reach (95th percentile) and what a person stays above (5th): of the
    data's own cosines.

    Raises:
        ValueError: fewer than two people, or nobody with two photos: the data does not say.
    """
    rows = unit(np.concatenate(list(references.values())))
    owner = np.repeat(np.arange(len(references)), [len(r) for r in references.values()])
    cosines = rows @ rows.T
    same = (owner[:, None] == owner[None]) & ~np.eye(len(rows), dtype=bool)
    other = owner[:, None] != owner[None]
    if not same.any() or not other.any():
        raise ValueError(
            "`min_similarity` cannot be taken from the photos: it needs two people, one of them with two "
            "photos. Give it."
        )
    return float((np.quantile(cosines[same], 0.05) + np.quantile(cosines[other], 0.95)) / 2)


def name_faces(
    faces: Sequence[Face], references: dict[str, np.ndarray], threshold: float
) -> list[str | None]:
    """The person each face is, one to one by highest total cosine to the people's mean; None: nobody's."""
    names = list(references)
    centers = unit(np.stack([unit(rows).mean(0) for rows in references.values()]))  # (P, 512)
    cosines = unit(np.stack([face.embedding for face in faces])) @ centers.T  # (F, P)
    out: list[str | None] = [None] * len(faces)
    for face, person in zip(*linear_sum_assignment(cosines, maximize=True), strict=True):
        if cosines[face, person] >= threshold:
            out[face] = names[person]
    return out


def caption_of(path: Path, count: int, report: Report) -> str:
    """The text beside a photo (`photo.txt`), else the number of people in words."""
    text = path.with_suffix(".txt")
    caption = text.read_text(encoding="utf-8").strip() if text.exists() else ""
    if caption:
        return caption
    report.notes["a group photo without a caption (.txt beside it): the number of people in words"] += 1
    return COUNT_PROMPTS[count - 1]


def write_groups(
    groups: Path,
    out: Path,
    analyzer: FaceAnalyzer,
    references: dict[str, np.ndarray],
    threshold: float,
    report: Report,
    per_shard: int = 1000,
) -> None:
    """`train_cp` (everybody known) and `train_rec` shards of the group photos."""
    records: dict[str, list[dict[str, bytes]]] = {"train_cp": [], "train_rec": []}
    written: Counter[str] = Counter()

    def flush(subset: str) -> None:
        if records[subset]:
            path = out / subset / f"{written[subset]:04d}.tar"
            write_tar(path, (item for record in records[subset] for item in record.items()))
            written[subset] += 1
            records[subset].clear()

    for number, path in enumerate(photos_in(groups)):
        image = _read(path, report)
        faces = analyzer.detect(image) if image is not None else []
        if image is not None and not 0 < len(faces) <= MAX_PEOPLE:
            report.left_out[f"a group photo with no face or more than {MAX_PEOPLE}"] += 1
        if not 0 < len(faces) <= MAX_PEOPLE:
            continue
        names = name_faces(faces, references, threshold)
        info = {
            "url": "",
            "caption_en": caption_of(path, len(faces), report),
            "bboxes": [face.bbox.tolist() for face in faces],
            "kps": [face.kps.tolist() for face in faces],
        }
        subset = "train_rec" if None in names else "train_cp"
        if subset == "train_cp":
            info["names"] = names
        key = f"{number:06d}_{path.stem}"
        records[subset].append(record_members(key, image, info, np.stack([f.embedding for f in faces])))
        if len(records[subset]) == per_shard:
            flush(subset)
        report.paired += subset == "train_cp"
        report.reconstruction += subset == "train_rec"
    for subset in records:
        flush(subset)


def write_own_data(
    people: Path, groups: Path, out: Path, analyzer: FaceAnalyzer, min_similarity: float | None = None
) -> Report:
    """Shards in MultiID-2M's layout under `out`; what became of the photos."""
    for name, folder in (("people", people), ("groups", groups)):
        if not folder.is_dir():
            raise ValueError(f"`{name}` {folder} is not a folder.")
    if any(out.glob("*/*.tar")) or any(out.glob("ref/tars/*.tar")):
        raise ValueError(f"`out` {out} holds shards already: give an empty folder.")
    report = Report()
    references = write_references(people, out, analyzer, report)
    report.threshold = natural_threshold(references) if min_similarity is None else min_similarity
    write_groups(groups, out, analyzer, references, report.threshold, report)
    if not report.paired and not report.reconstruction:
        raise ValueError(
            f"`groups` {groups}: no photo could be used: {dict(report.left_out) or 'none there'}."
        )
    report.notes = +report.notes
    return report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--people", type=Path, required=True, help="a folder of photos for each person")
    parser.add_argument(
        "--groups", type=Path, required=True, help="group photos, captions beside them (.txt)"
    )
    parser.add_argument("--pretrained", type=Path, required=True, help="pipeline folder: its face pack")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument(
        "--min-similarity",
        type=float,
        help="cosine from which a face is a person's; default: from the photos",
    )


def run(args: argparse.Namespace) -> str:
    analyzer = FaceAnalyzer.from_pretrained(args.pretrained / "face_analyzer")
    return str(write_own_data(args.people, args.groups, args.out, analyzer, args.min_similarity))
