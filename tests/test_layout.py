"""Boxes: checked, turned into tokens, scaled; default groups that fit any picture."""

import itertools
import math

import numpy as np
import pytest
import torch

from withanyone import layout

GOOD = (10.0, 10.0, 50.0, 60.5)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((-1, 0, 20, 20), r"`bboxes\[1\]` is \(-1, 0, 20, 20\).*outside.*x between 0 and 96"),
        ((0, 0, 97, 20), r"`bboxes\[1\]`.*outside"),
        ((0, 0, 20, 129), r"`bboxes\[1\]`.*outside.*y between 0 and 128"),
        ((50, 10, 20, 30), r"`bboxes\[1\]`.*no area.*x1 < x2"),
        ((10, 30, 20, 30), r"`bboxes\[1\]`.*no area"),
        ((10, math.nan, 20, 30), r"`bboxes\[1\]`.*finite"),
        ((10, 0, math.inf, 30), r"`bboxes\[1\]`.*finite"),
        ((10, 0, 30), r"`bboxes\[1\]`.*four numbers"),
        (("a", 0, 30, 40), r"`bboxes\[1\]`.*four numbers"),
        (7, r"`bboxes\[1\]`.*four numbers"),
        (None, r"`bboxes\[1\]`.*four numbers"),
    ],
)
def test_a_bad_box_is_named_with_the_remedy(box, message):
    with pytest.raises(ValueError, match=message):
        layout.check_bboxes([GOOD, box], height=128, width=96)


def test_a_box_in_the_strip_below_the_last_token_touches_none():
    with pytest.raises(ValueError, match=r"`bboxes\[0\]`.*touches no image token"):
        layout.check_bboxes([(0, 128, 10, 130)], height=130, width=96)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_as_many_boxes_as_people(count):
    with pytest.raises(ValueError, match=f"`bboxes` holds {count} boxes for 2 people"):
        layout.check_bboxes([GOOD] * count, 128, 96, num_people=2)


@pytest.mark.parametrize("value", [None, 3, "box"])
def test_not_a_list_of_boxes(value):
    with pytest.raises(ValueError, match="`bboxes"):
        layout.check_bboxes(value, 128, 96)


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple, list])
def test_arrays_tensors_and_sequences_are_boxes(kind):
    assert layout.check_bboxes(
        kind([kind(GOOD), kind(GOOD)]) if kind in (tuple, list) else kind([GOOD, GOOD]), 128, 96
    ) == [GOOD, GOOD]


def test_a_box_may_fill_the_picture():
    assert layout.check_bboxes([(0, 0, 96, 128)], 128, 96) == [(0.0, 0.0, 96.0, 128.0)]


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        ((16, 16, 32, 32), (1, 2), (1, 2)),  # exactly one token
        ((15.9, 16, 32, 32), (1, 2), (0, 2)),
        ((16, 16, 32.1, 33), (1, 3), (1, 3)),
        ((-50, -50, 10, 10), (0, 1), (0, 1)),  # clipped
        ((80, 100, 500, 500), (6, 8), (5, 6)),
        ((20, 20, 20.5, 20.5), (1, 2), (1, 2)),  # smaller than a token
    ],
)
def test_a_box_touches_floor_to_ceil_clipped(box, rows, columns):
    mask = layout.token_mask([[box]], height=128, width=96).reshape(8, 6)
    expected = torch.zeros(8, 6, dtype=torch.bool)
    expected[slice(*rows), slice(*columns)] = True
    assert torch.equal(mask, expected)


def test_rows_of_a_batch_may_have_different_numbers_of_faces():
    mask = layout.token_mask([[GOOD, (60, 60, 90, 90)], [], [GOOD]], 128, 96)
    assert mask.shape == (3, 48, 2)
    assert mask[0].any(0).tolist() == [True, True]
    assert not mask[1].any() and not mask[2, :, 1].any()
    assert torch.equal(mask[0, :, 0], mask[2, :, 0])


def test_a_box_outside_the_picture_names_its_row():
    with pytest.raises(ValueError, match=r"`bboxes\[1\]\[0\]`.*touches no image token"):
        layout.token_mask([[GOOD], [(200, 0, 220, 20)]], 128, 96)


@pytest.mark.parametrize(
    ("height", "width", "name"), [(100, 96, "height"), (128, 90, "width"), (0, 96, "height")]
)
def test_sizes_must_be_multiples_of_the_patch(height, width, name):
    with pytest.raises(ValueError, match=f"`{name}` is .*multiple of 16"):
        layout.token_mask([[GOOD]], height, width)


def test_scaling_there_and_back():
    boxes = [GOOD, (1, 2, 3, 4)]
    scaled = layout.scale_bboxes(boxes, (128, 96), (256, 48))
    assert scaled[1] == (0.5, 4.0, 1.5, 8.0)
    assert layout.scale_bboxes(scaled, (256, 48), (128, 96)) == boxes


SIZES = [(128, 128), (256, 192), (192, 256), (512, 1024), (1024, 512), (256, 1024), (1024, 256), (768, 1360)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", range(1, 9))
def test_default_boxes_are_valid_apart_and_as_large_as_each_other(count, size):
    height, width = size
    boxes = layout.default_bboxes(count, height, width)
    assert layout.check_bboxes(boxes, height, width, num_people=count) == boxes
    for (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) in itertools.combinations(boxes, 2):
        assert ax2 < bx1 or bx2 < ax1 or ay2 < by1 or by2 < ay1
    widths, heights = {round(b[2] - b[0], 6) for b in boxes}, {round(b[3] - b[1], 6) for b in boxes}
    assert len(widths) == len(heights) == 1
    assert widths.pop() / heights.pop() == pytest.approx(layout.FACE_ASPECT)


def test_one_face_is_half_the_picture_high_and_faces_shrink_with_company():
    heights = [layout.default_bboxes(n, 256, 256)[0] for n in range(1, 9)]
    heights = [box[3] - box[1] for box in heights]
    assert heights[0] == 128
    assert all(a >= b for a, b in itertools.pairwise(heights))


def test_a_row_runs_from_left_to_right():
    lefts = [box[0] for box in layout.default_bboxes(4, 256, 512)]
    assert lefts == sorted(lefts)


@pytest.mark.parametrize("count", [0, 9, -1])
def test_no_default_for_nobody_or_a_crowd(count):
    with pytest.raises(ValueError, match=f"no default layout for {count} people"):
        layout.default_bboxes(count, 256, 256)
