"""The gate: which metric got worse than in a baseline, beyond what the choice of cases explains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .figures import METRICS, SUBSETS, Values, check_metric, metric_values
from .scoring import Settings


@dataclass(frozen=True)
class Verdict:
    """One metric of one subset, now against the baseline; `change` with its interval over cases."""

    subset: str
    metric: str
    new: float | None
    old: float
    change: float | None
    low: float | None
    high: float | None
    worse: bool
    why: str

    def __str__(self) -> str:
        name = f"{self.subset}.{self.metric}"
        if self.new is None:
            return f"{name}: {self.why}"
        interval = f"change {self.change:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"
        return f"{name}: {self.old:.4f} -> {self.new:.4f}, {interval}{': ' + self.why if self.why else ''}"


def compare(
    new: dict,
    baseline: dict,
    *,
    chosen: Sequence[str] | None = None,
    tolerance: float = 0.0,
    level: float | None = None,
) -> list[Verdict]:
    """Every metric that has a better side, now against the baseline.

    The same cases are compared face by face, so what the cases have in common is paired out. Worse: the
    whole interval of the change lies on the wrong side, by more than `tolerance`; or the metric is no longer
    measured.

    Raises:
        ValueError: other cases, other judges or other settings: nothing could be said.
    """
    _check_comparable(new, baseline)
    names = [check_metric(name) for name in chosen] if chosen else [n for n, m in METRICS.items() if m.better]
    bootstrap = dict(baseline["settings"]["bootstrap"]) | ({"level": level} if level else {})
    settings = Settings.of(new)
    out = []
    for subset, belongs in SUBSETS.items():
        for name in names:
            old = baseline["metrics"].get(subset, {}).get(name)
            if old is None:
                continue
            now = new["metrics"].get(subset, {}).get(name)
            if now is None:
                why = "in the baseline, not measured now"
                out.append(Verdict(subset, name, None, old["mean"], None, None, None, True, why))
                continue
            values = [
                metric_values([r for r in part["rows"] if belongs(r)], name, new["identity_by"], settings)
                for part in (new, baseline)
            ]
            difference = _difference(*values, bootstrap)
            better = METRICS[name].better
            edge = difference["high"] if better > 0 else -difference["low"]
            worse = edge < -tolerance
            why = "worse beyond its interval" if worse else ""
            out.append(
                Verdict(
                    subset,
                    name,
                    now["mean"],
                    old["mean"],
                    difference["mean"],
                    difference["low"],
                    difference["high"],
                    worse,
                    why,
                )  # fmt: skip
            )
    return out


def _difference(new: Values, old: Values, bootstrap: dict) -> dict:
    """Change of the mean with its interval: case by case, since a face may be found in one run only.

    The mean over faces is sum / count, and both are drawn by case: a case's new and old sums stay together.
    """
    cases = sorted({key[0] for key in (*new, *old)})
    place = {case: number for number, case in enumerate(cases)}
    sums, counts = np.zeros((2, len(cases))), np.zeros((2, len(cases)))
    for side, values in enumerate((new, old)):
        for key, value in values.items():
            sums[side, place[key[0]]] += value
            counts[side, place[key[0]]] += 1
    rng = np.random.default_rng(bootstrap["seed"])
    drawn = rng.integers(0, len(cases), (bootstrap["resamples"], len(cases)))
    totals = counts[:, drawn].sum(axis=2)  # (2, R)
    means = np.divide(sums[:, drawn].sum(axis=2), totals, out=np.zeros_like(totals), where=totals > 0)
    low, high = np.quantile(means[0] - means[1], [(1 - bootstrap["level"]) / 2, (1 + bootstrap["level"]) / 2])
    mean = sums[0].sum() / counts[0].sum() - sums[1].sum() / counts[1].sum()
    return {"mean": float(mean), "low": float(low), "high": float(high)}


def _check_comparable(new: dict, baseline: dict) -> None:
    for what, ours, theirs in (
        ("cases", new["bench"]["fingerprint"], baseline["bench"]["fingerprint"]),
        ("judges' means", new["identity_by"], baseline["identity_by"]),
        ("judges", _present(new), _present(baseline)),
        ("settings", new["settings"], baseline["settings"]),
    ):
        if ours != theirs:
            raise ValueError(
                f"`baseline` has other {what}, so no difference can be told: {theirs} there, {ours} here. "
                "Score both alike."
            )


def _present(results: dict) -> dict:
    """Versions of the judges that gave numbers in both: one that is absent now is found by its metrics."""
    recognisers = {"finder", *results["identity_by"]}
    return {name: version for name, version in results["judges"].items() if name in recognisers}
