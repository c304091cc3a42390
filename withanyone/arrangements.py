"""Arrangements of people by name: side by side, a triangle, rows, one of them large.

`layout.default_bboxes` picks one layout that suits; here a person picks. All boxes lie inside the picture,
have the proportions of a face and do not overlap, for 1 to 8 people and any shape of picture.
"""

from __future__ import annotations

from .layout import FACE_ASPECT, MAX_DEFAULT_PEOPLE, BBox, default_bboxes

ARRANGEMENTS = ("suggested", "side by side", "triangle", "rows", "one large")


def arrange(num_people: int, height: int, width: int, arrangement: str = "suggested") -> list[BBox]:
    """A box (x1, y1, x2, y2) in pixels for each of 1 to 8 people.

    arrangement: one of ARRANGEMENTS. The first person stands left, or at the top of the triangle, or is the
    large one; the others follow left to right, row after row.

    Raises:
        ValueError: an unknown arrangement, a number of people that is not 1 to 8, a size below 1 pixel.
    """
    if arrangement not in ARRANGEMENTS:
        raise ValueError(f"`arrangement` is {arrangement!r}: give one of {', '.join(ARRANGEMENTS)}.")
    if (
        isinstance(num_people, bool)
        or not isinstance(num_people, int)
        or not 1 <= num_people <= MAX_DEFAULT_PEOPLE
    ):
        raise ValueError(f"`num_people` is {num_people!r}: give 1 to {MAX_DEFAULT_PEOPLE} people.")
    suggested = default_bboxes(num_people, height, width)
    if num_people == 1 and arrangement != "one large":
        return suggested
    if arrangement == "side by side":
        return _rows([num_people], height, width)
    if arrangement == "triangle":
        return _rows(_triangle(num_people), height, width)
    if arrangement == "rows":
        return _rows([num_people // 2, num_people - num_people // 2], height, width)
    if arrangement == "one large":
        return _one_large(num_people, height, width)
    return suggested


def _triangle(num_people: int) -> list[int]:
    """People in each row, one more in every row, the last takes what is left: 4 -> 1, 3; 6 -> 1, 2, 3."""
    counts: list[int] = []
    while sum(counts) < num_people:
        counts.append(min(len(counts) + 1, num_people - sum(counts)))
    if len(counts) > 1 and counts[-1] < counts[-2]:
        last = counts.pop()
        counts[-1] += last
    return counts


def _rows(counts: list[int], height: int, width: int) -> list[BBox]:
    """Rows of faces of one size from top to bottom, each spread over the width."""
    tall = min(0.86 * height / (len(counts) + 0.6), 0.78 * width / max(counts) / FACE_ASPECT, 0.5 * height)
    boxes = []
    for row, count in enumerate(counts):
        cy = height * (row + 0.5 + 0.06) / (len(counts) + 0.12)
        boxes += [_about(width * (i + 0.5) / count, cy, tall) for i in range(count)]
    return boxes


def _one_large(num_people: int, height: int, width: int) -> list[BBox]:
    """The first in the left part, large; the others in a column, or two, on the right."""
    others = num_people - 1
    tall = min(0.62 * height, 0.5 * width / FACE_ASPECT)
    if not others:
        return [_about(width / 2, 0.52 * height, min(0.7 * height, 0.85 * width / FACE_ASPECT))]
    large = _about(0.31 * width, 0.54 * height, tall)
    columns = 1 if others <= 3 else 2
    rows = -(-others // columns)
    left = large[2] + 0.03 * width
    room = width - left
    small = min(0.8 * height / rows, 0.86 * room / columns / FACE_ASPECT, 0.6 * tall)
    boxes = [large]
    for i in range(others):
        cx = left + room * (i % columns + 0.5) / columns
        boxes.append(_about(cx, height * (i // columns + 0.5) / rows, small))
    return boxes


def _about(cx: float, cy: float, tall: float) -> BBox:
    wide = FACE_ASPECT * tall
    return (cx - wide / 2, cy - tall / 2, cx + wide / 2, cy + tall / 2)
