"""Pictures and scores while training: a few fixed cases at fixed seeds, by the pipeline itself.

A case is a folder as in MultiID-Bench: `meta.json` with `prompt` and `bboxes`, `ori.jpg` (the target),
`ref_1.jpg`, `ref_2.jpg`, ... one photo a person. Scored by the pipeline's own recogniser, which training saw:
good for watching a run and for choosing among its checkpoints, not for reporting.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from withanyone import Face, FaceAdapter, WithAnyonePipeline
from withanyone.bench import metrics

from .config import BEST_OF

MIN_IOU = 0.2  # a found face counts for a person whose box it overlaps at least so much


@dataclass
class Case:
    """One validation case, pictures as they are on disk."""

    name: str
    prompt: str
    bboxes: list[tuple[float, ...]]
    target: Image.Image
    references: list[Image.Image]


def read_cases(folder: str | Path, count: int) -> list[Case]:
    """The first `count` case folders by name."""
    cases = []
    for path in sorted(p.parent for p in Path(folder).glob("*/meta.json"))[:count]:
        meta = json.loads((path / "meta.json").read_text())
        boxes = meta["bboxes"] if not isinstance(meta["bboxes"], str) else json.loads(meta["bboxes"])
        references = [Image.open(path / f"ref_{i + 1}.jpg").convert("RGB") for i in range(len(boxes))]
        target = Image.open(path / "ori.jpg").convert("RGB")
        cases.append(Case(path.name, meta["prompt"], [tuple(b) for b in boxes], target, references))
    if not cases:
        raise ValueError(
            f"`validation_cases` {str(folder)!r} holds no case: a folder each, with a meta.json."
        )
    return cases


def face_in_box(faces: list[Face], bbox: tuple[float, ...]) -> Face | None:
    """The found face that overlaps `bbox` most, if any does by `MIN_IOU`."""
    if not faces:
        return None
    overlap = metrics.box_iou(bbox, [face.bbox for face in faces])[0]
    return faces[int(overlap.argmax())] if overlap.max() >= MIN_IOU else None


def score_case(pipeline: WithAnyonePipeline, case: Case, picture: Image.Image) -> list[dict[str, float]]:
    """A row a person: found, sim_gt, sim_ref (0 where no face was found), and copy_paste where one was.

    In a picture of several found people every row has the picture's blending.
    """
    analyzer = pipeline.face_analyzer
    made, there = analyzer.detect(picture), analyzer.detect(case.target)
    rows, generated, references = [], [], []
    for bbox, photo in zip(case.bboxes, case.references, strict=True):
        reference, target = analyzer.detect(photo, max_faces=1), face_in_box(there, bbox)
        if not reference or target is None:
            continue  # nothing to compare with: no statement about the model
        found = face_in_box(made, bbox)
        row = {"found": float(found is not None), "sim_gt": 0.0, "sim_ref": 0.0}
        if found is not None:
            g, t, r = (face.embedding[None] for face in (found, target, reference[0]))
            row["sim_gt"] = float(metrics.sim(g, t)[0])
            row["sim_ref"] = float(metrics.sim(g, r)[0])
            row["copy_paste"] = float(metrics.copy_paste(g, t, r)[0])
            generated.append(found.embedding)
            references.append(reference[0].embedding)
        rows.append(row)
    if len(generated) > 1:
        g, r = np.stack(generated), np.stack(references)
        blending = metrics.blending(g, r, metrics.assign_faces(g, r))
        rows = [{**row, "blending": blending} for row in rows]
    return rows


def sheet(rows: list[list[Image.Image]], height: int = 160) -> Image.Image:
    """Pictures in rows, all of one height."""
    scaled = [[p.resize((round(p.width * height / p.height), height), Image.Resampling.LANCZOS) for p in row]
              for row in rows]  # fmt: skip
    out = Image.new("RGB", (max(sum(p.width for p in row) for row in scaled), height * len(rows)), "white")
    for i, row in enumerate(scaled):
        left = 0
        for picture in row:
            out.paste(picture, (left, i * height))
            left += picture.width
    return out


def validate(pipeline: WithAnyonePipeline, cases: str, count: int, out: Path) -> dict[str, float]:
    """Makes the cases' pictures, writes references, target and result of each to `out`, and returns mean
    scores."""
    scores, rows = [], []
    pipeline.set_progress_bar_config(disable=True)
    for number, case in enumerate(read_cases(cases, count)):
        width, height = (side // 16 * 16 for side in case.target.size)
        picture = pipeline(
            prompt=case.prompt,
            faces=case.references,
            bboxes=case.bboxes,
            width=width,
            height=height,
            num_candidates=1,  # what the adapter does, not what a choice makes of it
            generator=torch.Generator().manual_seed(number),
        ).images[0]
        scores += score_case(pipeline, case, picture)
        rows.append([*case.references, case.target, picture])
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet(rows).save(out)
    names = ("found", "sim_gt", "sim_ref", "copy_paste", "blending")
    return {n: float(np.mean([s[n] for s in scores if n in s])) for n in names if any(n in s for s in scores)}


@dataclass
class Best:
    """The best adapter so far, by one of the validation's means: `folder` in diffusers' layout and best.json.

    An adapter whose `sim_gt` is below `min_sim_gt` is never the best: one that is blind to faces copies
    nothing.
    """

    folder: Path
    metric: str | None
    min_sim_gt: float = 0.0
    row: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        path = self.folder / "best.json"
        if path.exists():
            self.row = json.loads(path.read_text())

    def is_better(self, scores: dict[str, float]) -> bool:
        """Whether `scores` beat what is kept. Equal ones do not."""
        if self.metric is None or self.metric not in scores or scores.get("sim_gt", 0.0) < self.min_sim_gt:
            return False
        sign = BEST_OF[self.metric]
        return self.metric not in self.row or sign * scores[self.metric] > sign * self.row[self.metric]

    def keep(self, adapter: FaceAdapter, step: int, scores: dict[str, float]) -> None:
        """Puts `adapter` in the place of the best one; written aside and renamed."""
        self.row = {"step": step, **scores}
        partial = self.folder.with_name(self.folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        adapter.save_pretrained(partial)
        (partial / "best.json").write_text(json.dumps(self.row, indent=1))
        shutil.rmtree(self.folder, ignore_errors=True)
        os.replace(partial, self.folder)
