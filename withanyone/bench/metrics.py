"""The measures of MultiID-Bench as pure functions on face embeddings, and the statistics over cases.

Embeddings are arrays (N, D) of any length of vector: every measure uses directions only, so raw and unit
embeddings give the same number, and a rotation of the embedding space changes nothing. Written from
section 4 of the WithAnyone paper (arXiv 2510.14975).

Where a face is missing, nothing is dropped here: callers count it (`sim_gt` 0 for an expected face that was
not found; see `withanyone.bench.results` for how each mean counts what is missing).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

# Copy-paste is ranked only among methods whose Sim(GT) exceeds this (Tables 1 and 2 of the paper).
RANKING_THRESHOLD_SINGLE = 0.40
RANKING_THRESHOLD_MULTI = 0.35


def _unit(name: str, embeddings: np.ndarray) -> np.ndarray:
    """Rows of unit length in float64; refuses what has no direction."""
    array = np.asarray(embeddings, dtype=np.float64)
    if array.ndim != 2:
        raise ValueError(
            f"`{name}` must be an array (N, D), got shape {array.shape}; reshape one embedding to (1, D)"
        )
    if not np.isfinite(array).all():
        raise ValueError(
            f"`{name}` holds NaN or infinity; leave faces without an embedding out and count them as missing"
        )
    norms = np.linalg.norm(array, axis=1, keepdims=True)
    if (norms == 0).any():
        rows = np.flatnonzero(norms[:, 0] == 0).tolist()
        raise ValueError(f"`{name}` has rows of length zero, which have no direction: {rows}")
    return array / norms


def _same_shape(**arrays: np.ndarray) -> None:
    shapes = {name: array.shape for name, array in arrays.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"embeddings must have one shape, got {shapes}")


def similarity_matrix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of every row of `a` (N, D) with every row of `b` (M, D): (N, M), in [-1, 1]."""
    a, b = _unit("a", a), _unit("b", b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"`a` and `b` must have one width, got {a.shape[1]} and {b.shape[1]}")
    return np.clip(a @ b.T, -1.0, 1.0)


def sim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine similarity row by row: (N, D), (N, D) -> (N,), in [-1, 1].

    Sim(GT) = sim(generated, target), Sim(Ref) = sim(generated, reference).
    """
    a, b = _unit("a", a), _unit("b", b)
    _same_shape(a=a, b=b)
    return np.clip((a * b).sum(axis=1), -1.0, 1.0)


def angle(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Angle row by row in radians: (N, D), (N, D) -> (N,), in [0, pi].

    2 atan2(|a - b|, |a + b|) on unit rows is arccos(cos(a, b)) without arccos' loss of digits near 0 and pi.
    """
    a, b = _unit("a", a), _unit("b", b)
    _same_shape(a=a, b=b)
    return 2.0 * np.arctan2(np.linalg.norm(a - b, axis=1), np.linalg.norm(a + b, axis=1))


def copy_paste(
    generated: np.ndarray, target: np.ndarray, reference: np.ndarray, eps: float = 1e-6
) -> np.ndarray:
    """M_CP = (theta_gt - theta_gr) / max(theta_tr, eps), row by row: three (N, D) -> (N,).

    -1: the output is the target; +1: it is the reference; by the triangle inequality on the sphere it lies
    in [-1, 1] wherever theta_tr >= eps. `eps` (radians) guards the division where target and reference
    coincide: there the numerator is no larger than theta_tr, so the value goes to 0, never to infinity.
    """
    if not eps > 0:
        raise ValueError(f"`eps` must be a positive angle in radians, got {eps}")
    theta_gt, theta_gr, theta_tr = (
        angle(generated, target),
        angle(generated, reference),
        angle(target, reference),
    )
    return (theta_gt - theta_gr) / np.maximum(theta_tr, eps)


def assign_faces(detected: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One-to-one assignment of highest total cosine (Hungarian method): (N, D), (M, D) -> rows, columns.

    min(N, M) pairs, `detected[rows[k]]` being `expected[columns[k]]`, sorted by column. What is left over on
    either side is extra or missing, and the caller's to count. Swapped people are hidden by this assignment
    by construction: judge swaps by the boxes as well (`match_boxes`, `swapped`).
    """
    if len(detected) == 0 or len(expected) == 0:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    rows, columns = linear_sum_assignment(similarity_matrix(detected, expected), maximize=True)
    order = np.argsort(columns)
    return rows[order], columns[order]


def blending(
    generated: np.ndarray, references: np.ndarray, assignment: tuple[Sequence[int], Sequence[int]]
) -> float:
    """Mean cosine of one picture's faces with the people they should not be: off the assignment's diagonal.

    generated (N, D), references (M, D), assignment (rows, columns) as from `assign_faces`. In [-1, 1]; lower
    is better. At least two assigned pairs, since one person cannot be blended with another.
    """
    rows, columns = (np.asarray(part, dtype=np.int64) for part in assignment)
    if rows.shape != columns.shape or rows.ndim != 1:
        raise ValueError(
            f"`assignment` must be two index lists of one length, got {rows.shape} and {columns.shape}"
        )
    if len(set(rows.tolist())) != len(rows) or len(set(columns.tolist())) != len(columns):
        raise ValueError(
            f"`assignment` must be one to one, got rows {rows.tolist()}, columns {columns.tolist()}"
        )
    if len(rows) < 2:
        raise ValueError(
            f"blending needs at least two assigned people, got {len(rows)}; leave one-person cases out"
        )
    matrix = similarity_matrix(np.asarray(generated)[rows], np.asarray(references)[columns])  # (K, K)
    return float(matrix[~np.eye(len(rows), dtype=bool)].mean())


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes xyxy: (N, 4), (M, 4) -> (N, M), in [0, 1]."""
    a, b = np.asarray(a, dtype=np.float64).reshape(-1, 4), np.asarray(b, dtype=np.float64).reshape(-1, 4)
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    overlap = np.clip(high - low, 0, None).prod(axis=-1)  # (N, M)
    area_a, area_b = (np.clip(x[:, 2:] - x[:, :2], 0, None).prod(axis=-1) for x in (a, b))
    union = area_a[:, None] + area_b[None] - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)


def match_boxes(detected: np.ndarray, expected: np.ndarray, threshold: float = 0.3) -> np.ndarray:
    """For each expected box (M, 4) the index of the detected box (N, 4) that stands there, or -1: (M,).

    One to one, of highest total IoU; a pair under `threshold` is no match, so the expected face is missing.
    """
    found = np.full(len(expected), -1, dtype=np.int64)
    if len(detected) and len(expected):
        iou = box_iou(detected, expected)
        for row, column in zip(*linear_sum_assignment(iou, maximize=True), strict=True):
            if iou[row, column] >= threshold:
                found[column] = row
    return found


def swapped(faces_in_boxes: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Which people's boxes hold a face nearer to another person of the picture: (N, D), (N, D) -> (N,) of
    bool.

    Row i is the face found in person i's box and person i's embedding. Needs at least two people to be ever
    true.
    """
    matrix = similarity_matrix(faces_in_boxes, references)
    _same_shape(faces_in_boxes=np.asarray(faces_in_boxes), references=np.asarray(references))
    return matrix.argmax(axis=1) != np.arange(len(matrix))


def may_rank_copy_paste(sim_gt: float, several_people: bool) -> bool:
    """Whether a method's copy-paste is ranked: only with Sim(GT) > 0.40 (one person) or 0.35 (several).

    A method that draws strangers copies nothing, so its low copy-paste says nothing (Tables 1 and 2).
    """
    return sim_gt > (RANKING_THRESHOLD_MULTI if several_people else RANKING_THRESHOLD_SINGLE)


def rank_one(
    generated: np.ndarray,
    targets: np.ndarray,
    own: Sequence[int],
    names: Sequence[str],
    *,
    gallery: int = 200,
    seed: int = 0,
) -> np.ndarray:
    """Whether a face is nearer to its own target than to those of gallery - 1 other people: (G,) of bool.

    generated (G, D); targets (U, D), each the face of the person `names[u]`; `targets[own[g]]` is what face g
    should be. The others are drawn by `seed`; where there are fewer, all are taken.

    Raises:
        ValueError: there is no other person to tell a face apart from.
    """
    matrix = similarity_matrix(generated, targets)  # (G, U)
    names, rng = np.asarray(names), np.random.default_rng(seed)
    if len(np.unique(names)) < 2:
        raise ValueError("`names` must name at least two people: the right one is found among others")
    hits = np.zeros(len(matrix), bool)
    for g, right in enumerate(own):
        crowd = rng.permutation(np.flatnonzero(names != names[right]))[: gallery - 1]
        hits[g] = matrix[g, right] > matrix[g, crowd].max()
    return hits


# ---- pose -----------------------------------------------------------------------------------------------


def pose_of(kps: np.ndarray) -> np.ndarray:
    """Yaw and roll read off five landmarks: (N, 5, 2) -> (N, 2).

    yaw: how far the nose stands from the middle between the eyes, along the line of the eyes, in distances
    between the eyes (0: from the front; about +-0.5: half profile; > 0: turned to the picture's right).
    roll: the angle of that line in radians (> 0: clockwise, since y points down). Landmarks are left eye,
    right eye, nose, mouth corners. No truth or model is needed, so this works in every world.
    """
    kps = np.asarray(kps, dtype=np.float64)
    if kps.ndim != 3 or kps.shape[1:] != (5, 2):
        raise ValueError(f"`kps` must be landmarks (N, 5, 2), got shape {kps.shape}")
    across = kps[:, 1] - kps[:, 0]  # (N, 2)
    span = np.maximum(np.linalg.norm(across, axis=1), 1e-6)
    nose = kps[:, 2] - (kps[:, 0] + kps[:, 1]) / 2
    yaw = (nose * across).sum(axis=1) / span**2
    return np.stack([yaw, np.arctan2(across[:, 1], across[:, 0])], axis=1)


def copied_share(generated: np.ndarray, target: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """(|g - t| - |g - r|) / |t - r| for numbers such as a yaw: copy-paste's formula on a line, (N,) -> (N,).

    -1: as asked (the target's value); +1: as in the reference. Give only rows in which both differ.
    """
    g, t, r = (np.asarray(value, dtype=np.float64) for value in (generated, target, reference))
    if (t == r).any():
        raise ValueError("`target` and `reference` must differ in every row: leave rows out where they agree")
    return (np.abs(g - t) - np.abs(g - r)) / np.abs(t - r)


def kernel_distance(features: np.ndarray, real: np.ndarray) -> float:
    """How far two sets of pictures lie apart, as features (N, D) and (M, D) of a network; 0 where alike.

    KID (arXiv 1801.01401): the squared maximum mean discrepancy with the kernel (x . y / D + 1)^3, unbiased,
    so it may be a little below 0 and does not depend on how many pictures there are. Each feature is first
    put to mean 0 and deviation 1 over `real`, so that none counts for its size.
    """
    a, b = (np.asarray(value, dtype=np.float64) for value in (features, real))
    for name, value in (("features", a), ("real", b)):
        if value.ndim != 2 or len(value) < 2 or not np.isfinite(value).all():
            raise ValueError(f"`{name}` must be finite, (N, D) with N of at least 2, got shape {value.shape}")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"`features` and `real` must have one width, got {a.shape[1]} and {b.shape[1]}")
    spread = b.std(axis=0)
    a, b = ((value - b.mean(axis=0)) / np.where(spread > 0, spread, 1.0) for value in (a, b))

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: np.ndarray) -> float:
        values = kernel(x, x)
        return (values.sum() - np.trace(values)) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def disagreement(values: Sequence) -> float:
    """Share of pairs that differ (Gini-Simpson, unbiased): 0 where all are alike, 1 where none are."""
    counts = np.unique(np.asarray(values), return_counts=True)[1]
    total = counts.sum()
    if total < 2:
        raise ValueError(f"`values` must hold at least two, got {total}: one picture has no diversity")
    return float(1.0 - (counts * (counts - 1)).sum() / (total * (total - 1)))


# ---- statistics over cases ------------------------------------------------------------------------------


def pareto_front(points: np.ndarray, larger_is_better: Sequence[bool]) -> np.ndarray:
    """Which points no other point beats: (N, M), one flag an objective -> (N,) of bool.

    Beaten: another point is at least as good in every objective and better in one. Points with NaN are never
    on the front.
    """
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != len(larger_is_better):
        raise ValueError(
            f"`points` must be (N, {len(larger_is_better)}), a column an objective, got {points.shape}"
        )
    good = np.where(larger_is_better, points, -points)  # (N, M), larger is better
    whole = np.isfinite(good).all(axis=1)
    at_least = (good[:, None] >= good[None]).all(axis=2)  # (N, N): row is at least as good as column
    better = (good[:, None] > good[None]).any(axis=2)
    beaten = (at_least & better & whole[:, None]).any(axis=0)
    return whole & ~beaten


def bootstrap_interval(
    values: np.ndarray,
    groups: Sequence[int] | None = None,
    *,
    statistic: Callable[[np.ndarray], float] = np.mean,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of `statistic` over cases.

    `values` (N,) one a face; `groups` (N,) its case: whole cases are drawn, since the faces of one picture
    depend on each other. Without `groups` every value is a case of its own.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"`values` must be a non-empty list, got shape {values.shape}")
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie between 0 and 1, got {level}")
    groups_array = np.arange(len(values)) if groups is None else np.asarray(groups)
    if len(groups_array) != len(values):
        raise ValueError(
            f"`groups` must name a case for each of {len(values)} values, got {len(groups_array)}"
        )
    codes, counts = np.unique(groups_array, return_inverse=True, return_counts=True)[1:]
    drawn = np.random.default_rng(seed).integers(0, len(counts), (resamples, len(counts)))  # (R, cases)
    if statistic is np.mean:  # sums and counts of cases are enough: no value is gathered
        sums = np.bincount(codes, weights=values)
        draws = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    else:
        members = np.split(np.argsort(codes, kind="stable"), np.cumsum(counts)[:-1])
        draws = [statistic(values[np.concatenate([members[k] for k in row])]) for row in drawn]
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_with_interval(values: Sequence[float], groups: Sequence | None = None, **bootstrap) -> dict:
    """{"mean", "low", "high", "n", "cases"}: a mean over faces with its interval over cases.

    `bootstrap`: level, resamples and seed of `bootstrap_interval`.
    """
    values = np.asarray(values, dtype=np.float64)
    low, high = bootstrap_interval(values, groups, **bootstrap)
    cases = len(values) if groups is None else len(np.unique(np.asarray(groups)))
    return {
        "mean": round(float(values.mean()), 6),
        "low": round(low, 6),
        "high": round(high, 6),
        "n": len(values),
        "cases": cases,
    }


def paired_difference(
    new: Sequence[float], old: Sequence[float], groups: Sequence | None = None, **bootstrap
) -> dict:
    """Mean of new - old on the same faces, with its interval over cases: what a change did, noise paired out.

    Two lists of one length, in one order; otherwise as `mean_with_interval`.
    """
    new, old = np.asarray(new, dtype=np.float64), np.asarray(old, dtype=np.float64)
    if new.shape != old.shape:
        raise ValueError(f"`new` and `old` must be of one length, got {new.shape} and {old.shape}")
    return mean_with_interval(new - old, groups, **bootstrap)
