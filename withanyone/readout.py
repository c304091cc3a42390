"""What a picture shows of the people it was made of: how alike, how copied, who is missing or swapped.

A likeness is a cosine of two recogniser embeddings. It means nothing by itself: one recogniser gives two
photos of one person 0.46, another 0.75. So likeness is judged against what *this* recogniser gives two photos
of one person and two strangers (`Calibration`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .bench.metrics import match_boxes, similarity_matrix, swapped
from .faces import Face


@dataclass(frozen=True)
class Calibration:
    """What a recogniser's cosine is between two photos of one person, and between two strangers.

    median, low, high: of two photos of one person, the middle and the 10th and 90th percentile.
    stranger: the 99th percentile between photos of different people.
    """

    median: float
    low: float
    high: float
    stranger: float
    source: str = ""

    def __post_init__(self) -> None:
        values = (self.stranger, self.low, self.median, self.high)
        if (
            not all(math.isfinite(v) and -1 <= v <= 1 for v in values)
            or not self.low < self.median < self.high
        ):
            raise ValueError(
                f"a calibration needs cosines with `low` < `median` < `high`, got {self.low}, {self.median}, "
                f"{self.high} and `stranger` {self.stranger}."
            )

    @classmethod
    def from_figures(cls, path: str | os.PathLike) -> Calibration:
        """From a face pack's measured figures (`python -m withanyone.mini faces-figures`)."""
        figures = json.loads(Path(path).read_text(encoding="utf-8"))
        try:
            found = figures["recognizer_on_detected_faces"]
            return cls(
                median=found["same_person_median"],
                low=found["same_person_p10"],
                high=found["same_person_p90"],
                stranger=found["strangers_p99"],
                source=figures["command"],
            )
        except KeyError as error:
            raise ValueError(
                f"`path` ({path}) has no figure {error}: measure the face pack again."
            ) from error


#: insightface's antelopev2. The median between two photos of one person is the paper's 0.46 (arXiv
#: 2510.14975); the spread and the strangers' bound are estimates around it, and only choose between words.
ANTELOPEV2 = Calibration(median=0.46, low=0.28, high=0.66, stranger=0.2, source="median: arXiv 2510.14975")

#: A score of a person's copying from which on a visitor is told that much was copied.
MUCH_COPIED = 0.3


@dataclass(frozen=True)
class PersonReading:
    """One person in one picture.

    likeness: cosine of the face in the picture and the person's photos; None where there is no such face.
    copying: 0 where the face is no more alike than two photos of one person; 1 where it is the photo itself.
    found: a face stands where the person should be. swapped: it is nearer to another person of the picture.
    looks_like: the index of the person it is nearest to.
    """

    likeness: float | None
    copying: float | None
    found: bool
    swapped: bool
    looks_like: int | None
    bbox: tuple[float, float, float, float] | None


@dataclass(frozen=True)
class Reading:
    """A whole picture. `extra`: faces in it that nobody asked for."""

    people: tuple[PersonReading, ...]
    extra: int

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, numbers rounded to three places."""
        return _rounded(asdict(self))


def copying(likeness: float, same_person: float) -> float:
    """max(0, 1 - theta / theta_same): how much nearer to the photo than another photo of the person would be.

    theta = arccos(likeness), theta_same = arccos(same_person), the median cosine of two photos of one person.
    It stands in for the copy-paste score where no target is known: a faithful picture has theta = theta_same
    and scores 0, the photo itself theta = 0 and scores 1; what is less alike is no copy and scores 0.
    """
    if not -1 <= same_person < 1:
        raise ValueError(f"`same_person` is {same_person}: give a cosine below 1.")
    theta, theta_same = (math.acos(min(max(value, -1.0), 1.0)) for value in (likeness, same_person))
    return max(0.0, 1.0 - theta / theta_same)


def read_picture(
    found: Sequence[Face],
    references: np.ndarray,
    bboxes: Sequence[Sequence[float]],
    calibration: Calibration,
) -> Reading:
    """Read a picture: `found` its faces, `references` (N, D) an embedding a person, `bboxes` their N boxes.

    A face stands for a person where it covers that person's box (`match_boxes`): were faces assigned by
    likeness, a swap would hide itself.
    """
    references = np.asarray(references, dtype=np.float64)
    if references.ndim != 2 or len(references) != len(bboxes):
        raise ValueError(
            f"`references` must be (N, D), a row for each of {len(bboxes)} `bboxes`, got {references.shape}."
        )
    boxes = np.array([face.bbox for face in found], dtype=np.float64).reshape(-1, 4)
    at = match_boxes(boxes, np.asarray(bboxes, dtype=np.float64).reshape(-1, 4))  # (N,) face or -1
    there = np.flatnonzero(at >= 0)
    likeness = np.zeros((len(references), len(references)))
    crossed = np.zeros(len(references), dtype=bool)
    if len(there):
        seen = np.stack([found[at[i]].embedding for i in there])  # (K, D)
        likeness[there] = similarity_matrix(seen, references)  # (K, N)
        crossed[there] = likeness[there].argmax(axis=1) != there
        if len(there) == len(references):
            crossed = swapped(seen, references)
    people = []
    for i in range(len(references)):
        if at[i] < 0:
            people.append(PersonReading(None, None, False, False, None, None))
            continue
        own, nearest = float(likeness[i, i]), int(likeness[i].argmax())
        # Nearer to somebody else by chance is no swap: two strangers are nearly equally unlike.
        is_swap = bool(crossed[i]) and likeness[i, nearest] > calibration.stranger
        bbox = tuple(float(value) for value in found[at[i]].bbox)
        people.append(PersonReading(own, copying(own, calibration.median), True, is_swap, nearest, bbox))
    return Reading(tuple(people), extra=len(found) - len(there))


def describe(reading: Reading, names: Sequence[str], calibration: Calibration) -> list[dict[str, str]]:
    """For each person {"tone": "good" | "fair" | "poor" | "warn", "text": a sentence for a visitor}."""
    if len(names) != len(reading.people):
        raise ValueError(f"`names` has {len(names)} names for {len(reading.people)} people.")
    said = []
    for name, person in zip(names, reading.people, strict=True):
        if not person.found:
            said.append({"tone": "warn", "text": f"{name} is missing: no face was found in the box."})
        elif person.swapped:
            other = names[person.looks_like]
            said.append({"tone": "warn", "text": f"Swapped? In {name}'s box is a face more like {other}."})
        else:
            tone, text = _likeness_words(person.likeness, calibration)
            said.append({"tone": tone, "text": f"{name}: {text}{_copying_words(person.copying)}"})
    return said


def _likeness_words(likeness: float, calibration: Calibration) -> tuple[str, str]:
    if likeness >= calibration.low:
        return "good", "looks like the same person"
    if likeness > calibration.stranger:
        return "fair", "resembles the photo"
    return "poor", "hardly resembles the photo"


def _copying_words(score: float) -> str:
    if score >= MUCH_COPIED:
        return ", but much of it is copied from the photo."
    if score > 0:
        return ", a little closer to the photo than another photo would be."
    return "."


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(part) for part in value]
    return round(value, 3) if isinstance(value, float) else value
