"""A model repository of a finished run: adapter in both layouts, config, card, pictures, checked, pushed.

    python -m train.release RUN --out FOLDER --results results.json --baseline last.json ... [--push ORG/NAME]

The card comes from a template (hub_card/release.md), filled with the run's data, settings and figures.
Nothing is pushed while a check fails: files whole and equal in both layouts, weights finite and not without
effect, no pickle, no mark of the template left, no local path, figures there and not worse than the
baseline's.
"""

from __future__ import annotations

import argparse
import logging
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from withanyone import FaceAdapter
from withanyone.bench.figures import METRICS
from withanyone.bench.gate import compare
from withanyone.bench.results import read_results

from .checkpoints import load_checkpoint, load_weights

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).parent.parent / "hub_card" / "release.md"
KINDS = {".safetensors", ".json", ".yaml", ".md", ".png", ".jpg"}
LOCAL_PATH = re.compile(r"(?<![\w.:/)\]}~-])/[\w.-]+/[\w./-]+")
PATHS = ("pretrained", "shards", "output_dir", "cache_dir", "init_from", "validation_cases")
SAMPLES, RESULTS, SETTINGS, CARD = "samples", "results.json", "training.yaml", "README.md"
SHOWN_SETTINGS = (
    "branches", "max_train_steps", "train_batch_size", "paired_ratio", "reference_rule", "id_loss_weight",
    "contrastive_loss_weight", "contrastive_temperature", "contrastive_positive", "num_negatives",
    "id_landmarks", "learning_rate", "optimizer", "text_dropout", "ema_decay", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What a run cannot know of itself: for the card."""

    name: str
    data: str  # what it was trained on, and under which terms
    licence: str  # the Hub's short name of it
    base_model: str = ""  # Hub id of the base, where it has one

    def __post_init__(self) -> None:
        for name in ("name", "data", "licence"):
            if not getattr(self, name).strip():
                raise ValueError(f"`{name}` is empty: the card must say it.")


# --- the folder -----------------------------------------------------------------------------------------


def load_adapter(run: Path, which: str) -> FaceAdapter:
    """The adapter of a run: "adapter" (finished), "best", or the average in a checkpoint folder."""
    if which in ("adapter", "best"):
        if not (run / which / "config.json").exists():
            raise ValueError(f"`run` {run} has no {which}/: it is not finished, or kept no best adapter.")
        return FaceAdapter.from_pretrained(run / which)
    folder = Path(which) if Path(which).is_dir() else run / "checkpoints" / which
    tensors, state = load_checkpoint(folder)
    if "adapter_config" not in state:
        raise ValueError(f"`which` {folder} does not say its adapter's sizes: it is of an older version.")
    adapter = FaceAdapter.from_config(state["adapter_config"])
    load_weights(adapter, tensors.get("ema", tensors["adapter"]))
    return adapter


def public_settings(run: Path) -> dict[str, Any]:
    """The run's settings, local paths cut to their last part."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    for name in PATHS:
        value = config.get(name)
        if value and (Path(value).is_absolute() or Path(value).exists()):
            config[name] = Path(value).name
    for name in ("extra_shards", "merge_from"):
        config[name] = [Path(value).name for value in config.get(name, [])]
    return config


def build(
    run: Path,
    out: Path,
    facts: Facts,
    *,
    which: str = "adapter",
    results: Path | None = None,
    samples: Sequence[Path] = (),
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Writes the repository's folder. Pictures: `samples`, or the run's last validation sheet."""
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"`out` {out} is not empty.")
    adapter = load_adapter(run, which).to(dtype)
    adapter.save_pretrained(out)
    adapter.save_single_file(out / single_file(adapter))
    config = public_settings(run)
    (out / SETTINGS).write_text(yaml.safe_dump(config, sort_keys=False, default_flow_style=None, width=110))
    pictures = list(samples) or sorted((run / SAMPLES).glob("*.png"))[-1:]
    for picture in pictures:
        (out / SAMPLES).mkdir(exist_ok=True)
        shutil.copyfile(picture, out / SAMPLES / picture.name)
    scored = None
    if results is not None:
        scored = read_results(results)
        shutil.copyfile(results, out / RESULTS)
    shown = [f"{SAMPLES}/{picture.name}" for picture in pictures]
    (out / CARD).write_text(fill_card(TEMPLATE.read_text(), facts, config, adapter, scored, shown))
    return out


def single_file(adapter: FaceAdapter) -> str:
    """Name of the file in the released layout."""
    return "withanyone.safetensors" if len(adapter.branches) == 2 else "ipa.safetensors"


# --- the card -------------------------------------------------------------------------------------------


def figures_table(results: dict[str, Any] | None) -> str:
    """The bench's figures with their intervals, as Markdown."""
    if results is None:
        return "Not measured."
    bench, metrics = results["bench"], results["metrics"]
    subsets = [name for name in ("all", "single", "multi") if metrics.get(name)]
    lines = [
        f"{bench['name']}, {bench['cases']} cases, world: {bench['world']}; identity by "
        f"{', '.join(results['identity_by'])}; 95 % bootstrap intervals over cases.",
        "",
        f"| metric | {' | '.join(subsets)} |",
        "|---|" + "---|" * len(subsets),
    ]
    for name, metric in METRICS.items():
        found = [metrics[subset].get(name) for subset in subsets]
        if any(found):
            cells = [f"{f['mean']:.3f} [{f['low']:.3f}, {f['high']:.3f}]" if f else "" for f in found]
            lines.append(f"| {metric.label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def fill_card(
    template: str,
    facts: Facts,
    config: dict[str, Any],
    adapter: FaceAdapter,
    results: dict[str, Any] | None,
    samples: Sequence[str],
) -> str:
    """The template with every {{mark}} replaced. `ValueError` for a mark that is not known."""
    base = facts.base_model
    values = {
        "name": facts.name,
        "data": facts.data,
        "licence": facts.licence,
        "base_model": f"base_model: {base}\n" if base else "",
        "base": base or config.get("pretrained") or "the pipeline it was trained on",
        "branches": " and ".join(adapter.branches),
        "parameters": f"{sum(p.numel() for p in adapter.parameters()) / 1e6:,.1f} million",
        "single_file": single_file(adapter),
        "settings": "\n".join(
            f"| `{name}` | `{config[name]}` |" for name in SHOWN_SETTINGS if name in config
        ),
        "figures": figures_table(results),
        "samples": "\n\n".join(f"![samples]({name})" for name in samples) or "None were kept.",
    }
    marks = set(re.findall(r"\{\{(\w+)\}\}", template))
    if marks - values.keys():
        raise ValueError(f"the template has marks that nothing fills: {sorted(marks - values.keys())}.")
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: values[mark[1]], template)


# --- checks ---------------------------------------------------------------------------------------------


def problems(folder: Path, baseline: Path | None = None) -> list[str]:
    """What speaks against pushing `folder`; [] where nothing does."""
    return [*_weight_problems(folder), *_file_problems(folder), *_figure_problems(folder, baseline)]


def _weight_problems(folder: Path) -> list[str]:
    try:
        adapter = FaceAdapter.from_pretrained(folder)
        branch = None if len(adapter.branches) == 2 else adapter.branches[0]
        released = FaceAdapter.from_single_file(folder / single_file(adapter), branch=branch)
    except (ValueError, OSError) as error:
        return [f"the adapter cannot be loaded: {error}"]
    one, two = adapter.state_dict(), released.state_dict()
    found = []
    if one.keys() != two.keys() or not all(torch.equal(one[k], two[k]) for k in one):
        found.append("the two layouts hold different weights")
    broken = [name for name, value in one.items() if not torch.isfinite(value).all()]
    if broken:
        found.append(f"weights that are not finite: {', '.join(broken[:3])}")
    silent = [
        branch for branch in adapter.branches
        if not any(attention.to_out.weight.any() for attention in adapter.attentions(branch))
    ]  # fmt: skip
    if silent:
        found.append(f"branches without any effect (to_out is 0): {', '.join(silent)}")
    return found


def _file_problems(folder: Path) -> list[str]:
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder)
        if path.suffix not in KINDS:
            found.append(f"{name} is of a kind that does not belong here")
        elif path.suffix in (".md", ".yaml") and LOCAL_PATH.search(path.read_text()):
            found.append(f"{name} names a local path")
    if not (folder / CARD).exists():
        return [*found, "there is no card (README.md)"]
    card = (folder / CARD).read_text()
    if "{{" in card:
        found.append("the card has marks of the template left")
    front = re.match(r"---\n(.*?)\n---\n", card, flags=re.S)
    try:
        head = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        head = None
    if not isinstance(head, dict) or not head.get("license"):
        found.append("the card's head does not give the licence")
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", card)
    found += [f"the card shows {p}, which is not there" for p in pictures if not (folder / p).exists()]
    if not pictures:
        found.append("the card shows no picture")
    return found


def _figure_problems(folder: Path, baseline: Path | None) -> list[str]:
    """By the bench's own gate (`python -m withanyone.bench check`)."""
    if not (folder / RESULTS).exists():
        return ["there are no figures: give `results`, from python -m withanyone.bench score"]
    try:
        results = read_results(folder / RESULTS)
        verdicts = compare(results, read_results(baseline)) if baseline is not None else []
    except ValueError as error:
        return [f"the figures cannot be judged: {error}"]
    return [f"worse than the baseline: {verdict}" for verdict in verdicts if verdict.worse]


# --- the Hub --------------------------------------------------------------------------------------------


def push(
    folder: Path,
    repo_id: str,
    *,
    baseline: Path | None = None,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    token: str | None = None,
    message: str = "Release of the face adapter",
) -> str:
    """Uploads a checked folder; returns where it is.

    Args:
        baseline: results.json that the folder's must not be worse than.
        private: the repository is made private, where it is new.
        create_pr: as a pull request of the repository. revision: a branch, made where it is new.

    Raises:
        ValueError: a check fails; all that do are named.
    """
    found = problems(folder, baseline)
    if found:
        raise ValueError("nothing was pushed:\n" + "\n".join(f"- {line}" for line in found))
    from huggingface_hub import create_branch, create_repo, upload_folder

    create_repo(repo_id, private=private, exist_ok=True, token=token)
    if revision is not None and not create_pr:
        create_branch(repo_id, branch=revision, exist_ok=True, token=token)
    done = upload_folder(
        repo_id=repo_id, folder_path=str(folder), commit_message=message, create_pr=create_pr,
        revision=revision, token=token,
    )  # fmt: skip
    return str(getattr(done, "pr_url", None) or f"https://huggingface.co/{repo_id}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="a run's output_dir")
    parser.add_argument("--out", type=Path, required=True, help="folder for the repository")
    parser.add_argument("--which", default="adapter", help="adapter, best, or a checkpoint (step_00001000)")
    parser.add_argument("--name", required=True, help="the model's name, for the card")
    parser.add_argument("--data", required=True, help="what it was trained on, and under which terms")
    parser.add_argument("--licence", required=True, help="the Hub's short name, such as apache-2.0 or other")
    parser.add_argument("--base-model", default="", help="Hub id of the base")
    parser.add_argument("--results", type=Path, help="results.json of the bench")
    parser.add_argument("--baseline", type=Path, help="results.json that must not be better")
    parser.add_argument("--samples", type=Path, nargs="*", default=[], help="pictures for the card")
    parser.add_argument("--push", metavar="REPO", help="Hub id to push to; without it nothing is pushed")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--create-pr", action="store_true")
    parser.add_argument("--revision", help="branch to push to")
    parser.add_argument("--token", help="default: the one you are logged in with")


def run(args: argparse.Namespace) -> str:
    """A model repository of a run: built, checked, and pushed if asked."""
    facts = Facts(args.name, args.data, args.licence, args.base_model)
    build(args.run, args.out, facts, which=args.which, results=args.results, samples=args.samples)
    if args.push:
        return push(
            args.out, args.push, baseline=args.baseline, private=args.private, create_pr=args.create_pr,
            revision=args.revision, token=args.token,
        )  # fmt: skip
    found = problems(args.out, args.baseline)
    state = "ready to push" if not found else "not ready:\n" + "\n".join(f"- {line}" for line in found)
    return f"{args.out}: {state}"


if __name__ == "__main__":
    from .__main__ import main

    main(["release", *sys.argv[1:]])
