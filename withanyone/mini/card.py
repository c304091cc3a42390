"""The model card: every number in `pretrained/figures/*.json`, with the command that measured it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import PRETRAINED

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def fill_card(text: str, figures: Mapping[str, Mapping[str, Any]]) -> str:
    """The card's text with the tables of `figures` (part -> its JSON) between the two marks."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"`text` needs the marks {BEGIN} and {END}, once each and in this order.")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    tables = "\n".join(table(part, content) for part, content in sorted(figures.items()))
    return f"{head}{BEGIN}\n\n{tables}\n{END}{tail}"


def table(part: str, content: Mapping[str, Any]) -> str:
    """One part's figures as a Markdown table under its name."""
    lines = [f"### {part}", ""]
    if "command" in content:
        lines += [f"`{content['command']}`", ""]
    lines += ["| figure | value |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in figures_of(content)]
    return "\n".join(lines) + "\n"


def figures_of(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name, value) of all numbers inside, nested names joined by ": ".

    A mean with its interval is one figure, and so is a list of two (an interval); other lists count from 0.
    """
    for key, value in content.items():
        name = f"{prefix}{str(key).replace('_', ' ').replace('|', '/')}"
        if (
            isinstance(value, list)
            and len(value) == 2
            and all(isinstance(end, (int, float)) for end in value)
        ):
            yield name, f"[{value[0]:.4g}, {value[1]:.4g}]"
            continue
        if isinstance(value, list):
            value = dict(enumerate(value))
        if isinstance(value, Mapping) and {"mean", "low", "high"} <= value.keys():
            yield name, f"{value['mean']:.4g} [{value['low']:.4g}, {value['high']:.4g}]"
        elif isinstance(value, Mapping):
            yield from figures_of(value, f"{name}: ")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, f"{value:.4g}"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--card", type=Path, default=Path("hub_card/README.md"))
    parser.add_argument("--figures", type=Path, default=PRETRAINED / "figures")


def _run(args: argparse.Namespace) -> None:
    figures = {path.stem: json.loads(path.read_text()) for path in sorted(args.figures.glob("*.json"))}
    if not figures:
        raise ValueError(f"`figures` is {args.figures}, where there is no JSON file: measure first.")
    args.card.write_text(fill_card(args.card.read_text(), figures))


COMMANDS = {"card": (_add_arguments, _run)}
