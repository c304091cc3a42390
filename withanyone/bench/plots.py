"""The bench's figures: similarity against copying (Figure 5), per case, sliders, real pictures, attributes.

Every function takes results (`read_results`) and a file name that ends in png, pdf or svg. Colours are those
of the Okabe-Ito palette, which colour-blind people can tell apart.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import metrics
from .figures import METRICS, values_of
from .published import TABLE_1, TABLE_2, Published
from .tables import PUBLISHED_BENCH, SUBSET_WORDS

BLUE, ORANGE, GREEN, PINK, SKY, YELLOW = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
PALETTE = (BLUE, ORANGE, GREEN, PINK, SKY, YELLOW)
GREY, INK = "#8a8f98", "#22262b"
OURS = "WithAnyone"  # the row that the fitted curve leaves out
SUFFIXES = (".png", ".pdf", ".svg")


def start_figure(width: float, height: float, columns: int = 1):
    """A figure and its axes, without a display."""
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError('plots need the package matplotlib: pip install "withanyone[bench]".') from error

    with rc_context({"font.size": 9}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(GREY)
        axis.tick_params(colors=INK, labelsize=8)
        axis.grid(color="#e6e8eb", linewidth=0.7)
        axis.set_axisbelow(True)
    return figure, axes


def save_figure(figure, out: str | os.PathLike) -> None:
    out = Path(out)
    if out.suffix not in SUFFIXES:
        raise ValueError(f"`out` is {str(out)!r}: give a file that ends in {', '.join(SUFFIXES)}.")
    # Without the time of day in it, the same figures give the same file.
    stamps = {".png": {"Software": None}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
    figure.savefig(out, dpi=200, metadata=stamps[out.suffix])


# ---- similarity against copying --------------------------------------------------------------------------


def fit_tradeoff(sim_gt: Sequence[float], copy_paste: Sequence[float]) -> tuple[float, float, float]:
    """(a, b, scatter) of copy_paste = exp(a + b sim_gt), least squares in copy_paste; scatter is the standard
    deviation of what is left, two degrees of freedom taken.

    The straight line in the logarithm is where the search begins; Gauss-Newton does the rest.

    Raises:
        ValueError: fewer than three methods, or a copy-paste that is not positive.
    """
    x, y = np.asarray(sim_gt, np.float64), np.asarray(copy_paste, np.float64)
    if len(x) < 3 or x.shape != y.shape or (y <= 0).any():
        raise ValueError("the trade-off curve needs three methods or more, each with copy-paste above 0")
    b, a = np.polyfit(x, np.log(y), 1)
    for _ in range(50):
        curve = np.exp(a + b * x)
        step = np.linalg.lstsq(np.stack([curve, curve * x], axis=1), y - curve, rcond=None)[0]
        a, b = a + step[0], b + step[1]
        if np.abs(step).max() < 1e-12:
            break
    left = y - np.exp(a + b * x)
    return float(a), float(b), float(np.sqrt((left**2).sum() / (len(x) - 2)))


def plot_tradeoff(results: Sequence[dict], out: str | os.PathLike, *, several: bool = False) -> list[str]:
    """Figure 5: Sim(GT) against copy-paste, the curve fitted to all published methods but WithAnyone, and
    where each stands off it. Results on MultiID-Bench are drawn in; those of other worlds are refused.

    Returns:
        One line a method: its distance from the curve, in copy-paste and in the others' scatter.
    """
    wrong = [r["method"] for r in results if r["bench"]["name"] != PUBLISHED_BENCH]
    if wrong:
        raise ValueError(
            f"`results` of {', '.join(wrong)} are not on {PUBLISHED_BENCH}: another world's numbers do not "
            "belong among published ones; `plot cases` shows them."
        )
    table = [row for row in (TABLE_2 if several else TABLE_1) if row.ranked]
    subset = "multi" if several else "single"
    own = [
        Published(r["method"], {name: f["mean"] for name, f in r["metrics"][subset].items()})
        for r in results
        if "copy_paste" in r["metrics"].get(subset, {})
    ]
    others = [row for row in table if row.method != OURS]
    a, b, scatter = fit_tradeoff(*zip(*((_xy(row)) for row in others), strict=True))
    figure, (axis,) = start_figure(6.4, 4.3)
    everything = [*table, *own]
    x = np.array([_xy(row)[0] for row in everything])
    line = np.linspace(x.min() - 0.02, x.max() + 0.012, 200)
    curve = np.exp(a + b * line)
    axis.fill_between(
        line, curve - scatter, curve + scatter, color=GREY, alpha=0.15, linewidth=0, label="± their scatter"
    )
    axis.plot(line, curve, color=GREY, linewidth=1.4, zorder=2, label="fitted to the other published methods")
    threshold = metrics.RANKING_THRESHOLD_MULTI if several else metrics.RANKING_THRESHOLD_SINGLE
    axis.axvline(threshold, color=GREY, linewidth=0.8, linestyle=(0, (3, 3)), zorder=1)
    labels, said, avoid = [], [], list(zip(line, curve, strict=True))
    for row in everything:
        at = _xy(row)
        mine = row.method == OURS
        color = ORANGE if mine else (GREEN if row in own else BLUE)
        size = 95 if mine else 30
        axis.scatter(*at, s=size, color=color, zorder=4, marker="*" if mine else "o", linewidths=0)
        labels.append((row.method, at, color if color != BLUE else INK, mine))
        off = at[1] - float(np.exp(a + b * at[0]))
        said.append(f"{row.method}: {off:+.3f} from the curve, {off / scatter:+.1f} x the others' scatter")
        if mine or row in own:
            axis.plot([at[0], at[0]], [at[1], at[1] - off], color=color, linewidth=1, linestyle=":", zorder=3)
            avoid += [(at[0], y) for y in np.linspace(at[1], at[1] - off, 60)]
    low, high = (
        min(0.0, min(_xy(row)[1] for row in everything) - 0.03),
        max(_xy(row)[1] for row in everything),
    )
    axis.set_xlim(line[0], line[-1])
    axis.set_ylim(low, high + 0.045)
    axis.set_xlabel("face similarity to the target, Sim(GT)  →  better")
    axis.set_ylabel("better  ←  copy-paste")
    people = "several people" if several else "one person"
    axis.set_title(
        f"MultiID-Bench, {people}: more alike means more copied", fontsize=10, color=INK, loc="left"
    )
    axis.annotate(
        f"copy-paste ranked from\nSim(GT) {threshold:.2f} on", (threshold, high + 0.04), (-5, 0),
        textcoords="offset points", fontsize=7, color=GREY, va="top", ha="right",
    )  # fmt: skip
    axis.legend(loc="upper left", fontsize=7.5, frameon=False, labelcolor=GREY)
    _place_labels(figure, axis, labels, avoid=avoid)
    save_figure(figure, out)
    return said


def _xy(row: Published) -> tuple[float, float]:
    return row.values["sim_gt"], row.values["copy_paste"]


def _place_labels(
    figure, axis, labels: Sequence[tuple[str, tuple[float, float], str, bool]], avoid: Sequence = ()
) -> None:
    """Writes each label beside its dot where it covers no other label, no dot and no line, as near as can be.

    Greedy over candidate places around the dot, bold ones and dots in crowds first; a label further off gets
    a thin line.
    """
    figure.canvas.draw()  # the layout decides where pixels are
    figure.set_layout_engine("none")
    renderer = figure.canvas.get_renderer()
    pixels = {name: axis.transData.transform(at) for name, at, *_ in labels}
    dots = np.array(list(pixels.values()))
    curve = axis.transData.transform(np.array(avoid)) if len(avoid) else np.empty((0, 2))
    point = figure.dpi / 72
    frame = axis.get_window_extent(renderer)
    crowd = {name: np.sort(np.linalg.norm(dots - at, axis=1))[1:4].sum() for name, at in pixels.items()}
    taken: list[np.ndarray] = []
    for name, at, color, bold in sorted(labels, key=lambda label: (not label[3], crowd[label[0]])):
        text = axis.annotate(
            name, at, (0, 0), textcoords="offset points", fontsize=8.5 if bold else 7.5, color=color,
            fontweight="bold" if bold else "normal", ha="center", va="center", zorder=5,
        )  # fmt: skip
        extent = text.get_window_extent(renderer)
        half = np.array([extent.width, extent.height]) / 2 + 1.5 * point
        best = None
        for reach in (5, 9, 14, 20, 27, 35, 44, 54, 66):
            for angle in np.arange(0, 360, 15):
                way = np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))])
                center = pixels[name] + way * (reach * point + half * np.abs(way))
                box = np.concatenate([center - half, center + half])
                cost = reach + _overlap(box, taken, dots, curve, frame, point)
                cost += 0.004 * min(angle, 360 - angle)  # to the right, everything else being equal
                if best is None or cost < best[0]:
                    best = (cost, center, box, reach)
        _, center, box, reach = best
        taken.append(box)
        offset = (center - pixels[name]) / point
        text.set_position(tuple(offset))
        if reach > 9:
            edge = np.clip(pixels[name], box[:2], box[2:])
            ends = axis.transData.inverted().transform([pixels[name], edge])
            axis.plot(*ends.T, color=GREY, linewidth=0.6, zorder=3)


def _overlap(box: np.ndarray, taken: list, dots: np.ndarray, curve: np.ndarray, frame, point: float) -> float:
    """What a label's place costs beyond its distance: other labels, dots, the curve, the frame."""
    cost = 0.0
    for other in taken:
        wide = min(box[2], other[2]) - max(box[0], other[0])
        tall = min(box[3], other[3]) - max(box[1], other[1])
        cost += 400 if wide > 0 and tall > 0 else 0
    margin = 3 * point
    inside = ((dots > box[:2] - margin) & (dots < box[2:] + margin)).all(axis=1).sum()
    cost += 200 * inside
    if len(curve):
        cost += 25 * bool(((curve > box[:2]) & (curve < box[2:])).all(axis=1).any())
    if box[0] < frame.x0 or box[1] < frame.y0 or box[2] > frame.x1 or box[3] > frame.y1:
        cost += 1000
    return cost


# ---- own results -----------------------------------------------------------------------------------------


def _check_one_world(results: Sequence[dict]) -> None:
    worlds = sorted({result["bench"]["name"] for result in results})
    if len(worlds) > 1:
        raise ValueError(f"`results` are of different benches ({', '.join(worlds)}): plot each by itself.")


def plot_cases(results: Sequence[dict], out: str | os.PathLike) -> None:
    """A dot a face: Sim(GT) against copy-paste, and each method's mean with its interval."""
    _check_one_world(results)
    figure, (axis,) = start_figure(6.4, 4.3)
    for result, color in zip(results, _colors(results), strict=True):
        alike, copied = values_of(result, "sim_gt_found"), values_of(result, "copy_paste")
        keys = sorted(alike.keys() & copied.keys())
        axis.scatter(
            [alike[k] for k in keys], [copied[k] for k in keys], s=7, color=color, alpha=0.3, linewidths=0
        )
        figures = [result["metrics"]["all"].get(name) for name in ("sim_gt_found", "copy_paste")]
        if all(figures):
            middle = [f["mean"] for f in figures]
            spans = [[[f["mean"] - f["low"]], [f["high"] - f["mean"]]] for f in figures]
            label = f"{result['method']} ({len(keys)} faces)"
            axis.errorbar(
                middle[0], middle[1], xerr=spans[0], yerr=spans[1], fmt="o", color=color, label=label,
                markeredgecolor="white", markersize=8, capsize=2, zorder=4,
            )  # fmt: skip
    axis.axhline(0, color=GREY, linewidth=0.8)
    axis.set_ylim(-1.05, 1.05)
    axis.set_xlabel("face similarity to the target, Sim(GT)")
    axis.set_ylabel("copy-paste: −1 the target, +1 the photo")
    _title(axis, results, "a dot a face")
    axis.legend(fontsize=8, frameon=False)
    save_figure(figure, out)


def plot_real(results: Sequence[dict], out: str | os.PathLike) -> None:
    """The introduction's figure: how alike two real pictures of one person are, and each method's picture
    and the photo. Who lies right of the real ones copies."""
    _check_one_world(results)
    figure, (axis,) = start_figure(6.4, 3.8)
    real = np.array(list(values_of(results[0], "ceiling").values()))
    drawn = [np.array(list(values_of(result, "sim_ref").values())) for result in results]
    lowest = min([-0.1, *(np.quantile(values, 0.005) for values in (real, *drawn) if len(values))])
    grid = np.linspace(lowest, 1.0, 400)
    if len(real) < 2:
        raise ValueError("`results` have too few people with target and photo for a distribution.")
    axis.fill_between(
        grid, _density(real, grid), color=GREY, alpha=0.35, linewidth=0, label="two real pictures"
    )
    axis.axvline(np.median(real), color=GREY, linewidth=1, linestyle=(0, (3, 3)))
    for result, values, color in zip(results, drawn, _colors(results), strict=True):
        if len(values) > 1:
            axis.plot(
                grid,
                _density(values, grid),
                color=color,
                linewidth=1.8,
                label=f"{result['method']} and the photo",
            )
            axis.axvline(np.median(values), color=color, linewidth=1, linestyle=(0, (3, 3)))
    axis.set_xlim(grid[0], grid[-1])
    axis.set_ylim(0, None)
    axis.set_yticks([])
    axis.set_xlabel("cosine of the two faces (dashed: median)")
    _title(axis, results, "how alike to the photo")
    axis.legend(fontsize=8, frameon=False, loc="upper left")
    save_figure(figure, out)


def _density(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Gaussian kernel density with Silverman's width, at least 0.01 (all values may be equal)."""
    spread = min(values.std(), np.subtract(*np.quantile(values, [0.75, 0.25])) / 1.34)
    width = max(0.9 * spread * len(values) ** -0.2, 0.01)
    kernels = np.exp(-0.5 * ((grid[:, None] - values[None]) / width) ** 2)
    return kernels.mean(axis=1) / (width * np.sqrt(2 * np.pi))


def plot_attributes(results: Sequence[dict], out: str | os.PathLike, *, subset: str = "all") -> None:
    """What was taken from the photo: for each attribute in which photo and target disagree, the share of
    pictures that show the photo's, and (a bar's tick) what copying nothing would give."""
    _check_one_world(results)
    known = [result for result in results if (result.get("attributes") or {}).get(subset)]
    if not known:
        raise ValueError("`results` have no attributes: no judge knew the world of these cases.")
    order = ("pose", "expression", "light", "glasses", "hat", "beard", "makeup", "hair_style", "hair_color")
    measured = {
        name for result in known for name, value in result["attributes"][subset].items() if "copied" in value
    }
    names = [name for name in order if name in measured] + sorted(measured - set(order))
    figure, (axis,) = start_figure(7.2, 3.8)
    width = 0.8 / len(known)
    for number, (result, color) in enumerate(zip(known, _colors(known), strict=True)):
        for place, name in enumerate(names):
            value = result["attributes"][subset].get(name, {})
            if "copied" not in value:
                continue
            x = place + (number + 0.5) * width - 0.4
            f = value["copied"]
            axis.bar(x, f["mean"], width * 0.92, color=color, label=result["method"] if place == 0 else None)
            axis.errorbar(
                x, f["mean"], yerr=[[f["mean"] - f["low"]], [f["high"] - f["mean"]]], color=INK, linewidth=0.8
            )
            if value.get("by_chance") is not None:
                axis.plot(
                    [x - width * 0.46, x + width * 0.46], [value["by_chance"]] * 2, color=INK, linewidth=1.6
                )
    axis.plot([], [], color=INK, linewidth=1.6, label="by chance")
    axis.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names], fontsize=8)
    axis.grid(axis="x", visible=False)
    axis.set_ylim(0, 1)
    axis.set_ylabel("share copied from the photo")
    _title(axis, known, f"what was taken from the photo, {SUBSET_WORDS[subset]}")
    figure.legend(loc="outside lower center", ncols=len(known) + 1, fontsize=8, frameon=False)
    save_figure(figure, out)


def plot_sweep(sweep: dict, out: str | os.PathLike) -> None:
    """Left: where every position of the sliders stands in similarity and copy-paste, and the front. Right:
    what the prompt gets at each position, or how alike the picture is where no judge reads prompts."""
    figure, (left, right) = start_figure(9.2, 4.0, 2)
    positions = sweep["positions"]
    similarities = sorted({p["similarity"] for p in positions})
    diversities = sorted({p["diversity"] for p in positions})
    from matplotlib import colormaps

    shades = colormaps["viridis"](np.linspace(0.1, 0.85, len(similarities)))
    for similarity, shade in zip(similarities, shades, strict=True):
        line = [p for p in positions if p["similarity"] == similarity]
        xy = np.array([[_mean(p, name) for name in sweep["objectives"]] for p in line])
        left.plot(*xy.T, color=shade, linewidth=1, marker="o", markersize=4, label=f"{similarity:g}")
    front = sorted(
        ([_mean(p, name) for name in sweep["objectives"]] for p in positions if p["on_front"]),
    )
    left.plot(*np.array(front).T, color=ORANGE, linewidth=2.2, alpha=0.6, zorder=1, label="front")
    for p in positions:
        if p["on_front"]:
            left.scatter(
                *[_mean(p, n) for n in sweep["objectives"]], s=60, facecolors="none", edgecolors=ORANGE
            )
    left.set_xlabel(f"{METRICS[sweep['objectives'][0]].label}  →  better")
    left.set_ylabel(f"better  ←  {METRICS[sweep['objectives'][1]].label}")
    left.legend(title="similarity", fontsize=7, title_fontsize=7, frameon=False)
    left.set_title(
        f"{sweep['method']}: {sweep['cases']} cases a position", fontsize=10, color=INK, loc="left"
    )
    shown = (
        "prompt_following" if all("prompt_following" in p["metrics"]["all"] for p in positions) else "sim_ref"
    )
    grid = np.full((len(diversities), len(similarities)), np.nan)
    for p in positions:
        grid[diversities.index(p["diversity"]), similarities.index(p["similarity"])] = _mean(p, shown)
    image = right.imshow(grid, origin="lower", cmap="viridis", aspect="auto")
    right.grid(visible=False)
    middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
    for row in range(len(diversities)):
        for column in range(len(similarities)):
            color = "white" if grid[row, column] < middle else "black"
            right.text(
                column, row, f"{grid[row, column]:.2f}", ha="center", va="center", color=color, fontsize=8
            )
    for p in positions:
        if p["on_front"]:
            at = (similarities.index(p["similarity"]) - 0.5, diversities.index(p["diversity"]) - 0.5)
            right.add_patch(_frame(at))
    right.set_xticks(range(len(similarities)), [f"{s:g}" for s in similarities])
    right.set_yticks(range(len(diversities)), [f"{d:g}" for d in diversities])
    right.set(xlabel="similarity", ylabel="diversity")
    right.set_title(f"{METRICS[shown].label}; framed: on the front", fontsize=10, color=INK, loc="left")
    figure.colorbar(image, ax=right, shrink=0.85).outline.set_visible(False)
    save_figure(figure, out)


def _frame(at: tuple[float, float]):
    from matplotlib.patches import Rectangle

    return Rectangle((at[0] + 0.04, at[1] + 0.04), 0.92, 0.92, fill=False, edgecolor=ORANGE, linewidth=2)


def _mean(position: dict, metric: str) -> float:
    figure = position["metrics"]["all"].get(metric)
    return np.nan if figure is None else figure["mean"]


def _colors(results: Sequence[dict]) -> list[str]:
    return [PALETTE[number % len(PALETTE)] for number in range(len(results))]


def _title(axis, results: Sequence[dict], what: str) -> None:
    bench = results[0]["bench"]
    judges = " and ".join(results[0]["identity_by"])
    text = f"{bench['name']}: {what} ({bench['cases']} cases; likeness by {judges})"
    axis.set_title(text, fontsize=10, color=INK, loc="left")
