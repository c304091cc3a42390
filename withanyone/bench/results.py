"""results.json: the figures of one method on one bench, with everything they depend on.

Schema `withanyone.bench.results/1` (`read_results` checks it):

    schema, method          the schema's name; what the method is called
    bench                   name, layout, world, cases (used), of (given), people, fingerprint of the cases
    judges                  {name: version, or {"absent": why}}; `finder` is the face detector
    identity_by             the recognisers whose mean the identity metrics are
    settings                what scoring depends on beside these, and the bootstrap's
    generation              what `bench generate` wrote beside the pictures, None for other pictures
    environment             git hash of this repository, versions of the packages
    metrics                 {"all" | "single" | "multi": {metric: {mean, low, high, n, cases}}}
    by_judge                {recogniser: the same with the identity metrics of it alone}
    attributes              {subset: {attribute: followed, and copied where photo and target disagree}}
    diversity               between a case's pictures at several seeds, None with one picture a case
    problems                {kind: {"count", "first"}}: what was missing, in words
    broken_cases            {case: what is wrong}: left out of every figure
    rows                    one a case, see withanyone.bench.scoring; beyond that each person has `copied`
                            (attributes taken from the photo), `rank_one` and `strangers`
    run                     created, seconds, workers, rows kept from before: the only part that may differ
                            between two runs on the same input
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .cases import Cases
from .figures import (
    IDENTITY,
    SUBSETS,
    add_crowd,
    attribute_figures,
    copied_attributes,
    diversity_figures,
    figures,
    people_of,
)
from .judges import Panel
from .scoring import DEFAULTS, Scored, Settings

SCHEMA = "withanyone.bench.results/1"


def make_results(
    method: str,
    cases: Cases,
    scored: Scored,
    panel: Panel,
    *,
    bench: str | None = None,
    settings: Settings = DEFAULTS,
    bootstrap: dict | None = None,
    generation: dict | None = None,
    workers: int = 1,
    total: int | None = None,
) -> dict:
    """Everything results.json holds (see the module). ValueError where no case could be used."""
    if not scored.rows:
        raise ValueError(
            f"`cases`: none of {len(scored.broken)} could be used: "
            f"{'; '.join(list(scored.broken.values())[:3])}"
        )
    bootstrap = {"level": 0.95, "resamples": 1000, "seed": 0} | (bootstrap or {})
    rows, judges = scored.rows, panel.scoring
    add_crowd(rows, scored.vectors)
    for _, _, entry in people_of(rows):
        entry["copied"] = copied_attributes(entry)
    means = figures(rows, judges, settings, bootstrap)
    by_judge = {}
    for judge in panel.recognizers:
        alone = figures(rows, [judge.name], settings, bootstrap)
        by_judge[judge.name] = {
            subset: {name: value for name, value in values.items() if name in IDENTITY}
            for subset, values in alone.items()
        }
    worlds = (
        [judge.world for judge in panel.attributes]
        if any("asked" in e for _, _, e in people_of(rows))
        else []
    )
    return {
        "schema": SCHEMA,
        "method": method,
        "bench": {
            "name": bench or (worlds[0] if worlds else cases.bench),
            "layout": cases.layout,
            "world": worlds[0] if worlds else "photos",
            "cases": len(rows),
            "of": len(cases) if total is None else total,
            "people": sum(row["num_persons"] for row in rows),
            "fingerprint": hashlib.sha256(
                json.dumps([[row["case"], row["fingerprint"]] for row in rows]).encode()
            ).hexdigest()[:16],
        },
        "judges": panel.versions(),
        "identity_by": judges,
        "settings": asdict(settings) | {"bootstrap": bootstrap},
        "generation": generation,
        "environment": environment(),
        "metrics": means,
        "by_judge": by_judge,
        "attributes": {
            subset: found
            for subset, belongs in SUBSETS.items()
            if (found := attribute_figures([r for r in rows if belongs(r)], judges, settings, bootstrap))
        },
        "diversity": diversity_figures(rows, scored.vectors, bootstrap),
        "problems": _problems(rows),
        "broken_cases": scored.broken,
        "rows": rows,
        "run": {
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(scored.seconds, 1),
            "workers": workers,
            "rows_kept": scored.kept,
        },
    }


def _problems(rows: Sequence[dict], first: int = 20) -> dict:
    found: dict[str, list[str]] = {}
    for row in rows:
        for kind, message in row["problems"]:
            found.setdefault(kind, []).append(message)
    return {kind: {"count": len(texts), "first": texts[:first]} for kind, texts in sorted(found.items())}


def environment() -> dict[str, str]:
    """Git hash of this checkout (`-dirty`: files differ from it), Python and the packages that matter."""
    names = ("withanyone", "numpy", "torch", "transformers", "onnxruntime", "insightface", "opencv-python")
    out = {"git": git_hash(), "python": platform.python_version()}
    for name in names:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            out[name] = "not installed"
    return out


def git_hash() -> str:
    """The commit this package is run from, "unknown" outside a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def write_results(results: dict, path: str | os.PathLike) -> Path:
    """Writes the file; it appears when it is whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    aside.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    aside.replace(path)
    return path


_NEEDED: dict[str, type | tuple[type, ...]] = {
    "method": str, "bench": dict, "judges": dict, "identity_by": list, "settings": dict, "metrics": dict,
    "problems": dict, "rows": list, "environment": dict,
}  # fmt: skip


def read_results(path: str | os.PathLike) -> dict:
    """A results.json. ValueError for what is none: says what is wrong, and with which file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`results` {path} is not a file: `python -m withanyone.bench score` writes one.")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`results` {path} is not JSON ({error}).") from error
    schema = results.get("schema") if isinstance(results, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"`results` {path} has the schema {schema!r}; this version reads {SCHEMA!r}.")
    for name, kind in _NEEDED.items():
        if not isinstance(results.get(name), kind):
            raise ValueError(f"`results` {path}: {name!r} is missing or of the wrong type.")
    for subset, values in results["metrics"].items():
        for metric, figure in values.items():
            numbers = (
                [figure.get(part) for part in ("mean", "low", "high")] if isinstance(figure, dict) else [None]
            )
            if not all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers):
                raise ValueError(f"`results` {path}: {subset}.{metric} has no finite mean, low and high.")
    return results
