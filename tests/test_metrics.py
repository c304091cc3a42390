"""The bench's measures against hand-computed cases and their invariances."""

import numpy as np
import pytest

from withanyone.bench import metrics


def unit(degrees: float) -> list[float]:
    return [np.cos(np.radians(degrees)), np.sin(np.radians(degrees))]


def random_rotation(dim: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))[0]


def faces(count: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, dim)) * 7


def test_sim_by_hand() -> None:
    a, b = np.array([[3.0, 0.0], [0.0, 2.0]]), np.array([unit(60), unit(180)])
    np.testing.assert_allclose(metrics.sim(a, b), [0.5, 0.0], atol=1e-12)


def test_copy_paste_by_hand() -> None:
    # target at 0, reference at 90, generated at 30 degrees: (30 - 60) / 90
    value = metrics.copy_paste(np.array([unit(30)]), np.array([unit(0)]), np.array([unit(90)]))
    np.testing.assert_allclose(value, [-1 / 3], atol=1e-12)


def test_copy_paste_is_minus_one_on_the_target_and_plus_one_on_the_reference() -> None:
    target, reference = faces(20, seed=1), faces(20, seed=2)
    np.testing.assert_allclose(metrics.copy_paste(target, target, reference), -1, atol=1e-7)
    np.testing.assert_allclose(metrics.copy_paste(reference, target, reference), 1, atol=1e-7)


def test_copy_paste_stays_in_its_range_and_survives_equal_target_and_reference() -> None:
    g, t, r = faces(500, 4, 3), faces(500, 4, 4), faces(500, 4, 5)
    assert np.abs(metrics.copy_paste(g, t, r)).max() <= 1 + 1e-9
    np.testing.assert_allclose(metrics.copy_paste(g, t, t), 0, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 250.0])
def test_length_and_rotation_change_nothing(scale: float) -> None:
    g, t, r = faces(8, seed=6), faces(8, seed=7), faces(8, seed=8)
    turn = random_rotation(16) * scale
    np.testing.assert_allclose(metrics.sim(g @ turn, t @ turn), metrics.sim(g, t), atol=1e-10)
    np.testing.assert_allclose(
        metrics.copy_paste(g @ turn, t @ turn, r @ turn), metrics.copy_paste(g, t, r), atol=1e-8
    )


def test_assignment_undoes_any_order_and_leaves_extra_faces_over() -> None:
    people = faces(5, seed=9)
    order = np.array([3, 0, 4, 1])
    rows, columns = metrics.assign_faces(people[order] + 0.01, people)
    assert columns.tolist() == sorted(order.tolist())
    assert [order[row] for row in rows] == columns.tolist()
    assert metrics.assign_faces(people[:0], people)[0].size == 0


def test_blending_by_hand_and_order_free() -> None:
    # faces at 0 and 60 degrees, people at 0 and 90: off the diagonal cos(90) = 0 and cos(60) = 0.5
    generated, people = np.array([unit(0), unit(60)]), np.array([unit(0), unit(90)])
    value = metrics.blending(generated, people, metrics.assign_faces(generated, people))
    assert value == pytest.approx(0.25)
    turned = generated[::-1]
    assert metrics.blending(turned, people, metrics.assign_faces(turned, people)) == pytest.approx(value)


def test_blending_refuses_one_person_and_double_assignment() -> None:
    people = faces(2)
    with pytest.raises(ValueError, match="at least two"):
        metrics.blending(people[:1], people[:1], ([0], [0]))
    with pytest.raises(ValueError, match="one to one"):
        metrics.blending(people, people, ([0, 0], [0, 1]))


def test_swaps_are_seen_by_box_though_hidden_by_the_assignment() -> None:
    people = faces(3, seed=10)
    in_boxes = people[[1, 0, 2]]
    assert metrics.swapped(in_boxes, people).tolist() == [True, True, False]
    rows, columns = metrics.assign_faces(in_boxes, people)
    np.testing.assert_allclose(metrics.sim(in_boxes[rows], people[columns]), 1)


def test_boxes_are_matched_one_to_one_and_missing_ones_say_so() -> None:
    expected = np.array([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]])
    detected = np.array([[21, 1, 31, 11], [0, 0, 10, 10], [100, 100, 110, 110]])
    assert metrics.match_boxes(detected, expected).tolist() == [1, 0, -1]
    assert metrics.match_boxes(np.empty((0, 4)), expected).tolist() == [-1, -1, -1]
    assert metrics.box_iou([[0, 0, 2, 2]], [[1, 0, 3, 2]])[0, 0] == pytest.approx(1 / 3)


def test_bootstrap_covers_the_mean_and_draws_whole_cases() -> None:
    values = np.random.default_rng(0).normal(0.3, 1, 400)
    low, high = metrics.bootstrap_interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    # four equal faces in each of 100 cases carry the information of 100 values, not of 400
    grouped = metrics.bootstrap_interval(np.repeat(values[:100], 4), np.repeat(np.arange(100), 4))
    assert grouped[1] - grouped[0] == pytest.approx(2 * 1.96 / 10, rel=0.25)


def test_the_interval_of_a_mean_is_that_of_any_statistic() -> None:
    """The mean's short way through sums and counts, against the long way."""
    rng = np.random.default_rng(2)
    values, groups = rng.normal(size=90), rng.integers(0, 25, 90)
    short = metrics.bootstrap_interval(values, groups, resamples=200, seed=4)
    long = metrics.bootstrap_interval(
        values, groups, statistic=lambda drawn: float(np.mean(drawn)), resamples=200, seed=4
    )
    assert short == pytest.approx(long)
    figure = metrics.mean_with_interval(values, groups, resamples=200, seed=4)
    assert (figure["low"], figure["high"]) == pytest.approx(short, abs=1e-6)
    assert (figure["n"], figure["cases"]) == (90, len(np.unique(groups)))
    assert figure["mean"] == pytest.approx(values.mean(), abs=1e-6)


def test_a_paired_difference_loses_what_cases_have_in_common() -> None:
    rng = np.random.default_rng(3)
    hard, noise = rng.normal(size=200), rng.normal(scale=0.05, size=200)
    change = metrics.paired_difference(hard + 0.02 + noise, hard)
    assert change["low"] < 0.02 < change["high"]
    assert change["high"] - change["low"] == pytest.approx(2 * 1.96 * 0.05 / np.sqrt(200), rel=0.2)
    with pytest.raises(ValueError, match="one length"):
        metrics.paired_difference([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("sim_gt", "several", "ranked"),
    [
        (0.40, False, False),
        (0.401, False, True),
        (0.36, False, False),
        (0.36, True, True),
        (0.35, True, False),
    ],
)
def test_copy_paste_is_ranked_among_the_alike_only(sim_gt: float, several: bool, ranked: bool) -> None:
    assert metrics.may_rank_copy_paste(sim_gt, several) is ranked


def test_the_right_one_among_others() -> None:
    targets = np.eye(4)
    generated = np.array([[1.0, 0.1, 0, 0], [0.9, 1.0, 0, 0], [0, 1.0, 0.9, 0]])
    names = ["a", "b", "c", "d"]
    assert metrics.rank_one(generated, targets, [0, 1, 2], names).tolist() == [True, True, False]
    # a person's own other targets are no rivals
    assert metrics.rank_one(generated[2:], targets, [2], ["a", "c", "c", "d"]).tolist() == [True]
    # of a gallery of two only one rival is drawn, the wrong one in one case of three
    hits = [metrics.rank_one(generated[2:], targets, [2], names, gallery=2, seed=k)[0] for k in range(60)]
    assert 0.5 < np.mean(hits) < 0.85
    with pytest.raises(ValueError, match="two people"):
        metrics.rank_one(generated, targets, [0, 1, 2], ["a"] * 4)


def turned(kps: np.ndarray, degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return kps @ np.array([[c, s], [-s, c]])


def test_yaw_and_roll_of_landmarks() -> None:
    ahead = np.array([[30.0, 40], [70, 40], [50, 60], [38, 80], [62, 80]])
    right = ahead.copy()
    right[2, 0] += 12  # the nose, towards the picture's right
    poses = metrics.pose_of(np.stack([ahead, right, turned(ahead, 20), 3 * turned(right, -10) + 7]))
    np.testing.assert_allclose(poses[:, 0], [0, 0.3, 0, 0.3], atol=1e-12)
    np.testing.assert_allclose(np.degrees(poses[:, 1]), [0, 0, 20, -10], atol=1e-9)
    with pytest.raises(ValueError, match="5, 2"):
        metrics.pose_of(ahead)


def test_copying_a_number() -> None:
    share = metrics.copied_share([0.0, 0.4, 0.1, 0.9], [0.0] * 4, [0.4] * 4)
    np.testing.assert_allclose(share, [-1, 1, -0.5, 1])
    with pytest.raises(ValueError, match="must differ"):
        metrics.copied_share([0.1], [0.2], [0.2])


def test_disagreement_of_pairs_by_hand() -> None:
    assert metrics.disagreement(["a", "a", "a"]) == 0
    assert metrics.disagreement(["a", "b", "c"]) == 1
    assert metrics.disagreement(["a", "a", "b"]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="at least two"):
        metrics.disagreement(["a"])


def test_the_front_by_hand() -> None:
    points = [[0.3, 0.1], [0.5, 0.4], [0.2, 0.2], [0.5, 0.4], [0.5, 0.5], [np.nan, 0.0]]
    assert metrics.pareto_front(points, [True, False]).tolist() == [True, True, False, True, False, False]
    with pytest.raises(ValueError, match="a column an objective"):
        metrics.pareto_front(points, [True])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: metrics.sim(np.ones(4), np.ones(4)), r"`a`.*\(N, D\)"),
        (lambda: metrics.sim(np.ones((1, 4)), np.ones((2, 4))), "one shape"),
        (lambda: metrics.sim(np.zeros((1, 4)), np.ones((1, 4))), "length zero"),
        (lambda: metrics.sim(np.full((1, 4), np.nan), np.ones((1, 4))), "NaN"),
        (lambda: metrics.copy_paste(np.ones((1, 4)), np.ones((1, 4)), np.ones((1, 4)), eps=0), "`eps`"),
        (lambda: metrics.bootstrap_interval([]), "non-empty"),
    ],
)
def test_bad_input_is_named(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


# ---- kernel distance --------------------------------------------------------------------------------------


def test_kernel_distance_is_the_unbiased_estimate():
    """Against plain loops over pairs."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 3)), rng.normal(1.0, 2.0, size=(7, 3))
    a, b = ((value - y.mean(axis=0)) / y.std(axis=0) for value in (x, y))

    def mean_over(left, right, skip_same):
        pairs = [(i, j) for i in range(len(left)) for j in range(len(right)) if not (skip_same and i == j)]
        return np.mean([(left[i] @ right[j] / 3 + 1) ** 3 for i, j in pairs])

    expected = mean_over(a, a, True) + mean_over(b, b, True) - 2 * mean_over(a, b, False)
    assert metrics.kernel_distance(x, y) == pytest.approx(expected)


def test_kernel_distance_is_unbiased_and_sees_a_shift():
    rng = np.random.default_rng(0)
    same = [metrics.kernel_distance(rng.normal(size=(20, 8)), rng.normal(size=(200, 8))) for _ in range(200)]
    assert abs(np.mean(same)) < 4 * np.std(same) / 200**0.5 and np.min(same) < 0
    assert metrics.kernel_distance(rng.normal(size=(20, 8)) + 1, rng.normal(size=(200, 8))) > np.max(same)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros((1, 4)), r"`features` must be finite, \(N, D\) with N of at least 2"),
        (np.full((3, 4), np.nan), r"`features` must be finite"),
        (np.zeros((3, 5)), r"one width, got 5 and 4"),
    ],
)
def test_kernel_distance_refuses_what_it_cannot_compare(features, message):
    with pytest.raises(ValueError, match=message):
        metrics.kernel_distance(features, np.random.default_rng(0).normal(size=(6, 4)))
