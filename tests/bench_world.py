"""Painted cases for the bench: faces of `tests/tiny_faces.py` in the released folder layout, and parquet."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from tests import tiny_faces

#: Identities of each case's people, from left to right.
PEOPLE = ((1,), (2, 3), (4, 5, 6), (7,))


def boxes(count: int) -> list[tuple[float, float, float, float]]:
    """Where the target shows its people."""
    return [(12.0 + 84 * k, 20.0, 72.0 + 84 * k, 96.0) for k in range(count)]


def target(identities: Sequence[int], places: Sequence[Sequence[float]] | None = None) -> Image.Image:
    """A picture 128 pixels high with each identity in its place."""
    image = tiny_faces.blank(84 * len(identities) + 44, 128)
    for identity, box in zip(identities, places or boxes(len(identities)), strict=True):
        image = tiny_faces.paint_face(image, box, identity)
    return image


def reference(identity: int) -> Image.Image:
    """A photo of one person, of other proportions than in the target."""
    return tiny_faces.paint_face(tiny_faces.blank(), (24, 12, 104, 118), identity)


def write_cases(folder: Path, people: Sequence[Sequence[int]] = PEOPLE) -> Path:
    """Cases 0000, 0001, ... as folders; lossless, so that detections are exact."""
    for number, identities in enumerate(people):
        case = folder / f"{number:04d}"
        case.mkdir(parents=True)
        target(identities).save(case / "ori.png")
        for k, identity in enumerate(identities, 1):
            reference(identity).save(case / f"ref_{k}.png")
        meta = {
            "prompt": f"{len(identities)} people",
            "bboxes": boxes(len(identities)),
            "names": [str(identity) for identity in identities],
            "num_persons": len(identities),
        }
        (case / "meta.json").write_text(json.dumps(meta))
    return folder


def change_meta(case: Path, **changes) -> None:
    """Other values in a case's meta.json; None takes a key out."""
    meta = json.loads((case / "meta.json").read_text()) | changes
    (case / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if v is not None}))


def write_pictures(folder: Path, people: Sequence[Sequence[int]] = PEOPLE) -> Path:
    """A method's pictures that are the targets."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, identities in enumerate(people):
        target(identities).save(folder / f"{number:04d}.png")
    return folder


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def write_parquet(
    path: Path, columns: dict[str, list], images: Sequence[str] = ("GT", "input_images")
) -> Path:
    """A parquet file as the Hub's: `images` columns hold pictures, or lists of them, as bytes and path."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    def kind(name: str, values: list):
        if name in images:
            return List(ImageFeature()) if any(isinstance(v, list) for v in values) else ImageFeature()
        first = next(value for value in values if value is not None)
        if isinstance(first, list):
            return List(List(Value("float64")))
        return Value("int64") if isinstance(first, int) else Value("string")

    def cell(name: str, value):
        if name not in images or value is None:
            return value
        if isinstance(value, list):
            return [cell(name, part) for part in value]
        return {"bytes": value if isinstance(value, bytes) else png(value), "path": None}

    features = Features({name: kind(name, values) for name, values in columns.items()})
    data = {name: [cell(name, value) for value in values] for name, values in columns.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(data, features).to_parquet(str(path))
    return path
