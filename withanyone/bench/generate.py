"""Pictures of every case by a pipeline: resumable, several seeds, one position of the sliders or a sweep.

    out/<case>.png                                  one seed
    out/<case>--<seed>.png                          several seeds
    out/similarity-0.50_diversity-0.25/<case>.png   a sweep: a folder a position
    out/generate.json                               what made them; another run into the folder must agree

Two models are no pipelines: `target` gives the cases' own ground truths as a method's pictures (the tables'
row GT), `reference` the photos (row Ref; in a grid where there are several people).
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..pipeline import slider_scales
from ..precision import dtype_name
from ..settings import save_picture
from .cases import SEED_MARK, Case, CaseError, Cases

logger = logging.getLogger(__name__)

NO_PIPELINES = ("target", "reference")
PIPELINE = "withanyone.pipeline:WithAnyonePipeline"
SETTINGS_FILE = "generate.json"
#: The sweep of `--sweep`: similarity x diversity. Similarity 0 is left out: there diversity means nothing.
SWEEP_SIMILARITY = (0.25, 0.5, 0.75, 1.0, 1.5)
SWEEP_DIVERSITY = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Position:
    """One position of the sliders; `folder` is "" for the only one."""

    similarity: float | None
    diversity: float | None
    folder: str = ""

    def scales(self) -> dict[str, float]:
        """The pipeline's arguments; none of them where a slider is left to the model."""
        if self.similarity is None or self.diversity is None:
            return {}
        id_scale, siglip_scale = slider_scales(self.similarity, self.diversity)
        return {"id_scale": id_scale, "siglip_scale": siglip_scale}


def positions(similarity: Sequence[float], diversity: Sequence[float]) -> list[Position]:
    """Every pair; one pair needs no folder of its own, none leaves both sliders to the model."""
    if not similarity and not diversity:
        return [Position(None, None)]
    pairs = [(s, d) for s in similarity or (1.0,) for d in diversity or (0.0,)]
    for pair in pairs:
        slider_scales(*pair)  # ValueError for a slider out of range, before any picture is made
    if len(pairs) == 1:
        return [Position(*pairs[0])]
    return [Position(s, d, f"similarity-{s:.2f}_diversity-{d:.2f}") for s, d in pairs]


@dataclass(frozen=True)
class Plan:
    """What a run makes; everything in it but the folders stands in generate.json."""

    cases: Cases
    out: str
    model: str
    seeds: tuple[int, ...] = (0,)
    positions: tuple[Position, ...] = (Position(None, None),)
    max_side: int = 1024
    pipeline: str = PIPELINE
    device: str | None = None
    dtype: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)  # more of the pipeline's own, the same for all

    def settings(self, position: Position) -> dict[str, Any]:
        model = Path(self.model).name if Path(self.model).is_dir() else self.model
        dtype = dtype_name("auto", _device(self.device)) if self.dtype == "auto" else self.dtype
        return {
            "model": model, "pipeline": self.pipeline, "cases": self.cases.bench, "seeds": list(self.seeds),
            "similarity": position.similarity, "diversity": position.diversity,
            "max_side": self.max_side, "dtype": dtype, **self.arguments,
        }  # fmt: skip

    def path(self, position: Position, name: str, seed: int) -> Path:
        stem = name if len(self.seeds) == 1 else f"{name}{SEED_MARK}{seed}"
        return Path(self.out) / position.folder / f"{stem}.png"


def output_size(case: Case, max_side: int) -> tuple[int, int] | None:
    """(width, height) of the case's picture: the target's, at most `max_side` a side, in multiples of 16;
    None without a target, where the model's own size is right."""
    if case.target is None:
        return None
    width, height = case.target.image.size
    scale = min(1.0, max_side / max(width, height))
    return max(16, int(width * scale) // 16 * 16), max(16, int(height * scale) // 16 * 16)


def scaled_boxes(case: Case, size: tuple[int, int]) -> list[tuple[float, ...]] | None:
    """The case's boxes in pixels of a picture of `size`, cut to it."""
    if case.bboxes is None or case.target is None:
        return None
    target = np.array(case.target.image.size, np.float64)
    boxes = case.bboxes * np.tile(np.array(size) / target, 2)
    return [tuple(row) for row in np.clip(boxes, 0, np.tile(np.array(size, np.float64), 2)).tolist()]


def case_seed(index: int, seed: int) -> int:
    """The generator's seed for a case: no two cases share their noise, and a run is repeatable."""
    return seed * 1_000_003 + index


class Maker:
    """Makes pictures of one plan; each process has one."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._pipe = None if plan.model in NO_PIPELINES else load_pipeline(plan)

    def make(self, position: Position, index: int, seed: int) -> str | None:
        """Writes one picture; what went wrong where the case or its photos cannot be used."""
        case_name = self.plan.cases.names[index]
        path = self.plan.path(position, case_name, seed)
        try:
            case = self.plan.cases[index]
            image = self._picture(case, position, index, seed)
        except CaseError as error:
            return str(error)
        except ValueError as error:
            return f"case {case_name}: {error}"
        aside = path.with_name(f".part-{path.name}")
        if self._pipe is None:
            image.save(aside)
        else:
            save_picture(
                image,
                aside,
                {
                    "prompt": case.prompt,
                    **self.plan.settings(position),
                    **position.scales(),
                    "seed": case_seed(index, seed),
                },
            )
        aside.replace(path)
        return None

    def _picture(self, case: Case, position: Position, index: int, seed: int) -> Image.Image:
        if self.plan.model == "target":
            if case.target is None:
                raise CaseError(case.name, "it has no target")
            return case.target.image
        photos = [photo.image for photo in case.references]
        if self.plan.model == "reference":
            return in_a_grid(photos)
        import torch

        size = output_size(case, self.plan.max_side)
        given: dict[str, Any] = {**self.plan.arguments, **position.scales()}
        if size is not None:
            given |= {"width": size[0], "height": size[1]}
            if (boxes := scaled_boxes(case, size)) is not None:
                given["bboxes"] = boxes
        generator = torch.Generator("cpu").manual_seed(case_seed(index, seed))
        return self._pipe(prompt=case.prompt, faces=photos, generator=generator, **given).images[0]


def in_a_grid(images: Sequence[Image.Image]) -> Image.Image:
    """One picture of all, row by row on grey, about as wide as high; a single one as it is."""
    if len(images) == 1:
        return images[0]
    columns = math.ceil(math.sqrt(len(images)))
    width, height = max(image.width for image in images), max(image.height for image in images)
    page = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), (128, 128, 128))
    for number, image in enumerate(images):
        page.paste(image, (number % columns * width, number // columns * height))
    return page


def _device(name: str | None):
    import torch

    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def load_pipeline(plan: Plan):
    """`plan.pipeline`'s class, from_pretrained(plan.model), on its device, without a progress bar of its own.

    Raises:
        ValueError: the class is not there, or has no from_pretrained.
    """
    import torch

    module_name, _, attribute = plan.pipeline.partition(":")
    try:
        kind = getattr(importlib.import_module(module_name), attribute)
        load = kind.from_pretrained
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"`pipeline` is {plan.pipeline!r} ({error}): give module:Class of a class with from_pretrained."
        ) from error
    device = _device(plan.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    pipe = load(plan.model, dtype=getattr(torch, dtype_name(plan.dtype, device))).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


_maker: Maker | None = None


def _start(plan: Plan) -> None:
    global _maker
    _maker = Maker(plan)


def _make(job: tuple[Position, int, int]) -> str | None:
    assert _maker is not None
    return _maker.make(*job)


def generate(plan: Plan, *, workers: int = 1, limit: int | None = None) -> dict[str, str]:
    """Makes what is missing of a plan's pictures; {picture: what went wrong} of those that could not be made.

    A case that is broken, or in whose photos the pipeline finds no face, is named and passed over.

    Raises:
        ValueError: the folder holds pictures of other settings; a slider out of range; a model that is none.
    """
    for position in plan.positions:
        _stamp(Path(plan.out) / position.folder, plan.settings(position))
    count = len(plan.cases) if limit is None else min(limit, len(plan.cases))
    jobs = [
        (position, index, seed)
        for index in range(count)
        for position in plan.positions
        for seed in plan.seeds
        if not plan.path(position, plan.cases.names[index], seed).exists()
    ]
    total = count * len(plan.positions) * len(plan.seeds)
    logger.info("%d pictures to make, %d are there", len(jobs), total - len(jobs))
    failures: dict[str, str] = {}
    start = said = time.monotonic()
    for done, (job, wrong) in enumerate(_run(plan, jobs, workers), 1):
        if wrong is not None:
            logger.warning("not made: %s", wrong)
            position, index, seed = job
            failures[str(plan.path(position, plan.cases.names[index], seed).relative_to(plan.out))] = wrong
        now = time.monotonic()
        if now - said > 10 or done == len(jobs):
            said = now
            pace = (now - start) / done
            logger.info(
                "%d of %d pictures, %.1f s each, %.0f s left",
                done,
                len(jobs),
                pace,
                pace * (len(jobs) - done),
            )
    return failures


def _run(plan: Plan, jobs: list, workers: int):
    if not jobs:
        return
    if workers <= 1:
        maker = Maker(plan)
        yield from ((job, maker.make(*job)) for job in jobs)
        return
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start, initargs=(plan,)
    ) as pool:
        yield from zip(jobs, pool.map(_make, jobs), strict=True)


def _stamp(folder: Path, settings: dict) -> None:
    """Writes generate.json, or sees to it that the one there says the same."""
    path = folder / SETTINGS_FILE
    text = json.dumps(settings, indent=1, sort_keys=True) + "\n"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    elif path.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"`out` {str(folder)!r} holds pictures of other settings, see its {SETTINGS_FILE}: give those "
            "settings, or another folder."
        )


def read_stamp(folder: str | Path) -> dict | None:
    """What generate.json in a folder of pictures says; None where another program made them."""
    path = Path(folder) / SETTINGS_FILE
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`pictures`: {path} is not JSON ({error}).") from error
