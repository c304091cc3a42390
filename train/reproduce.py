"""The paper's claim, shown or not: paired tuning with extended negatives copies less at the same likeness.

`reproduce.yaml` names the rows: settings on top of one shared phase file, all going on from one phase-2
adapter for the same number of steps. First what all rows need is made: shards and that adapter. For each row
and seed: train (the best checkpoint is chosen on validation cases), make the test cases' pictures by each of
the plan's samplings, have them scored by the judge, once. Then for each sampling a table, a figure (Sim(GT)
against copy-paste, as the paper's Figure 5) and their JSON, and what they say about the claim, whatever that
is. Every step is a command that goes on where it was stopped, so all of it does.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageDraw, ImageFont, ImageOps

from withanyone.bench import metrics, plots
from withanyone.bench.cases import Picture, picture_paths, read_cases
from withanyone.bench.figures import values_of
from withanyone.bench.results import read_results

from .config import load_config, make_config, read_yaml

logger = logging.getLogger(__name__)

PLAN = Path(__file__).parent / "reproduce.yaml"
STAGES = ("train", "generate", "score", "table")
SHOWN = ("sim_gt", "sim_ref", "copy_paste", "prompt_following", "found", "ceiling")
COMPARED = ("sim_gt", "copy_paste", "prompt_following")
COPIED = ("hair_style", "glasses", "expression")
RESAMPLES = 2000
COLORS = (*plots.PALETTE, plots.GREY, plots.INK)


@dataclass(frozen=True)
class Row:
    """One variant: settings on top of the shared ones."""

    name: str
    title: str
    settings: dict[str, Any]
    seeds: tuple[int, ...]
    headline: bool = False


@dataclass(frozen=True)
class Sampling:
    """One way to make the test pictures: `words` for `python -m withanyone.bench generate`."""

    name: str
    title: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What `reproduce.yaml` says."""

    out: Path
    figures: Path
    start: str
    config: str
    validation: dict[str, Any]
    test: dict[str, Any]
    samplings: tuple[Sampling, ...]
    rows: tuple[Row, ...]
    control: str
    full: str
    min_ceiling_share: float
    min_control_copy_paste: float
    before: dict[str, str] = field(default_factory=dict)
    at_once: int = 1
    overrides: tuple[str, ...] = field(default=())

    @property
    def threads(self) -> int:
        """Of each run: more would only get in the other runs' way."""
        return max(1, (os.cpu_count() or 1) // self.at_once)

    def row(self, name: str) -> Row:
        return _named(name, self.rows, "rows")

    def sampling(self, name: str) -> Sampling:
        return _named(name, self.samplings, "samplings")

    def folder(self, row: Row, seed: int) -> Path:
        return self.out / row.name / f"seed_{seed}"

    def pictures(self, row: Row, seed: int, sampling: Sampling) -> Path:
        return self.folder(row, seed) / sampling.name / "pictures"

    def results(self, row: Row, seed: int, sampling: Sampling) -> Path:
        return self.folder(row, seed) / sampling.name / "results.json"

    def runs(self, names: Sequence[str] | None = None) -> Iterator[tuple[Row, int]]:
        """The rows with each of their seeds, the headline rows' first seeds first."""
        chosen = [self.row(name) for name in names] if names else list(self.rows)
        chosen.sort(key=lambda row: not row.headline)
        for place in range(max(len(row.seeds) for row in chosen)):
            for row in chosen:
                if place < len(row.seeds):
                    yield row, row.seeds[place]


def _named(name: str, entries: Sequence[Any], what: str) -> Any:
    for entry in entries:
        if entry.name == name:
            return entry
    raise ValueError(f"`{what}` has no {name!r}; known: {', '.join(entry.name for entry in entries)}.")


def read_plan(path: Path, overrides: Sequence[str] = ()) -> Plan:
    """The plan of a YAML file, its rows' settings checked. `overrides` (key=value) go to every training."""
    values = yaml.safe_load(path.read_text())
    try:
        seeds, headline_seeds = values.pop("seeds"), values.pop("headline_seeds")
        rows = tuple(
            Row(
                name, entry["title"], entry.get("settings") or {},
                tuple(headline_seeds if entry.get("headline") else seeds), bool(entry.get("headline")),
            )
            for name, entry in values.pop("rows").items()
        )  # fmt: skip
        samplings = tuple(
            Sampling(name, entry["title"], tuple(map(str, entry["generate"])))
            for name, entry in values.pop("samplings").items()
        )
        paths = {name: Path(values.pop(name)) for name in ("out", "figures")}
        plan = Plan(rows=rows, samplings=samplings, overrides=tuple(overrides), **paths, **values)
    except (KeyError, TypeError) as error:
        raise ValueError(f"`plan` {path} lacks or has an entry that is not known: {error}.") from error
    plan.row(plan.control), plan.row(plan.full)
    shared = read_yaml(plan.config)
    for row in plan.rows:
        make_config({**shared, **row.settings}, where=f"{path}, row {row.name}")
    return plan


# --- the steps of one run --------------------------------------------------------------------------------


def command(*words: str | Path, threads: int | None = None) -> None:
    """Runs a command, with so many `threads` unless OMP_NUM_THREADS says another number.

    Raises:
        RuntimeError: it fails.
    """
    words = [str(word) for word in words]
    logger.info("%s", " ".join(words[1:] if words[0] == sys.executable else words))
    given = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(words, check=False, env={**given, **os.environ})
    if done.returncode:
        raise RuntimeError(
            f"ended with status {done.returncode}; the same command goes on: {shlex.join(words)}"
        )


def words_of(line: str) -> list[str]:
    """A plan's command as words; its `python` is the one that runs."""
    return [sys.executable if word == "python" else word for word in shlex.split(line)]


def make_before(plan: Plan) -> None:
    """What all rows need, each by its own command, once: a file in `out` says which are done."""
    for name, line in plan.before.items():
        done = plan.out / f"{name}.done"
        if not done.exists():
            command(*words_of(line))
            done.parent.mkdir(parents=True, exist_ok=True)
            done.touch()


def ensure_cases(entry: Mapping[str, Any]) -> None:
    """Makes a set of cases by its own command where it is not there. Written aside and renamed."""
    folder = Path(entry["cases"])
    if folder.exists():
        return
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    command(*words_of(entry["make"].format(out=shlex.quote(str(aside)))))
    os.replace(aside, folder)


def write_config(plan: Plan, row: Row, seed: int) -> Path:
    """The phase file of one run: shared settings, the row's, the seed's."""
    folder, validation = plan.folder(row, seed), plan.validation
    shared = read_yaml(plan.config)
    settings = {
        **shared, **row.settings, "seed": seed, "init_from": plan.start,
        "output_dir": str(folder / "training"), "validation_cases": validation["cases"],
        "validation_count": validation["count"], "validation_steps": validation["every"],
        "best_metric": validation["metric"],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "phase.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    load_config(path, plan.overrides)
    return path


def train(plan: Plan, row: Row, seed: int) -> None:
    """Trains to the end, then puts the chosen adapter into a pipeline folder (`model`), once."""
    if (plan.folder(row, seed) / "model" / "model_index.json").exists():
        return
    path = write_config(plan, row, seed)
    command(sys.executable, "-m", "train", "--config", path, *plan.overrides, threads=plan.threads)
    config = load_config(path, plan.overrides)
    training, model = Path(config.output_dir), plan.folder(row, seed) / "model"
    chosen = training / "best" if (training / "best").exists() else training / "adapter"
    link_pipeline(Path(config.pretrained), chosen, model)


def link_pipeline(pretrained: Path, adapter: Path, out: Path) -> None:
    """A pipeline folder with the parts of `pretrained` (links) and another adapter (copied)."""
    aside = out.with_name(out.name + ".partial")
    for folder in (aside, out):
        shutil.rmtree(folder, ignore_errors=True)
    aside.mkdir(parents=True)
    for part in pretrained.resolve().iterdir():
        if part.name == "model_index.json":
            index = json.loads(part.read_text())
            index["face_adapter"] = ["withanyone.adapter", "FaceAdapter"]
            (aside / part.name).write_text(json.dumps(index, indent=2))
        elif part.name != "face_adapter":
            (aside / part.name).symlink_to(part)
    shutil.copytree(adapter, aside / "face_adapter")
    os.replace(aside, out)


def generate(plan: Plan, row: Row, seed: int, sampling: Sampling) -> None:
    """The test cases' pictures by one run's model."""
    folder = plan.folder(row, seed)
    if not (folder / "model" / "model_index.json").exists():
        raise ValueError(f"{folder} is not trained yet: the stage `train` comes first.")
    command(
        sys.executable, "-m", "withanyone.bench", "generate", "--cases", plan.test["cases"],
        "--model", folder / "model", "--out", plan.pictures(row, seed, sampling), *sampling.words,
        threads=plan.threads,
    )  # fmt: skip


def score(plan: Plan, row: Row, seed: int, sampling: Sampling) -> None:
    """Their figures by the judge, once."""
    results = plan.results(row, seed, sampling)
    command(
        sys.executable, "-m", "withanyone.bench", "score", "--cases", plan.test["cases"],
        "--pictures", plan.pictures(row, seed, sampling), "--out", results, "--method", row.title,
        "--judges", *plan.test["judges"], "--cache", results.parent / "seen",
        threads=plan.threads,
    )  # fmt: skip


# --- the table -------------------------------------------------------------------------------------------


def pooled(values: Sequence[Mapping[tuple, float]], resamples: int = RESAMPLES) -> dict[str, float]:
    """Mean over people of all seeds, with a 95 % interval over cases; `seeds` are the means of each.

    Cases are drawn, each with the people and all the seeds it has.
    """
    entries = [entry for part in values for entry in part.items()]
    groups = [key[0] for key, _ in entries]
    numbers = np.array([value for _, value in entries])
    low, high = metrics.bootstrap_interval(numbers, groups, resamples=resamples)
    return {
        "mean": float(numbers.mean()), "low": low, "high": high, "n": len(numbers),
        "seeds": [float(np.mean(list(part.values()))) for part in values],
    }  # fmt: skip


def difference(
    results: Mapping[int, dict[str, Any]], others: Mapping[int, dict[str, Any]], name: str
) -> dict[str, float] | None:
    """How much larger a metric is in one row's runs (by seed) than in another's, person by person and seed
    by seed, with an interval over cases: much tighter than the two rows' own. None without a common seed.
    """
    parts = []
    for seed in sorted(results.keys() & others.keys()):
        mine, theirs = values_of(results[seed], name), values_of(others[seed], name)
        parts.append({key: mine[key] - theirs[key] for key in mine.keys() & theirs.keys()})
    return pooled(parts) if parts and all(parts) else None


def row_figures(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row's figures over its seeds."""
    out: dict[str, Any] = {}
    for name in SHOWN:
        parts = [values_of(result, name) for result in results]
        if all(parts):
            out[name] = pooled(parts)
    for name in COPIED:
        shares = [((r["attributes"] or {}).get("all") or {}).get(name, {}).get("copied") for r in results]
        if shares and all(shares):
            means = [share["mean"] for share in shares]
            out[f"copied_{name}"] = {
                "mean": float(np.mean(means)), "low": min(s["low"] for s in shares),
                "high": max(s["high"] for s in shares), "seeds": means,
            }  # fmt: skip
    return out


def collect(plan: Plan, sampling: Sampling) -> dict[str, Any]:
    """Everything a sampling's table shows, of the runs that are scored: what the committed JSON holds."""
    rows: dict[str, Any] = {}
    by_seed: dict[str, dict[int, dict[str, Any]]] = {}
    fingerprints, judges = set(), set()
    for row in plan.rows:
        found = {}
        for seed in row.seeds:
            path = plan.results(row, seed, sampling)
            if path.exists():
                found[seed] = read_results(path)
        if not found:
            continue
        fingerprints |= {result["bench"]["fingerprint"] for result in found.values()}
        judges |= {name for result in found.values() for name in result["identity_by"]}
        by_seed[row.name] = found
        best = {}
        for seed in found:
            path = plan.folder(row, seed) / "training" / "best" / "best.json"
            best[seed] = json.loads(path.read_text())["step"] if path.exists() else None
        figures = row_figures(list(found.values()))
        rows[row.name] = {
            "title": row.title, "settings": row.settings, "seeds": list(found), "steps_chosen": best,
            "cases": min(result["bench"]["cases"] for result in found.values()), **figures,
            "ranked": is_ranked(figures, plan.min_ceiling_share),
        }  # fmt: skip
    if len(fingerprints) > 1:
        raise ValueError(f"`out` {plan.out}: runs were scored on different cases; delete the older results.")
    headline = [row for row in plan.rows if row.headline and row.name in by_seed]
    differences = [
        {
            "row": row.title, "from": other.title,
            **{name: difference(by_seed[row.name], by_seed[other.name], name) for name in COMPARED},
        }
        for other, row in combinations(headline, 2)
    ]  # fmt: skip
    return {
        "title": sampling.title, "generate": list(sampling.words), "identity_by": sorted(judges),
        "rows": rows, "differences": differences, "verdict": verdict(rows, plan),
        "missing": missing(plan, sampling),
    }  # fmt: skip


def is_ranked(figures: Mapping[str, Any], share: float) -> bool:
    """Whether likeness is high enough for copying to mean something: blind models copy nothing."""
    return bool(figures["sim_gt"]["mean"] >= share * figures["ceiling"]["mean"])


def missing(plan: Plan, sampling: Sampling) -> list[str]:
    """Runs that have no figures by this sampling yet."""
    return [
        f"{row.name}, seed {seed}" for row in plan.rows for seed in row.seeds
        if not plan.results(row, seed, sampling).exists()
    ]  # fmt: skip


def verdict(rows: Mapping[str, Any], plan: Plan) -> list[str]:
    """What the figures say about the claim, in sentences; no more than they say."""
    if plan.control not in rows or plan.full not in rows:
        return ["Control and full recipe are not both there yet."]
    control, full = rows[plan.control], rows[plan.full]
    said = []
    copying = control.get("copy_paste")
    floor = plan.min_control_copy_paste
    if copying is None or copying["mean"] < floor or copying["low"] <= 0:
        said.append(f"The control does not copy enough ({_shown(copying)}) for this world to test the claim.")
    else:
        said.append(f"The control copies: {_shown(copying)}.")
    for name in (plan.control, plan.full):
        if not rows[name]["ranked"]:
            title, share = rows[name]["title"], plan.min_ceiling_share
            said.append(f"{title}: Sim(GT) is below {share} of its ceiling, so copy-paste is not ranked.")
    if copying and full.get("copy_paste"):
        half = full["copy_paste"]["mean"] <= 0.5 * copying["mean"]
        kept = full["sim_gt"]["mean"] >= control["sim_gt"]["mean"]
        said.append(
            f"The full recipe has copy-paste {_shown(full['copy_paste'])}, "
            f"{'at most' if half else 'more than'} half of the control's, at Sim(GT) "
            f"{_shown(full['sim_gt'])} against {_shown(control['sim_gt'])}: "
            f"{'no lower' if kept else 'lower'}."
        )
        aim = half and kept and all(rows[n]["ranked"] for n in (plan.control, plan.full))
        enough = copying["mean"] >= floor and copying["low"] > 0
        said.append("The aim is reached." if aim and enough else "The aim is not reached.")
    return said


def _shown(figure: Mapping[str, float] | None) -> str:
    if figure is None:
        return "-"
    return f"{figure['mean']:+.3f} [{figure['low']:+.3f}, {figure['high']:+.3f}]"


def table(summary: Mapping[str, Any]) -> str:
    """A sampling's rows as Markdown."""
    if not summary["rows"]:
        return f"## Test pictures with {summary['title']}\n\nNo run is scored yet.\n"
    names = [*SHOWN, *(f"copied_{name}" for name in COPIED)]
    names = [name for name in names if any(name in row for row in summary["rows"].values())]
    head = ["row", "seeds", "cases", *(name.replace("_", " ") for name in names), "ranked"]
    lines = [f"## Test pictures with {summary['title']}", ""]
    lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in summary["rows"].values():
        cells = [row["title"], str(len(row["seeds"])), str(row["cases"])]
        cells += [_shown(row.get(name)) for name in names] + ["yes" if row["ranked"] else "no"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"Identity by {', '.join(summary['identity_by'])}. Means over people with 95 % bootstrap "
              "intervals over cases (all seeds of a case together; copied attributes: the widest interval of "
              "the seeds).", ""]  # fmt: skip
    lines += [f"- {sentence}" for sentence in summary["verdict"]]
    if summary["differences"]:
        lines += ["", "Differences between rows of several seeds, person by person and seed by seed:", ""]
        lines += ["| row | from | " + " | ".join(name.replace("_", " ") for name in COMPARED) + " |"]
        lines += ["|---" * (2 + len(COMPARED)) + "|"]
        for entry in summary["differences"]:
            cells = [entry["row"], entry["from"], *(_shown(entry[name]) for name in COMPARED)]
            lines.append("| " + " | ".join(cells) + " |")
    if summary["missing"]:
        lines += ["", f"Not yet there: {'; '.join(summary['missing'])}."]
    return "\n".join(lines) + "\n"


def plot(summaries: Sequence[Mapping[str, Any]], names: Sequence[str], path: Path) -> None:
    """Sim(GT) against copy-paste: a panel a sampling, a point a row (each of `names` has a colour) with its
    intervals; small points are single seeds."""
    figure, axes = plots.start_figure(1 + 4.5 * len(summaries), 5, columns=len(summaries))
    entries: dict[str, Any] = {}
    for axis, summary in zip(axes, summaries, strict=True):
        for number, name in enumerate(names):
            row = summary["rows"].get(name, {})
            if "copy_paste" not in row:
                continue
            x, y = row["sim_gt"], row["copy_paste"]
            bars = axis.errorbar(
                x["mean"], y["mean"], xerr=[[x["mean"] - x["low"]], [x["high"] - x["mean"]]],
                yerr=[[y["mean"] - y["low"]], [y["high"] - y["mean"]]], fmt="o" if row["ranked"] else "x",
                color=COLORS[number % len(COLORS)], capsize=2,
            )  # fmt: skip
            entries.setdefault(row["title"], bars)
            if len(row["seeds"]) > 1:
                axis.scatter(x["seeds"], y["seeds"], s=10, color=COLORS[number % len(COLORS)], alpha=0.6)
        axis.axhline(0, color=plots.GREY, linewidth=0.8)
        axis.set(xlabel="Sim(GT), by the judge", title=f"{summary['title']} (cross: not ranked)")
        axis.title.set_fontsize(9)
    axes[0].set_ylabel("copy-paste (lower is better)")
    figure.legend(entries.values(), entries, fontsize=7, ncol=2, loc="outside upper center")
    path.parent.mkdir(parents=True, exist_ok=True)
    plots.save_figure(figure, path)


def picture_sheet(plan: Plan, sampling: Sampling, count: int = 6, side: int = 128) -> Image.Image | None:
    """What the rows' models made of the same cases: photo, target, then a column a row, by its first seed.

    `count` cases of one person, evenly over all that there are; None where no row is scored.
    """
    rows = [row for row in plan.rows if plan.results(row, row.seeds[0], sampling).exists()]
    if not rows:
        return None
    cases = [case for case in read_cases(plan.test["cases"]) if case.num_persons == 1 and case.target]
    count = min(count, len(cases))
    head, font = 16, ImageFont.load_default(11)
    titles = ["photo", "target", *(row.name.replace("_", " ") for row in rows)]
    sheet = Image.new("RGB", (side * len(titles), head + side * count), "white")
    for column, title in enumerate(titles):
        ImageDraw.Draw(sheet).text((side * column + 4, 1), title, fill=plots.INK, font=font)
    for line in range(count):
        case = cases[line * len(cases) // count]
        made = [picture_paths(plan.pictures(row, row.seeds[0], sampling), case.name) for row in rows]
        shown = [
            case.references[0],
            case.target,
            *(Picture(str(p[0]), str(p[0])) if p else None for p in made),
        ]
        for column, picture in enumerate(shown):
            if picture is not None:
                small = ImageOps.contain(picture.image, (side - 2, side - 2))
                sheet.paste(small, (side * column, head + side * line))
    return sheet


def write_table(plan: Plan) -> str:
    """Tables, figure, pictures side by side and JSON of what is scored so far.

    Raises:
        ValueError: nothing is.
    """
    summaries = {sampling.name: collect(plan, sampling) for sampling in plan.samplings}
    if not any(summary["rows"] for summary in summaries.values()):
        raise ValueError(f"`out` {plan.out}: no run is scored yet.")
    plan.figures.parent.mkdir(parents=True, exist_ok=True)
    plan.figures.with_suffix(".json").write_text(json.dumps({"samplings": summaries}, indent=1) + "\n")
    text = "\n".join(table(summary) for summary in summaries.values())
    plan.figures.with_suffix(".md").write_text(text)
    shown = [summary for summary in summaries.values() if summary["rows"]]
    plot(shown, [row.name for row in plan.rows], plan.figures.with_suffix(".png"))
    if (sheet := picture_sheet(plan, plan.samplings[0])) is not None:
        sheet.save(plan.figures.with_name(plan.figures.name + "-pictures.jpg"), quality=90)
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plan", type=Path, default=PLAN, help="default: train/reproduce.yaml")
    parser.add_argument("--rows", nargs="+", help="these only")
    parser.add_argument("--seeds", nargs="+", type=int, help="these only")
    parser.add_argument("--samplings", nargs="+", help="these only, by name")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of every training"
    )


def run(args: argparse.Namespace) -> str:
    """The claim's rows: trained, scored by the judge, and a table of all that is there."""
    plan = read_plan(args.plan, args.set)
    stages = [name for name in STAGES[:-1] if name in args.stages]
    samplings = [plan.sampling(name) for name in args.samplings] if args.samplings else plan.samplings
    runs = [
        (row, seed) for row, seed in plan.runs(args.rows)
        if (not args.seeds or seed in args.seeds)
        and not all(plan.results(row, seed, sampling).exists() for sampling in samplings)
    ]  # fmt: skip
    if runs and stages:
        make_before(plan)
        for entry in (plan.validation, plan.test):
            ensure_cases(entry)

    def one(run: tuple[Row, int]) -> None:
        if "train" in stages:
            train(plan, *run)
        for sampling in samplings:
            if plan.results(*run, sampling).exists():
                continue
            if "generate" in stages:
                generate(plan, *run, sampling)
            if "score" in stages:
                score(plan, *run, sampling)

    with ThreadPoolExecutor(plan.at_once) as pool:
        work = [pool.submit(one, run) for run in runs]
        try:
            for run in work:
                run.result()
        finally:
            pool.shutdown(cancel_futures=True)  # a failed run stops those that have not begun
    if "table" in args.stages:
        return write_table(plan)
    left = [f"{name}, {s.title}" for s in samplings for name in missing(plan, s)]
    return "\n".join(left) or "all runs are scored"


if __name__ == "__main__":
    from .__main__ import main

    main(["reproduce", *sys.argv[1:]])
