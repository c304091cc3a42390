"""Arrangements: always valid boxes, and what their names promise."""

from __future__ import annotations

import numpy as np
import pytest

from withanyone.arrangements import ARRANGEMENTS, arrange
from withanyone.bench.metrics import box_iou
from withanyone.layout import FACE_ASPECT, check_bboxes, default_bboxes

SIZES = [(128, 128), (192, 256), (256, 192), (1024, 1024), (832, 1216), (1216, 832)]


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("num_people", range(1, 9))
def test_boxes_lie_inside_do_not_overlap_and_have_a_faces_shape(num_people: int, arrangement: str) -> None:
    for height, width in SIZES:
        boxes = np.array(arrange(num_people, height, width, arrangement))
        check_bboxes(boxes.tolist(), height, width, num_people=num_people)
        assert (box_iou(boxes, boxes) - np.eye(num_people)).max() < 1e-9
        assert np.allclose((boxes[:, 2] - boxes[:, 0]) / (boxes[:, 3] - boxes[:, 1]), FACE_ASPECT)


def test_names_keep_their_promise() -> None:
    def middles(n: int, arrangement: str) -> np.ndarray:
        boxes = np.array(arrange(n, 1024, 1024, arrangement))
        return (boxes[:, :2] + boxes[:, 2:]) / 2

    side = middles(4, "side by side")
    assert (np.diff(side[:, 0]) > 0).all() and np.ptp(side[:, 1]) < 1e-6
    triangle = middles(3, "triangle")
    assert triangle[0, 1] < triangle[1:, 1].min() and triangle[1, 0] < triangle[0, 0] < triangle[2, 0]
    assert [len(np.unique(middles(n, "triangle")[:, 1].round(6))) for n in range(2, 9)] == [
        2,
        2,
        2,
        3,
        3,
        3,
        3,
    ]
    assert len(np.unique(middles(5, "rows")[:, 1].round(6))) == 2
    large = np.array(arrange(4, 1024, 1024, "one large"))
    tall = large[:, 3] - large[:, 1]
    assert tall[0] > 1.5 * tall[1:].max()
    assert arrange(3, 128, 192) == default_bboxes(3, 128, 192)


@pytest.mark.parametrize(
    "arguments, named",
    [
        ((9, 64, 64), "8"),
        ((0, 64, 64), "num_people"),
        ((True, 64, 64), "num_people"),
        ((2, 64, 64, "star"), "star"),
    ],
)
def test_what_does_not_fit_is_named(arguments: tuple, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        arrange(*arguments)
