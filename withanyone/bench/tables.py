"""Tables of results, beside the published ones where the bench is the same, and never in one ranking else."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from . import metrics
from .figures import METRICS
from .published import (
    COLUMNS_1,
    COLUMNS_2,
    NOTES,
    RANKING_NOTE,
    TABLE_1,
    TABLE_2,
    YARDSTICKS,
    Published,
)

#: The bench whose results stand beside the published rows.
PUBLISHED_BENCH = "MultiID-Bench"
#: The recognisers whose mean the published numbers are.
PUBLISHED_JUDGES = ("arcface", "facenet", "adaface")
#: Columns of a table of another bench, as far as they were measured.
OWN_COLUMNS = (
    "sim_gt", "sim_ref", "copy_paste", "blending", "swapped", "found", "rank_one", "prompt_following",
    "clip_i", "clip_t", "aesthetic",
)  # fmt: skip
FORMATS = ("markdown", "csv", "latex")
SUBSET_WORDS = {"all": "all cases", "single": "one person", "multi": "several people"}


@dataclass(frozen=True)
class Row:
    """A method's figures; `ranked` False: shown, but outside of best and second best."""

    method: str
    values: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    ranked: bool = True
    notes: tuple[str, ...] = ()
    people: int | None = None


@dataclass(frozen=True)
class Table:
    """One table; `places` holds 1 for the best and 2 for the second of each column."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    several_people: bool
    notes: tuple[str, ...] = ()

    def places(self) -> dict[tuple[int, str], int]:
        """{(row, column): 1 or 2}: ties share a place; copy-paste among the eligible only."""
        out = {}
        for column in self.columns:
            better = METRICS[column].better
            entries = [
                (number, row.values[column])
                for number, row in enumerate(self.rows)
                if better and row.ranked and column in row.values and self._eligible(row, column)
            ]
            values = sorted({value for _, value in entries}, reverse=better > 0)[:2]
            out |= {(n, column): values.index(value) + 1 for n, value in entries if value in values}
        return out

    def _eligible(self, row: Row, column: str) -> bool:
        if column != "copy_paste":
            return True
        return "sim_gt" in row.values and metrics.may_rank_copy_paste(
            row.values["sim_gt"], self.several_people
        )


def make_tables(results: Sequence[dict]) -> list[Table]:
    """Tables 1 and 2 with the published rows and those of results on MultiID-Bench; then, for every other
    bench, tables of its own."""
    photos = [result for result in results if result["bench"]["name"] == PUBLISHED_BENCH]
    tables = []
    for title, several, published, columns in (
        ("Table 1. MultiID-Bench, one person", False, TABLE_1, COLUMNS_1),
        ("Table 2. MultiID-Bench, several people", True, TABLE_2, COLUMNS_2),
    ):
        own = [row for result in photos if (row := _row(result, several)) is not None]
        rows = (*(_published_row(entry) for entry in published), *own)
        marks = list(dict.fromkeys(mark for entry in published for mark in entry.notes))
        threshold = metrics.RANKING_THRESHOLD_MULTI if several else metrics.RANKING_THRESHOLD_SINGLE
        notes = [RANKING_NOTE.format(threshold=threshold), *(f"{mark}: {NOTES[mark]}" for mark in marks)]
        tables.append(Table(title, columns, rows, several, (*notes, *_judge_notes(photos, True))))
    others: dict[str, list[dict]] = {}
    for result in results:
        if result["bench"]["name"] != PUBLISHED_BENCH:
            others.setdefault(result["bench"]["name"], []).append(result)
    for name, group in others.items():
        tables += _own_tables(name, group)
    return tables


def _published_row(entry: Published) -> Row:
    return Row(entry.method, entry.values, ranked=entry.ranked, notes=entry.notes)


def _row(result: dict, several: bool) -> Row | None:
    """A result's row; ranked beside published ones only if judged as they were."""
    figures = result["metrics"].get("multi" if several else "single")
    if not figures:
        return None
    same_judges = tuple(sorted(result["identity_by"])) == tuple(sorted(PUBLISHED_JUDGES))
    ranked = result["method"] not in YARDSTICKS
    if result["bench"]["name"] == PUBLISHED_BENCH:
        ranked = ranked and same_judges
    return Row(
        result["method"],
        {name: figure["mean"] for name, figure in figures.items()},
        {name: (figure["low"], figure["high"]) for name, figure in figures.items()},
        ranked=ranked,
        people=figures["found"]["n"],
    )


def _own_tables(name: str, group: list[dict]) -> list[Table]:
    out = []
    for several, words in ((False, "one person"), (True, "several people")):
        rows = [row for result in group if (row := _row(result, several)) is not None]
        if not rows:
            continue
        columns = tuple(c for c in OWN_COLUMNS if any(c in row.values for row in rows))
        threshold = metrics.RANKING_THRESHOLD_MULTI if several else metrics.RANKING_THRESHOLD_SINGLE
        world = group[0]["bench"]["world"]
        notes = [f"{rows[0].people} people; 95 % bootstrap intervals over cases."]
        if world != "photos":
            notes.append(f"Pictures of {world}: not comparable with numbers on photos.")
        if "copy_paste" in columns:
            notes.append(RANKING_NOTE.format(threshold=threshold))
        ceilings = [r["metrics"]["multi" if several else "single"].get("ceiling") for r in group]
        if ceilings[0] is not None:
            notes.append(f"Two real pictures of one person have the cosine {ceilings[0]['mean']:.3f}.")
        out.append(
            Table(f"{name}, {words}", columns, tuple(rows), several, (*notes, *_judge_notes(group, False)))
        )
    return out


def _judge_notes(group: Sequence[dict], beside_published: bool) -> list[str]:
    """Who judged, and who could not."""
    notes = []
    for result in group:
        judges = " and ".join(result["identity_by"])
        note = f"{result['method']}: likeness by {judges}"
        if beside_published and tuple(sorted(result["identity_by"])) != tuple(sorted(PUBLISHED_JUDGES)):
            note += f", not by the mean of {', '.join(PUBLISHED_JUDGES)}, hence outside the ranking"
        absent = [
            f"{name} is absent ({v['absent']})" for name, v in result["judges"].items() if "absent" in v
        ]
        notes.append("; ".join([note, *absent]) + ".")
    merged: dict[str, list[str]] = {}
    for note in notes:  # several methods judged alike share a line
        method, _, rest = note.partition(": ")
        merged.setdefault(rest, []).append(method)
    return [f"{', '.join(methods)}: {rest}" for rest, methods in merged.items()]


# ---- formats ---------------------------------------------------------------------------------------------


def render(tables: Iterable[Table], form: str = "markdown", intervals: bool = False) -> str:
    """All tables as Markdown, CSV or LaTeX. ValueError for another format."""
    if form not in FORMATS:
        raise ValueError(f"`format` is {form!r}: give one of {', '.join(FORMATS)}.")
    parts = {"markdown": _markdown, "latex": _latex}
    if form == "csv":
        return _csv(tables)
    return "\n\n".join(parts[form](table, intervals) for table in tables) + "\n"


def _number(row: Row, column: str, intervals: bool) -> str | None:
    if column not in row.values:
        return None
    text = f"{row.values[column]:.3f}"
    if intervals and column in row.intervals:
        low, high = row.intervals[column]
        text += f" [{low:.3f}, {high:.3f}]"
    return text


def _markdown(table: Table, intervals: bool) -> str:
    places = table.places()
    arrows = {1: " ↑", -1: " ↓", 0: ""}
    heads = ["Method", *(METRICS[c].label + arrows[METRICS[c].better] for c in table.columns)]
    lines = [f"**{table.title}**", "", _line(heads), _line([":--", *("--:" for _ in table.columns)])]
    for number, row in enumerate(table.rows):
        cells = [row.method + "".join(f" ({mark})" for mark in row.notes)]
        for column in table.columns:
            text = _number(row, column, intervals) or "–"
            place = places.get((number, column))
            cells.append({1: f"**{text}**", 2: f"<u>{text}</u>"}.get(place, text))
        lines.append(_line(cells))
    return "\n".join([*lines, "", *(f"*{note}*  " for note in table.notes)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _latex(table: Table, intervals: bool) -> str:
    places = table.places()
    arrows = {1: r"$\uparrow$", -1: r"$\downarrow$", 0: ""}
    heads = [METRICS[c].label + arrows[METRICS[c].better] for c in table.columns]
    lines = [
        r"\begin{table}", r"\centering", rf"\caption{{{_tex(table.title)}}}",
        rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}", r"\toprule",
        " & ".join(["Method", *heads]) + r" \\", r"\midrule",
    ]  # fmt: skip
    for number, row in enumerate(table.rows):
        cells = [_tex(row.method)]
        for column in table.columns:
            text = _number(row, column, intervals) or "--"
            place = places.get((number, column))
            cells.append({1: rf"\textbf{{{text}}}", 2: rf"\underline{{{text}}}"}.get(place, text))
        lines.append(" & ".join(cells) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    lines += [rf"\par\footnotesize {_tex(note)}" for note in table.notes]
    return "\n".join([*lines, r"\end{table}"])


def _tex(text: str) -> str:
    for plain, escaped in (
        ("\\", r"\textbackslash "),
        ("&", r"\&"),
        ("%", r"\%"),
        ("_", r"\_"),
        ("#", r"\#"),
    ):
        text = text.replace(plain, escaped)
    return text.replace(">", "$>$").replace("<", "$<$")


def _csv(tables: Iterable[Table]) -> str:
    """One line a table, method and metric: mean, interval, place in the ranking."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["table", "method", "metric", "mean", "low", "high", "place", "people"])
    for table in tables:
        places = table.places()
        for number, row in enumerate(table.rows):
            for column in table.columns:
                if column in row.values:
                    low, high = row.intervals.get(column, ("", ""))
                    place = places.get((number, column), "")
                    people = "" if row.people is None else row.people
                    writer.writerow(
                        [table.title, row.method, column, row.values[column], low, high, place, people]
                    )
    return stream.getvalue()


# ---- attributes and sweeps -------------------------------------------------------------------------------


def attribute_table(result: dict, subset: str = "all") -> str:
    """Markdown: what of each attribute was followed, and what was copied from the photo."""
    attributes = (result.get("attributes") or {}).get(subset)
    if not attributes:
        raise ValueError(
            f"`results` of {result['method']} has no attributes of {subset!r}: no judge knew the world."
        )
    heads = ["Attribute", "Followed ↑", "Copied ↓", "By chance", "As target ↑", "CP if copied", "CP if not"]
    lines = [
        f"**{result['method']}: what was taken from the photo ({SUBSET_WORDS[subset]})**",
        "",
        _line(heads),
    ]
    lines.append(_line([":--", *("--:" for _ in heads[1:])]))
    keys = ("followed", "copied", "by_chance", "as_target", "copy_paste_of_copied", "copy_paste_of_others")
    for name, values in attributes.items():
        cells = [name.replace("_", " ")]
        for key in keys:
            value = values.get(key)
            number = value["mean"] if isinstance(value, dict) else value
            cells.append("–" if number is None else f"{number:.3f}")
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def sweep_table(sweep: dict) -> str:
    """Markdown: one line a position of the sliders; those on the front are marked."""
    columns = [c for c in OWN_COLUMNS if all(c in p["metrics"]["all"] for p in sweep["positions"])]
    heads = ["Similarity", "Diversity", *(METRICS[c].label for c in columns), "Front"]
    lines = [f"**{sweep['method']}: sliders on {sweep['bench']}**", "", _line(heads)]
    lines.append(_line(["--:" for _ in heads]))
    for position in sweep["positions"]:
        cells = [f"{position['similarity']:.2f}", f"{position['diversity']:.2f}"]
        cells += [f"{position['metrics']['all'][c]['mean']:.3f}" for c in columns]
        lines.append(_line([*cells, "●" if position["on_front"] else ""]))
    objectives = " and ".join(METRICS[name].label for name in sweep["objectives"])
    return "\n".join([*lines, "", f"*Front: no other position is better in {objectives} together.*", ""])
