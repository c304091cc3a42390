"""The miniature as a whole on held-out people: likeness, copying, swaps, prompt following, live sliders.

Every case gives each person by another picture than the one that is to be matched. Pictures are made at the
pipeline's own defaults, faces found by its detector, and identity is scored by the *judge*, a recogniser of
another architecture trained on other people (`withanyone/mini/judges`), the pipeline's own recogniser (the
coach) beside it. What a picture shows is read by `withanyone.mini.reader`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from withanyone import WithAnyonePipeline, slider_scales
from withanyone.arcface import Recognizer, align_face
from withanyone.bench import metrics
from withanyone.mini import PRETRAINED, reader, records

logger = logging.getLogger(__name__)

JUDGE = reader.JUDGES / "recognition.onnx"
COPIED = ("hair_style", "glasses", "expression")  # what an output can take over from the photo
READ_BACK = ("hat", "glasses", "hair_style", "expression", "scene", "light")
BASE = "base"  # folder of the pictures that know of no faces
GALLERY = 200  # people among whom the right one is to be nearest
#: What `defaults` compares: every combination.
STEPS = (14, 25)
MIN_SIGMAS = (0.0, 0.5)  # true_cfg_min_sigma
GUIDANCE = (3.0, 4.0)  # true_cfg_scale, the faces in the pass that is told the prompt alone
POSITIONS = ((1.0, 0.5), (1.5, 0.5))  # similarity, diversity
SLIDERS = {  # name -> similarity, diversity
    "similarity 0": (0.0, 0.0),
    "similarity 0.5": (0.5, 0.0),
    "similarity 1": (1.0, 0.0),
    "diversity 0.5": (1.0, 0.5),
    "diversity 1": (1.0, 1.0),
}


@dataclass(frozen=True)
class Case:
    """One folder of the bench's layout: who, where, and the prompt; `world` is what the drawing knows."""

    folder: Path
    prompt: str
    bboxes: np.ndarray  # (P, 4) xyxy pixels of the target
    names: tuple[str, ...]
    world: dict

    @classmethod
    def read(cls, folder: Path) -> Case:
        meta = json.loads((folder / "meta.json").read_text())
        names = tuple(str(name) for name in meta["names"])
        return cls(folder, meta["prompt"], np.array(meta["bboxes"], np.float32), names, meta["world"])

    @property
    def target(self) -> np.ndarray:
        return np.asarray(Image.open(self.folder / "ori.jpg").convert("RGB"))

    @property
    def references(self) -> list[Image.Image]:
        paths = [self.folder / f"ref_{number + 1}.jpg" for number in range(len(self.names))]
        return [Image.open(path).convert("RGB") for path in paths]


def read_cases(folder: Path) -> list[Case]:
    """All cases of a folder, by name."""
    cases = [Case.read(path.parent) for path in sorted(folder.glob("*/meta.json"))]
    if not cases:
        raise ValueError(
            f"`cases`: no */meta.json under {folder}; make some with `python -m withanyone.mini cases`"
        )
    return cases


# ---- making pictures -----------------------------------------------------------------------------


@cache
def _pipeline(model: str) -> WithAnyonePipeline:
    torch.set_num_threads(1)
    pipe = WithAnyonePipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _make(job: tuple[Path, str, Case, dict | None, int]) -> None:
    """One picture to `path` (settings None: the base alone), unless it is there."""
    path, model, case, settings, seed = job
    if path.exists():
        return
    size = Image.open(case.folder / "ori.jpg").size
    given = {} if settings is None else {"faces": case.references, "bboxes": case.bboxes.tolist(), **settings}
    generator = torch.Generator().manual_seed(seed)
    out = _pipeline(model)(case.prompt, width=size[0], height=size[1], generator=generator, **given)
    aside = path.with_suffix(".aside.png")
    out.images[0].save(aside)
    aside.replace(path)


def settings_name(model: str, settings: dict | None) -> str:
    """The folder of a variant's pictures: settings that give the same pictures have the same.

    At both scales 0 the pipeline gives the base's picture bit for bit, so the base alone is that place.
    """
    if settings is None:
        return BASE
    defaults = WithAnyonePipeline.load_config(model)["sampling_defaults"]
    settings = {
        name: settings.get(name, defaults.get(name))
        for name in ("id_scale", "siglip_scale", "num_candidates", *sorted(settings))
    }
    if settings["num_candidates"] in (None, 1):
        del settings["num_candidates"]
    if settings["id_scale"] == settings["siglip_scale"] == 0:
        return BASE
    return "_".join(f"{name}-{value:g}" for name, value in settings.items())


def make_pictures(
    model: str, cases: Sequence[Case], out: Path, variants: dict[str, dict | None], workers: int = 2
) -> dict[str, Path]:
    """A picture of every case in every variant, at the case's seed; goes on where it stopped.

    Returns each variant's folder, which holds <case>.png; variants of the same settings share one.
    """
    folders = {name: out / settings_name(model, settings) for name, settings in variants.items()}
    different = {folder: variants[name] for name, folder in folders.items()}
    jobs = []
    for folder, settings in different.items():
        folder.mkdir(parents=True, exist_ok=True)
        jobs += [
            (folder / f"{case.folder.name}.png", model, case, settings, seed)
            for seed, case in enumerate(cases)
        ]
    start = time.monotonic()
    with ProcessPoolExecutor(workers) as pool:
        for done, _ in enumerate(pool.map(_make, jobs, chunksize=4), 1):
            if done % 50 == 0:
                left = (time.monotonic() - start) / done * (len(jobs) - done)
                logger.info("%d of %d pictures, %.0f s left", done, len(jobs), left)
    return folders


# ---- measuring faces -----------------------------------------------------------------------------


@torch.no_grad()
def embed(recognizer: Recognizer, image: np.ndarray, kps: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8, (K, 5, 2) -> (K, 512) raw embeddings of the aligned faces."""
    if len(kps) == 0:
        return np.empty((0, 512), np.float32)
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1).float().div(127.5).sub(1)  # (3, H, W)
    marks = torch.as_tensor(np.asarray(kps), dtype=torch.float32)
    aligned = align_face(pixels.expand(len(marks), -1, -1, -1), marks)  # (K, 3, 112, 112)
    return recognizer(aligned).numpy()


@dataclass(frozen=True)
class Found:
    """Faces of one picture: boxes (K, 4), their embeddings by judge and coach (K, 512), and how their crops
    look to the pipeline's image encoder (K, C)."""

    bboxes: np.ndarray
    judge: np.ndarray
    coach: np.ndarray
    look: np.ndarray


class Eyes:
    """The detector, both recognisers and the readers, loaded once."""

    def __init__(self, model: str) -> None:
        torch.set_num_threads(1)
        self.pipe = _pipeline(model)
        self.judge = Recognizer.from_onnx(JUDGE) if JUDGE.exists() else None
        self.readers = reader.load_readers()

    @torch.no_grad()
    def find(self, image: np.ndarray) -> Found:
        faces = self.pipe.face_analyzer.detect(image)
        kps = np.array([face.kps for face in faces]).reshape(-1, 5, 2)
        bboxes = np.array([face.bbox for face in faces]).reshape(-1, 4)
        coach = np.array([face.embedding for face in faces]).reshape(-1, 512)
        judge = np.empty((len(faces), 0)) if self.judge is None else embed(self.judge, image, kps)
        look = np.empty((0, self.pipe.image_encoder.config.hidden_size), np.float32)
        if faces:
            look = self.pipe.encode_faces(faces)[1][0].mean(dim=1).numpy()  # (K, T, C) -> (K, C)
        return Found(bboxes, judge, coach, look)

    def read(
        self, image: np.ndarray, bboxes: Sequence[Sequence[float]], count: int
    ) -> list[dict[str, str | None]]:
        """What the picture shows of `count` people, in the given boxes, scene and light included.

        Where there are fewer boxes than people, nothing but scene and light is read of the others.
        """
        whole = self.readers["picture"].read([reader.picture_view(image)])[0]
        squares = [reader.person_crop(image, bbox) for bbox in bboxes]
        people = self.readers["person"].read(squares)
        people += [dict.fromkeys(self.readers["person"].attributes)] * (count - len(people))
        return [whole | person for person in people]


@dataclass(frozen=True)
class Truth:
    """What a case's own pictures show: the faces of its target and of each person's reference."""

    target: Found
    in_target: np.ndarray  # (P,) which face of the target is person i's, or -1
    references: tuple[Found, ...]

    @classmethod
    def of(cls, eyes: Eyes, case: Case) -> Truth:
        target = eyes.find(case.target)
        references = tuple(eyes.find(np.asarray(reference)) for reference in case.references)
        return cls(target, metrics.match_boxes(target.bboxes, case.bboxes), references)


def left_to_right(found: np.ndarray, count: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Who is who where nobody was given a place: faces (K, 4) in the caption's order.

    Which face is person i's, or -1, (count,), and the boxes of those that are there.
    """
    order = np.argsort(found[:, 0])[:count]
    return np.concatenate([order, np.full(count - len(order), -1)]).astype(int), list(found[order])


def score_picture(
    eyes: Eyes, case: Case, truth: Truth, picture: np.ndarray, placed: bool = True
) -> list[dict]:
    """One row for each expected person of one picture; what is missing is None and counted by `summarize`.

    placed: people stand in the case's boxes; else, as in the base's own pictures, from left to right.
    """
    made = eyes.find(picture)
    if placed:
        in_made, boxes = metrics.match_boxes(made.bboxes, case.bboxes), list(case.bboxes)
    else:
        in_made, boxes = left_to_right(made.bboxes, len(case.names))
    shown = eyes.read(picture, boxes, len(case.names))
    rows = []
    for person, name in enumerate(case.names):
        at, reference = truth.in_target[person], truth.references[person]
        row: dict = {
            "case": case.folder.name,
            "name": name,
            "found": bool(in_made[person] >= 0),
            "target_found": bool(at >= 0 and len(reference.bboxes)),
            "extra_faces": max(0, len(made.bboxes) - len(case.names)),
            "right_number": len(made.bboxes) == len(case.names),
            "read": shown[person],
            "asked": case.world["target"][person] | {key: case.world[key] for key in ("scene", "light")},
            "photo": case.world["references"][person],
        }
        for who in ("judge", "coach"):
            row[f"{who}.generated"] = getattr(made, who)[in_made[person]] if row["found"] else None
            row[f"{who}.target"] = getattr(truth.target, who)[at] if row["target_found"] else None
            row[f"{who}.reference"] = getattr(reference, who)[0] if row["target_found"] else None
        row["look.generated"] = made.look[in_made[person]] if row["found"] else None
        row["look.target"] = truth.target.look[at] if row["target_found"] else None
        rows.append(row)
    return rows


# ---- figures -------------------------------------------------------------------------------------


def _mean(values: np.ndarray, groups: Sequence) -> dict:
    """Mean with its 95 % bootstrap interval over cases, and N."""
    codes = np.unique(np.asarray(groups), return_inverse=True)[1]
    low, high = metrics.bootstrap_interval(values, codes)
    return {
        "mean": round(float(np.mean(values)), 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "n": len(values),
    }


def identity_figures(rows: Sequence[dict], who: str, seed: int = 0) -> dict:
    """Likeness by one recogniser, `who`: "judge" or "coach".

    A missing face counts 0 in sim_gt and sim_ref and as wrong in right_of_200; it has no angle, so
    copy_paste is over found faces. Faces whose target or reference the detector missed have no truth to
    compare with: they are left out of all means and counted as `no_truth`.
    """
    usable = [row for row in rows if row["target_found"]]
    found = [row for row in usable if row["found"]]
    stack = lambda key, of: np.stack([row[f"{who}.{key}"] for row in of])  # noqa: E731
    targets, references = stack("target", usable), stack("reference", usable)
    cases = [row["case"] for row in usable]
    mask = np.array([row["found"] for row in usable])
    sim_gt, sim_ref = np.zeros(len(usable)), np.zeros(len(usable))
    out = {"ceiling": _mean(metrics.sim(targets, references), cases), "no_truth": len(rows) - len(usable)}
    right, strangers, copy = np.zeros(len(usable), bool), np.empty(0), np.empty(0)
    if found:
        generated = stack("generated", found)
        sim_gt[mask] = metrics.sim(generated, targets[mask])
        sim_ref[mask] = metrics.sim(generated, references[mask])
        copy = metrics.copy_paste(generated, targets[mask], references[mask])
        matrix = metrics.similarity_matrix(generated, targets)  # (G, U)
        names = np.array([row["name"] for row in usable])
        other = names[mask][:, None] != names[None]
        strangers = matrix[other]
        rng = np.random.default_rng(seed)
        hits = []
        for k, row in enumerate(np.flatnonzero(mask)):
            crowd = rng.permutation(np.flatnonzero(names != names[row]))[: GALLERY - 1]
            hits.append(matrix[k, row] > matrix[k, crowd].max())
        right[mask] = hits
        out["copy_paste"] = _mean(copy, [row["case"] for row in found])
        out["strangers"] = round(float(strangers.mean()), 4)
    out |= {"sim_gt": _mean(sim_gt, cases), "sim_ref": _mean(sim_ref, cases)}
    out["sim_gt_over_ceiling"] = round(out["sim_gt"]["mean"] / out["ceiling"]["mean"], 4)
    out["right_of_200"] = _mean(right.astype(float), cases)
    out["swapped"] = _swapped_share(found, who)
    return out


def _swapped_share(found: Sequence[dict], who: str) -> dict | None:
    """Share of people in groups whose box holds a face nearer to another person of the picture."""
    by_case: dict[str, list[dict]] = {}
    for row in found:
        by_case.setdefault(row["case"], []).append(row)
    flags, cases = [], []
    for case, people in by_case.items():
        if len(people) > 1:
            made, truth = (
                np.stack([row[f"{who}.{key}"] for row in people]) for key in ("generated", "target")
            )
            flags += metrics.swapped(made, truth).tolist()
            cases += [case] * len(people)
    return _mean(np.array(flags, float), cases) if flags else None


def prompt_figures(rows: Sequence[dict]) -> dict:
    """Share of the asked attributes read back from the pictures, each and over all."""
    cases = [row["case"] for row in rows]
    hits = {
        name: np.array([row["read"][name] == row["asked"][name] for row in rows], float) for name in READ_BACK
    }
    out = {name: _mean(values, cases) for name, values in hits.items()}
    balanced = {
        name: round(
            reader.balanced_accuracy(
                [row["asked"][name] for row in rows], [row["read"][name] for row in rows]
            ),
            4,
        )
        for name in READ_BACK
    }
    return {"accuracy": out, "balanced": balanced, "all": _mean(np.mean(list(hits.values()), axis=0), cases)}


def _by_people(rows: Sequence[dict]) -> dict[str, dict]:
    """Share of the pictures with as many faces as people were asked for: over all, and by their number."""
    right = {row["case"]: row["right_number"] for row in rows}
    people = Counter(row["case"] for row in rows)
    groups = {"all": list(right)} | {
        str(count): [case for case in right if people[case] == count]
        for count in sorted(set(people.values()))
    }
    return {
        name: _mean(np.array([right[case] for case in cases], float), cases) for name, cases in groups.items()
    }


def copied_figures(rows: Sequence[dict]) -> dict:
    """Where photo and prompt disagree: how often the picture shows what the photo shows."""
    out = {}
    for name in COPIED:
        differ = [row for row in rows if row["photo"][name] != row["asked"][name]]
        if differ:
            hits = np.array([row["read"][name] == row["photo"][name] for row in differ], float)
            out[name] = _mean(hits, [row["case"] for row in differ])
    return out


def _faces_distance(rows: Sequence[dict]) -> dict | None:
    """Kernel distance of the faces' looks to those of the targets, 0 where faces are as well drawn: with its
    95 % interval over cases (jackknife: each case left out once), which is wide for less than some hundred
    faces."""

    def distance(some: Sequence[dict]) -> float | None:
        looks = [[row[f"look.{of}"] for row in some] for of in ("generated", "target")]
        made, real = ([look for look in part if look is not None] for part in looks)
        if min(len(made), len(real)) < 2:
            return None
        return metrics.kernel_distance(np.stack(made), np.stack(real))

    cases = sorted({row["case"] for row in rows})
    mean = distance(rows)
    without = [distance([row for row in rows if row["case"] != case]) for case in cases]
    if mean is None or None in without:
        return None
    spread = 1.96 * np.sqrt((len(cases) - 1) * np.var(without))
    return {
        "mean": round(mean, 4),
        "low": round(float(mean - spread), 4),
        "high": round(float(mean + spread), 4),
        "n": len(rows),
    }


def summarize(rows: Sequence[dict]) -> dict:
    """All figures of one variant."""
    return {
        "people": len(rows),
        "found": _mean(np.array([row["found"] for row in rows], float), [row["case"] for row in rows]),
        "pictures_with_extra_faces": len({row["case"] for row in rows if row["extra_faces"]}),
        "asked_number_of_faces": _by_people(rows),
        "faces_kernel_distance": _faces_distance(rows),
        # Without a judge's weights there is no figure of the judge, and nothing stands in for it.
        "judge": identity_figures(rows, "judge") if JUDGE.exists() else None,
        "coach": identity_figures(rows, "coach"),
        "prompt": prompt_figures(rows),
        "copied": copied_figures(rows),
    }


@cache
def _eyes(model: str) -> Eyes:
    return Eyes(model)


def _score_case(model: str, folders: Sequence[Path | None], case: Case) -> list[list[dict]]:
    """The case's rows in each folder of pictures; None: of the target itself."""
    eyes = _eyes(model)
    truth = Truth.of(eyes, case)
    paths = [case.folder / "ori.jpg" if f is None else f / f"{case.folder.name}.png" for f in folders]
    pictures = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    return [
        score_picture(eyes, case, truth, picture, placed=folder is None or folder.name != BASE)
        for folder, picture in zip(folders, pictures, strict=True)
    ]


def score(
    model: str, cases: Sequence[Case], folders: dict[str, Path | None], workers: int = 2
) -> dict[str, dict]:
    """Figures of every variant's pictures, None: of the targets; the same folder is scored once."""
    different = list(dict.fromkeys(folders.values()))
    with ProcessPoolExecutor(workers) as pool:
        scored = list(pool.map(partial(_score_case, model, different), cases, chunksize=4))
    figures = {
        folder: summarize([row for case in scored for row in case[k]]) for k, folder in enumerate(different)
    }
    return {name: figures[folder] for name, folder in folders.items()}


def _git_hash() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


# ---- pictures for people -------------------------------------------------------------------------

SHEET_PROMPTS = (
    "a smiling person with short black hair at the beach",
    "a surprised person with long blond hair wearing a beanie in the snow",
    "a person with curly red hair and round glasses in the city at night",
    "a laughing person wearing a straw hat and a green sweater in the garden",
)


def sheet(model: str, cases: Sequence[Case], people: int = 4, scale: int = 2) -> Image.Image:
    """Rows of held-out people: their photo, then four prompts; under them the diversity slider's sweep."""
    pipe, size, gap = _pipeline(model), 128, 6
    cell = size * scale
    columns = 1 + len(SHEET_PROMPTS)
    rows = people + 1
    page = Image.new("RGB", (columns * (cell + gap) + gap, rows * (cell + gap) + 3 * gap), "white")

    def put(image: Image.Image, row: int, column: int) -> None:
        left, top = gap + column * (cell + gap), gap + row * (cell + gap) + (2 * gap if row == people else 0)
        page.paste(image.convert("RGB").resize((cell, cell), Image.Resampling.LANCZOS), (left, top))

    photos = [case.references[0] for case in cases][:people]
    for row, photo in enumerate(photos):
        put(photo, row, 0)
        for column, prompt in enumerate(SHEET_PROMPTS, 1):
            generator = torch.Generator().manual_seed(row)
            put(
                pipe(prompt, faces=[photo], width=size, height=size, generator=generator).images[0],
                row,
                column,
            )
    put(photos[0], people, 0)
    for column, diversity in enumerate((0.0, 0.33, 0.67, 1.0), 1):
        id_scale, siglip_scale = slider_scales(1.0, diversity)
        generator = torch.Generator().manual_seed(0)
        made = pipe(
            SHEET_PROMPTS[0], faces=[photos[0]], width=size, height=size, generator=generator,
            id_scale=id_scale, siglip_scale=siglip_scale, num_candidates=1,
        )  # fmt: skip
        put(made.images[0], people, column)
    ImageDraw.Draw(page).line(
        (gap, people * (cell + gap) + gap, page.width - gap, people * (cell + gap) + gap), "#999"
    )
    return page


def slider_plot(result: dict, out: Path) -> None:
    """Likeness over similarity, and what is copied from the photo over diversity, with 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    who = "judge" if JUDGE.exists() else "coach"

    def draw(axis, positions: Sequence[tuple[float, str]], read, label: str) -> None:
        values = [read(result[name]) for _, name in positions]
        if all(values):
            middle = [value["mean"] for value in values]
            low = [value["mean"] - value["low"] for value in values]
            high = [value["high"] - value["mean"] for value in values]
            axis.errorbar(
                [x for x, _ in positions], middle, yerr=[low, high], marker="o", capsize=3, label=label
            )

    similarity = [(0.0, "similarity 0"), (0.5, "similarity 0.5"), (1.0, "similarity 1")]
    diversity = [(0.0, "similarity 1"), (0.5, "diversity 0.5"), (1.0, "diversity 1")]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    draw(left, similarity, lambda row: row[who]["sim_ref"], "to the photo, Sim(Ref)")
    draw(left, similarity, lambda row: row[who]["sim_gt"], "to the target, Sim(GT)")
    left.set(xlabel="similarity", ylabel=f"cosine by the {who}", title="diversity 0")
    for name in COPIED:
        draw(right, diversity, lambda row, name=name: row["copied"].get(name), name.replace("_", " "))
    right.set(xlabel="diversity", ylabel="share copied from the photo", title="similarity 1", ylim=(0, 1))
    for axis in (left, right):
        axis.legend()
        axis.grid(alpha=0.3)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    plt.close(figure)


# ---- commands ------------------------------------------------------------------------------------


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=str(PRETRAINED), help="pipeline folder")
    parser.add_argument("--count", type=int, default=200, help="number of cases")
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--seed", type=int, default=0, help="seed of the cases")
    parser.add_argument(
        "--cases", type=Path, help="folder of cases (default: made from split, count and seed)"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/mini/evaluate"), help="folder for pictures")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)


def _prepare(args: argparse.Namespace) -> tuple[list[Case], Path]:
    folder = args.cases or args.work / f"cases-{args.split}-{args.count}-{args.seed}"
    if not folder.exists():
        records.write_cases(folder, args.count, args.seed, split=args.split)
    return read_cases(folder)[: args.count], folder


def _write(result: dict, out: Path | None) -> None:
    text = json.dumps(result, indent=1)
    logger.info("%s", text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    _common(parser)
    parser.add_argument("--out", type=Path, help="JSON of the figures")


def _run_evaluate(args: argparse.Namespace) -> None:
    cases, folder = _prepare(args)
    pictures = args.work / f"pictures-{folder.name}"
    variants = {"default": {}, "one candidate": {"num_candidates": 1}, "base": None}
    folders = make_pictures(args.model, cases, pictures, variants, args.workers)
    result = {"cases": len(cases), "split": args.split, "seed": args.seed, "git": _git_hash()}
    # The targets themselves beside them: what the best there is scores, and how well the reader reads.
    result |= score(args.model, cases, folders | {"targets": None}, args.workers)
    asked, alone = (result[name]["prompt"]["all"]["mean"] for name in ("default", "base"))
    result["prompt_following_over_base"] = round(asked / alone, 4)
    _write(result, args.out)


def _run_defaults(args: argparse.Namespace) -> None:
    """Scores what a call's None may mean, by the coach on validation people: the judge chooses nothing."""
    if args.split != "validation":
        raise ValueError(f"`split` is {args.split!r}: nothing is chosen on test people, give validation.")
    cases, folder = _prepare(args)
    variants = {}
    for steps, guidance, min_sigma, position in itertools.product(STEPS, GUIDANCE, MIN_SIGMAS, POSITIONS):
        id_scale, siglip_scale = slider_scales(*position)
        place = f"similarity {position[0]:g}, diversity {position[1]:g}"
        name = f"{steps} steps, true_cfg_scale {guidance:g} down to sigma {min_sigma:g}, {place}"
        variants[name] = {
            "num_inference_steps": steps,
            "true_cfg_scale": guidance,
            "true_cfg_min_sigma": min_sigma,
            "faces_in_negative": False,
            "id_scale": id_scale,
            "siglip_scale": siglip_scale,
            "num_candidates": 1,
        }
    folders = make_pictures(args.model, cases, args.work / f"pictures-{folder.name}", variants, args.workers)
    result: dict = {"cases": len(cases), "split": args.split, "seed": args.seed, "git": _git_hash()}
    for name, figures in score(args.model, cases, folders, args.workers).items():
        likeness = figures["coach"]
        result[name] = {
            "found": figures["found"],
            "faces_kernel_distance": figures["faces_kernel_distance"],
            "sim_gt": likeness["sim_gt"],
            "right_of_200": likeness["right_of_200"],
            "copy_paste": likeness["copy_paste"],
            "prompt": figures["prompt"]["all"],
        }
    _write(result, args.out)


def _add_sliders(parser: argparse.ArgumentParser) -> None:
    _add_evaluate(parser)
    parser.add_argument("--plot", type=Path, default=Path("figures/sliders.png"))


def _run_sliders(args: argparse.Namespace) -> None:
    cases, folder = _prepare(args)
    pictures = args.work / f"pictures-{folder.name}"
    variants: dict[str, dict | None] = {}
    for name, position in SLIDERS.items():
        id_scale, siglip_scale = slider_scales(*position)
        # One candidate: what the sliders do, not what a choice by likeness makes of it.
        variants[name] = {"id_scale": id_scale, "siglip_scale": siglip_scale, "num_candidates": 1}
    folders = make_pictures(args.model, cases, pictures, variants, args.workers)
    result = {"cases": len(cases), "split": args.split, "seed": args.seed, "git": _git_hash()}
    result |= score(args.model, cases, folders, args.workers)
    _write(result, args.out)
    slider_plot(result, args.plot)


def _add_sheet(parser: argparse.ArgumentParser) -> None:
    _common(parser)
    parser.add_argument("--out", type=Path, default=Path("figures/people.png"))


def _run_sheet(args: argparse.Namespace) -> None:
    cases, _ = _prepare(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sheet(args.model, [case for case in cases if len(case.names) == 1]).save(args.out)


COMMANDS = {
    "evaluate": (_add_evaluate, _run_evaluate),
    "defaults": (_add_evaluate, _run_defaults),
    "sliders": (_add_sliders, _run_sliders),
    "people": (_add_sheet, _run_sheet),
}
