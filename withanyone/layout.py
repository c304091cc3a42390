"""Where faces are: boxes checked, placed by default, rescaled, and turned into image tokens.

A `bbox` is (x1, y1, x2, y2) in float pixels of the picture, x to the right and y downwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

BBox = tuple[float, float, float, float]

# A face's box is a little taller than wide, as detectors draw it from forehead to chin.
FACE_ASPECT = 0.8
MAX_DEFAULT_PEOPLE = 8


def check_bboxes(
    bboxes: Sequence[Sequence[float]],
    height: int,
    width: int,
    *,
    num_people: int | None = None,
    pixels_per_token: int = 16,
    name: str = "bboxes",
) -> list[BBox]:
    """The boxes of one picture as float tuples, or a ValueError that names the box at fault and the remedy.

    Every box has four finite numbers, lies inside the picture of `height` x `width` pixels, has a positive
    area and touches at least one image token of `pixels_per_token` pixels; with `num_people` there are as
    many boxes as people.
    """
    boxes = parse_bboxes(bboxes, name=name)
    if num_people is not None and len(boxes) != num_people:
        raise ValueError(
            f"`{name}` holds {len(boxes)} boxes for {num_people} people; give one box for each person, in "
            "the same order, or None for a default layout."
        )
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        if x1 < 0 or y1 < 0 or x2 > width or y2 > height:
            raise ValueError(
                f"`{name}[{i}]` is {_show(boxes[i])}, which reaches outside the picture; give x between 0 "
                f"and {width}, y between 0 and {height} (pixels of the output)."
            )
        _check_touches(boxes[i], height, width, pixels_per_token, f"{name}[{i}]")
    return boxes


def parse_bboxes(bboxes: Sequence[Sequence[float]], *, name: str = "bboxes") -> list[BBox]:
    """The boxes as float tuples: four finite numbers each, positive area; anywhere in the plane."""
    bboxes = _to_list(bboxes)
    if not isinstance(bboxes, (list, tuple)):
        raise ValueError(f"`{name}` is {bboxes!r}; give a list of boxes (x1, y1, x2, y2) in pixels.")
    return [_parse_bbox(box, f"{name}[{i}]") for i, box in enumerate(bboxes)]


def token_grid(height: int, width: int, pixels_per_token: int = 16) -> tuple[int, int]:
    """Rows and columns of image tokens of a picture; its size must be a multiple of `pixels_per_token`."""
    for side, pixels in (("height", height), ("width", width)):
        if pixels < pixels_per_token or pixels % pixels_per_token:
            nearest = max(1, round(pixels / pixels_per_token)) * pixels_per_token
            raise ValueError(
                f"`{side}` is {pixels}; give a multiple of {pixels_per_token} pixels, such as {nearest}."
            )
    return height // pixels_per_token, width // pixels_per_token


def token_mask(
    bboxes: Sequence[Sequence[Sequence[float]]],
    height: int,
    width: int,
    pixels_per_token: int = 16,
    *,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Which image token lies under which face's box: (B, N, F) bool, F the largest number of boxes in a row.

    A box touches columns floor(x1 / p) to ceil(x2 / p) and rows likewise, clipped to the picture, as in the
    released code. `bboxes` holds B lists of boxes. A box that touches no token is an error.
    """
    rows, columns = token_grid(height, width, pixels_per_token)
    parsed = [parse_bboxes(boxes, name=f"bboxes[{b}]") for b, boxes in enumerate(bboxes)]
    mask = torch.zeros(
        len(parsed), rows, columns, max((len(boxes) for boxes in parsed), default=0), dtype=torch.bool
    )
    for b, boxes in enumerate(parsed):
        for f, box in enumerate(boxes):
            top, bottom, left, right = _check_touches(
                box, height, width, pixels_per_token, f"bboxes[{b}][{f}]"
            )
            mask[b, top:bottom, left:right, f] = True
    return mask.flatten(1, 2).to(device)  # (B, N, F)


def scale_bboxes(
    bboxes: Sequence[Sequence[float]], from_size: tuple[int, int], to_size: tuple[int, int]
) -> list[BBox]:
    """Boxes of a picture resized from `from_size` to `to_size`, both (height, width) in pixels."""
    sy, sx = to_size[0] / from_size[0], to_size[1] / from_size[1]
    return [(x1 * sx, y1 * sy, x2 * sx, y2 * sy) for x1, y1, x2, y2 in parse_bboxes(bboxes)]


def default_bboxes(num_people: int, height: int, width: int) -> list[BBox]:
    """Boxes for the faces of `num_people` (1 to 8) in a picture, as a photographer would place a group.

    One face is half as high as the picture; more people stand side by side, every second one a little higher,
    and where another row makes the faces clearly larger, behind one another. Left to right, back row first.
    Boxes lie inside the picture and never overlap, whatever the aspect ratio.
    """
    if not 1 <= num_people <= MAX_DEFAULT_PEOPLE:
        raise ValueError(
            f"There is no default layout for {num_people} people; give `bboxes`, one box (x1, y1, x2, y2) in "
            f"pixels for each person, or 1 to {MAX_DEFAULT_PEOPLE} people."
        )
    if height < 1 or width < 1:
        raise ValueError(f"`height` and `width` are {height} and {width}; give at least 1 pixel each.")
    best = _in_rows(num_people, 1, height, width)
    for num_rows in range(2, num_people + 1):
        layout = _in_rows(num_people, num_rows, height, width)
        if _face_height(layout) > 1.15 * _face_height(best):
            best = layout
    return best


def _in_rows(num_people: int, num_rows: int, height: int, width: int) -> list[BBox]:
    """`num_people` in `num_rows` rows, those in front fuller, each spread over the width."""
    counts = [num_people // num_rows + (r >= num_rows - num_people % num_rows) for r in range(num_rows)]
    column_width, row_height = width / max(counts), 0.78 * height / num_rows
    face_height = min(
        (0.78 if max(counts) < 4 else 0.86) * column_width,  # room for hair and shoulders beside
        0.5 * height if num_rows == 1 else 0.55 * row_height,  # and above and below
    )
    boxes = []
    for r, count in enumerate(counts):
        middle = 0.55 * height if num_rows == 1 else 0.495 * height + (r - (num_rows - 1) / 2) * row_height
        for i in range(count):
            lift = 0.04 * face_height * (-1) ** (i + 1) if count > 1 else 0.0
            cx = width * (i + 0.5) / count
            boxes.append(_box_about(cx, middle - lift, FACE_ASPECT * face_height, face_height))
    return boxes


def _box_about(cx: float, cy: float, width: float, height: float) -> BBox:
    return (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)


def _face_height(boxes: list[BBox]) -> float:
    return boxes[0][3] - boxes[0][1]


def _check_touches(
    box: BBox, height: int, width: int, pixels_per_token: int, name: str
) -> tuple[int, int, int, int]:
    """Token rows top to bottom and columns left to right under `box`, at least one of each."""
    rows, columns = height // pixels_per_token, width // pixels_per_token
    left, top = (max(0, math.floor(v / pixels_per_token)) for v in box[:2])
    right, bottom = (
        min(columns, math.ceil(box[2] / pixels_per_token)),
        min(rows, math.ceil(box[3] / pixels_per_token)),
    )
    if left >= right or top >= bottom:
        raise ValueError(
            f"`{name}` is {_show(box)}, which touches no image token of the {width} x {height} picture; move "
            "it inside the picture."
        )
    return top, bottom, left, right


def _parse_bbox(box: Any, name: str) -> BBox:
    values = _to_list(box)
    if not isinstance(values, (list, tuple)) or len(values) != 4:
        raise ValueError(f"`{name}` is {values!r}; give four numbers (x1, y1, x2, y2) in pixels.")
    try:
        x1, y1, x2, y2 = (float(v) for v in values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` is {values!r}; give four numbers (x1, y1, x2, y2) in pixels.") from error
    if not all(map(math.isfinite, (x1, y1, x2, y2))):
        raise ValueError(f"`{name}` is {_show((x1, y1, x2, y2))}; its numbers must be finite.")
    if x2 <= x1 or y2 <= y1:
        raise ValueError(
            f"`{name}` is {_show((x1, y1, x2, y2))}, which has no area; give (x1, y1, x2, y2) with x1 < x2 "
            "and y1 < y2."
        )
    return x1, y1, x2, y2


def _to_list(value: Any) -> Any:
    return value.tolist() if isinstance(value, (torch.Tensor, np.ndarray)) else value


def _show(box: BBox) -> str:
    return "(" + ", ".join(f"{v:g}" for v in box) + ")"
