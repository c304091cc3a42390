"""From pictures to rows: what every judge says about a method's pictures, case by case.

`score_case` is the whole of it for one case. `score_cases` runs it over all cases in several processes, keeps
a row a case on disk, and goes on where it stopped: a row is used again only if case, pictures, judges and
settings are those it was made from. Detections, embeddings and features are kept by the picture's pixels, so
targets and references are looked at once, however many methods and slider positions are scored.

A row is a plain dict:

    case, fingerprint, subset, num_persons, names
    pictures    one entry a picture of the method (several seeds give several, a missing one gives one):
        file, seed, faces_found, extra_faces
        values      {clip_i, clip_t, aesthetic}: whole-picture values
        blending    {recogniser: value}, two and more assigned people only
        people      one entry a person, in the references' order:
            found           a face is assigned to the person
            truth           target and reference both show the person's face
            in_box          a face stands in the person's box (None where the case has no boxes)
            swapped         that face is nearer to another person of the case (None where it cannot be told)
            scores          {recogniser: {sim_gt, sim_ref, copy_paste, ceiling, sim_gt_in_box}}, as far as
                            they are defined
            pose, pose_target, pose_reference   [yaw, roll] read off the landmarks
            read, asked, target, reference      attribute values, where a judge knows the world
    problems    [[kind, message], ...]: what was missing, in words
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from ..faces import Face
from ..photos import load_image
from . import metrics
from .cases import SEED_MARK, Case, CaseError, Cases, check_pictures, picture_paths
from .judges import Panel, Truth, load_panel

logger = logging.getLogger(__name__)

#: Part of every row's key: raise it when a row would come out differently.
SCORING_VERSION = 2


@dataclass(frozen=True)
class Settings:
    """What scoring depends on beside cases, pictures and judges."""

    eps: float = 1e-6  # radians, in copy-paste's denominator
    box_iou: float = 0.3  # a detected face stands in a person's box from this overlap on
    min_yaw_change: float = 0.15  # target and photo differ in pose from here on (distances between the eyes)

    @classmethod
    def of(cls, result: dict) -> Settings:
        """Those that a results.json was scored with; what else stands beside them there is left out."""
        known = {name: v for name, v in result["settings"].items() if name in cls.__dataclass_fields__}
        return cls(**known)


DEFAULTS = Settings()


# ---- what was seen in a picture --------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """Faces of one picture, largest first: boxes (K, 4), landmarks (K, 5, 2), {recogniser: (K, D)}."""

    size: tuple[int, int]  # width, height
    bboxes: np.ndarray
    kps: np.ndarray
    embeddings: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.bboxes)


def panel_embedding(seen: Seen, judges: Sequence[str], faces: Sequence[int]) -> np.ndarray:
    """(K, sum D): unit embeddings of all judges side by side. The cosine of two such rows is the mean of the
    judges' cosines, so one assignment serves all judges."""
    parts = []
    for name in judges:
        part = np.asarray(seen.embeddings[name], np.float64)[list(faces)]
        parts.append(part / np.linalg.norm(part, axis=1, keepdims=True))
    return np.concatenate(parts, axis=1)


class Memory:
    """Detections and features on disk, by the picture's pixels and the judges' versions."""

    def __init__(self, folder: Path, panel: Panel) -> None:
        self.folder, self.panel = Path(folder), panel
        self.computed = 0  # how often something was not there
        recognizers = [judge.name for judge in panel.recognizers]
        self._faces_by = panel.fingerprint("finder", *recognizers)[:16]
        self._features_by = {judge.name: panel.fingerprint(judge.name)[:16] for judge in panel.pictures}

    def faces(self, image: np.ndarray) -> Seen:
        """The faces of (H, W, 3) uint8, with the embeddings of all recognisers."""

        def look() -> dict[str, np.ndarray]:
            found: list[Face] = self.panel.finder.analyzer.detect(image)
            out = {
                "bboxes": np.array([face.bbox for face in found], np.float32).reshape(-1, 4),
                "kps": np.array([face.kps for face in found], np.float32).reshape(-1, 5, 2),
            }
            for judge in self.panel.recognizers:
                rows = judge.embed(image, found) if found else np.empty((0, 1))
                out[f"by {judge.name}"] = np.asarray(rows, np.float32)
            return out

        kept = self._keep(self._faces_by, image, look)
        embeddings = {judge.name: kept[f"by {judge.name}"] for judge in self.panel.recognizers}
        return Seen((image.shape[1], image.shape[0]), kept["bboxes"], kept["kps"], embeddings)

    def features(self, judge, image: np.ndarray) -> np.ndarray:
        """A picture judge's features of (H, W, 3) uint8."""
        kept = self._keep(
            self._features_by[judge.name],
            image,
            lambda: {"features": np.asarray(judge.features(Image.fromarray(image)), np.float32)},
        )
        return kept["features"]

    def _keep(
        self, by: str, image: np.ndarray, compute: Callable[[], dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        digest = hashlib.sha256(str(image.shape).encode() + np.ascontiguousarray(image).tobytes()).hexdigest()
        path = self.folder / by / digest[:2] / f"{digest}.npz"
        kept = read_arrays(path)
        if kept is None:
            self.computed += 1
            kept = compute()
            write_arrays(path, kept)
        return kept


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """What `write_arrays` wrote; None where there is no file, or a damaged one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """A file that is there whole or not at all, whenever the process is stopped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    with aside.open("wb") as file:
        np.savez(file, **arrays)
    aside.replace(path)


# ---- one case --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """A case as the judges see it: faces of target and references, one index a person (-1: not found)."""

    target: Seen | None
    target_face: np.ndarray  # (P,)
    references: list[Seen]
    truths: list[Truth] | None
    target_features: dict[str, np.ndarray]

    def has_reference(self, person: int) -> bool:
        return len(self.references[person]) > 0

    def has_truth(self, person: int) -> bool:
        return self.target_face[person] >= 0 and self.has_reference(person)


def look_at_case(case: Case, panel: Panel, memory: Memory, settings: Settings) -> Known:
    """Faces of the case's own pictures: by box where it has boxes, else assigned to the references."""
    references = [memory.faces(photo.pixels) for photo in case.references]
    truths = next((truth for judge in panel.attributes if (truth := judge.truth(case)) is not None), None)
    target_face = np.full(case.num_persons, -1, np.int64)
    if case.target is None:
        return Known(None, target_face, references, truths, {})
    pixels = case.target.pixels
    target = memory.faces(pixels)
    if case.bboxes is not None:
        target_face = metrics.match_boxes(target.bboxes, case.bboxes, settings.box_iou)
    elif len(target):
        people = [person for person, seen in enumerate(references) if len(seen)]
        if people:
            wanted = np.concatenate([panel_embedding(references[p], panel.scoring, [0]) for p in people])
            found = panel_embedding(target, panel.scoring, range(len(target)))
            for row, column in zip(*metrics.assign_faces(found, wanted), strict=True):
                target_face[people[column]] = row
    features = {judge.name: memory.features(judge, pixels) for judge in panel.pictures}
    return Known(target, target_face, references, truths, features)


Vectors = dict[str, np.ndarray]


def score_case(
    case: Case, pictures: Sequence[Path], panel: Panel, memory: Memory, settings: Settings = DEFAULTS
) -> tuple[dict, Vectors]:
    """The row of one case (see the module), and its faces as vectors for figures across cases.

    Without pictures every person counts as not found. Vectors: `generated` (M pictures, P people, D) and
    `target` (P, D), the scoring judges' unit embeddings side by side; NaN where there is no face.
    """
    known = look_at_case(case, panel, memory, settings)
    problems: list[list[str]] = []
    for person in range(case.num_persons):
        if not known.has_reference(person):
            problems.append(["no face in reference", f"case {case.name}: ref_{person + 1} shows no face"])
        if known.target is not None and known.target_face[person] < 0:
            problems.append(["no face in target", f"case {case.name}: person {person + 1} is not found"])
    entries: list[dict] = []
    generated: list[np.ndarray] = []

    def add(path: Path | None, pixels: np.ndarray | None) -> None:
        made = None if pixels is None else memory.faces(pixels)
        face_of = _assign(known, made, panel.scoring, case.num_persons)
        entries.append(_score_picture(case, known, path, pixels, made, face_of, panel, memory, settings))
        generated.append(_vectors(made, face_of, panel.scoring))

    for path in pictures:
        try:
            pixels = np.asarray(load_image(path, path.name))
        except (ValueError, OSError) as error:
            problems.append(["picture unreadable", f"case {case.name}: {error}"])
            pixels = None
        add(path, pixels)
    if not pictures:
        problems.append(["picture missing", f"case {case.name}: the method has no picture of it"])
        add(None, None)
    for entry in entries:
        if entry["file"] is not None and entry["faces_found"] == 0:
            problems.append(["no face in picture", f"case {case.name}: no face in {entry['file']}"])
    row = {
        "case": case.name,
        "fingerprint": case.fingerprint()[:16],
        "subset": case.subset,
        "num_persons": case.num_persons,
        "names": None if case.names is None else list(case.names),
        "pictures": entries,
        "problems": problems,
    }
    target = _vectors(known.target, known.target_face, panel.scoring)
    return row, {"generated": _stack(generated), "target": target}


def _vectors(seen: Seen | None, face_of: np.ndarray, judges: Sequence[str]) -> np.ndarray:
    """(P, D) float32, NaN where a person has no face; (P, 0) where nobody has."""
    people = np.flatnonzero(face_of >= 0)
    if seen is None or not len(people):
        return np.empty((len(face_of), 0), np.float32)
    rows = panel_embedding(seen, judges, face_of[people].tolist())
    out = np.full((len(face_of), rows.shape[1]), np.nan, np.float32)
    out[people] = rows
    return out


def _stack(parts: list[np.ndarray]) -> np.ndarray:
    """(M, P, D) from (P, D) of some pictures and (P, 0) of those without a face."""
    width = max(part.shape[1] for part in parts)
    empty = np.full((len(parts[0]), width), np.nan, np.float32)
    return np.stack([part if part.shape[1] else empty for part in parts])


def _score_picture(
    case: Case,
    known: Known,
    path: Path | None,
    pixels: np.ndarray | None,
    made: Seen | None,
    face_of: np.ndarray,
    panel: Panel,
    memory: Memory,
    settings: Settings,
) -> dict:
    """One entry of a row's `pictures`; `pixels` None: missing or unreadable, nobody is found in it."""
    boxes = None if made is None else _boxes_in(case, known, made.size)
    box_face = np.full(case.num_persons, -1, np.int64)
    if made is not None and boxes is not None:
        box_face = metrics.match_boxes(made.bboxes, boxes, settings.box_iou)
    swaps = _swaps(known, made, box_face, panel.scoring)
    read = None
    if pixels is not None and panel.attributes and known.truths is not None:
        read = panel.attributes[0].read(pixels, _places(made, face_of, box_face, boxes, pixels))
    entry = {
        "file": None if path is None else path.name,
        "seed": None if path is None else _seed_of(path),
        "faces_found": 0 if made is None else len(made),
        "extra_faces": 0 if made is None else max(0, len(made) - case.num_persons),
        "values": _picture_values(case, known, pixels, panel, memory),
        "blending": _blending(known, made, face_of, panel),
        "people": [],
    }
    for person in range(case.num_persons):
        row = {
            "found": bool(face_of[person] >= 0),
            "truth": bool(known.has_truth(person)),
            "in_box": None if case.bboxes is None else bool(box_face[person] >= 0),
            "swapped": swaps.get(person),
            "scores": {
                judge.name: _person_scores(
                    known, made, person, int(face_of[person]), int(box_face[person]), judge.name, settings.eps
                )
                for judge in panel.recognizers
            },
            "pose": _pose(made, int(face_of[person])),
            "pose_target": _pose(known.target, int(known.target_face[person])),
            "pose_reference": _pose(known.references[person], 0 if known.has_reference(person) else -1),
        }
        if known.truths is not None:
            truth = known.truths[person]
            row |= {
                "read": None if read is None else dict(read[person]),
                "asked": dict(truth.asked),
                "target": dict(truth.target),
                "reference": dict(truth.reference),
            }
        entry["people"].append(row)
    return entry


def _boxes_in(case: Case, known: Known, size: tuple[int, int]) -> np.ndarray | None:
    """The case's boxes in a picture of another size (width, height)."""
    if case.bboxes is None or known.target is None:
        return None
    scale = np.array(size, np.float64) / known.target.size
    return case.bboxes * np.tile(scale, 2)


def _assign(known: Known, made: Seen | None, judges: Sequence[str], people: int) -> np.ndarray:
    """(P,) the face of each person, -1: none. By the Hungarian method on the mean cosine to the targets'
    faces, and to the references' where the case has no target."""
    face_of = np.full(people, -1, np.int64)
    if made is None or not len(made):
        return face_of
    wanted, whose = [], []
    for person in range(people):
        if known.target is not None and known.target_face[person] >= 0:
            wanted.append(panel_embedding(known.target, judges, [known.target_face[person]]))
        elif known.has_reference(person):
            wanted.append(panel_embedding(known.references[person], judges, [0]))
        else:
            continue
        whose.append(person)
    if whose:
        found = panel_embedding(made, judges, range(len(made)))
        for row, column in zip(*metrics.assign_faces(found, np.concatenate(wanted)), strict=True):
            face_of[whose[column]] = row
    return face_of


def _swaps(known: Known, made: Seen | None, box_face: np.ndarray, judges: Sequence[str]) -> dict[int, bool]:
    """{person: whether the face in the person's box is nearer to another person of the picture}, for the
    people of groups whose boxes hold a face; needs at least two such people."""
    people = [p for p, face in enumerate(box_face) if face >= 0 and known.has_reference(p)]
    if made is None or len(people) < 2:
        return {}
    faces = panel_embedding(made, judges, [int(box_face[p]) for p in people])
    references = np.concatenate([panel_embedding(known.references[p], judges, [0]) for p in people])
    flags = metrics.swapped(faces, references)
    return {person: bool(flag) for person, flag in zip(people, flags, strict=True)}


def _person_scores(
    known: Known, made: Seen | None, person: int, face: int, box_face: int, judge: str, eps: float
) -> dict[str, float]:
    """One person by one recogniser; what is not defined is left out."""
    out: dict[str, float] = {}
    target = known.target.embeddings[judge][[known.target_face[person]]] if known.has_truth(person) else None
    reference = known.references[person].embeddings[judge][[0]] if known.has_reference(person) else None
    if target is not None:
        out["ceiling"] = _number(metrics.sim(target, reference))
    if made is not None and face >= 0:
        own = made.embeddings[judge][[face]]
        if reference is not None:
            out["sim_ref"] = _number(metrics.sim(own, reference))
        if target is not None:
            out["sim_gt"] = _number(metrics.sim(own, target))
            out["copy_paste"] = _number(metrics.copy_paste(own, target, reference, eps))
    if made is not None and box_face >= 0 and target is not None:
        out["sim_gt_in_box"] = _number(metrics.sim(made.embeddings[judge][[box_face]], target))
    return out


def _blending(known: Known, made: Seen | None, face_of: np.ndarray, panel: Panel) -> dict[str, float]:
    """{recogniser: blending} of the people who have a face here and a reference; {} under two."""
    people = [p for p, face in enumerate(face_of) if face >= 0 and known.has_reference(p)]
    if made is None or len(people) < 2:
        return {}
    out = {}
    for judge in panel.recognizers:
        faces = made.embeddings[judge.name][[int(face_of[p]) for p in people]]
        references = np.concatenate([known.references[p].embeddings[judge.name][[0]] for p in people])
        same = range(len(people))
        out[judge.name] = round(metrics.blending(faces, references, (same, same)), 6)
    return out


def _picture_values(
    case: Case, known: Known, pixels: np.ndarray | None, panel: Panel, memory: Memory
) -> dict[str, float]:
    if pixels is None:
        return {}
    out: dict[str, float] = {}
    for judge in panel.pictures:
        features = memory.features(judge, pixels)
        out |= judge.score(features, known.target_features.get(judge.name), case.prompt)
    return {name: round(value, 6) for name, value in out.items()}


def _places(
    made: Seen | None,
    face_of: np.ndarray,
    box_face: np.ndarray,
    boxes: np.ndarray | None,
    pixels: np.ndarray,
) -> np.ndarray:
    """(P, 4) where to look for each person: at the face in the person's box (the prompt says who stands
    where), else at the face assigned to the person, else in the empty box, else at the whole picture."""
    whole = np.array([0, 0, pixels.shape[1], pixels.shape[0]], np.float64)
    out = []
    for person, (assigned, standing) in enumerate(zip(face_of, box_face, strict=True)):
        face = standing if standing >= 0 else assigned
        if made is not None and face >= 0:
            out.append(made.bboxes[face].astype(np.float64))
        else:
            out.append(whole if boxes is None else boxes[person])
    return np.stack(out)


def _pose(seen: Seen | None, face: int) -> list[float] | None:
    if seen is None or face < 0 or face >= len(seen):
        return None
    return [round(float(value), 6) for value in metrics.pose_of(seen.kps[[face]])[0]]


def _number(values: np.ndarray) -> float:
    return round(float(values[0]), 6)


def _seed_of(path: Path) -> int | None:
    seed = path.stem.rpartition(SEED_MARK)[2]
    return int(seed) if SEED_MARK in path.stem and seed.isdigit() else None


# ---- all cases -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What a worker needs to score any case of a run."""

    cases: Cases
    pictures: str
    judges: tuple[str, ...]
    rows: str
    memory: str
    settings: Settings
    device: str = "cpu"


class Worker:
    """Scores cases of one job; each process has one."""

    def __init__(self, job: Job, panel: Panel | None = None) -> None:
        self.job = job
        self.panel = panel or load_panel(job.judges, device=job.device)
        self.memory = Memory(Path(job.memory), self.panel)
        self._by = self.panel.fingerprint()

    def row(self, index: int) -> tuple[dict, Vectors, bool]:
        """The case's row and vectors, and whether they were there already. CaseError for a broken case."""
        case = self.job.cases[index]
        pictures = picture_paths(self.job.pictures, case.name)
        try:
            key = self._key(case, pictures)
        except OSError as error:
            raise CaseError(case.name, f"a picture of it is gone ({error})") from error
        path = Path(self.job.rows) / f"{case.name}.npz"
        kept = read_arrays(path)
        if kept is not None and str(kept.get("key")) == key and "row" in kept:
            vectors = {name: value for name, value in kept.items() if name not in ("key", "row")}
            return json.loads(str(kept["row"])), vectors, True
        check_pictures(case)
        row, vectors = score_case(case, pictures, self.panel, self.memory, self.job.settings)
        write_arrays(path, {"key": np.array(key), "row": np.array(json.dumps(row)), **vectors})
        return row, vectors, False

    def _key(self, case: Case, pictures: Sequence[Path]) -> str:
        """Of all that a row depends on."""
        files = [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in pictures]
        parts = [SCORING_VERSION, case.fingerprint(), files, self._by, asdict(self.job.settings)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


_worker: Worker | None = None


def _start_worker(job: Job) -> None:
    import torch

    global _worker
    torch.set_num_threads(1)
    logging.getLogger("withanyone").setLevel(logging.ERROR)  # the first process has said it all
    _worker = Worker(job)


def _score_index(index: int) -> tuple[dict | str, Vectors, bool]:
    assert _worker is not None
    return _attempt(_worker, index)


def _attempt(worker: Worker, index: int) -> tuple[dict | str, Vectors, bool]:
    """(row, vectors, was there) or (what is wrong with the case, {}, False)."""
    try:
        return worker.row(index)
    except CaseError as error:
        return str(error), {}, False


@dataclass
class Scored:
    """Rows of the usable cases, what is wrong with the others, and how much of it was there before."""

    rows: list[dict]
    vectors: list[Vectors]  # of each row
    broken: dict[str, str]  # case: what is wrong with it
    kept: int
    seconds: float


def score_cases(
    cases: Cases,
    pictures: str | Path,
    judges: Sequence[str],
    *,
    rows: str | Path,
    memory: str | Path,
    panel: Panel,
    workers: int = 1,
    limit: int | None = None,
    settings: Settings = DEFAULTS,
    device: str = "cpu",
    strict: bool = False,
) -> Scored:
    """Rows of all cases in the cases' order, the same for any number of workers; goes on where it stopped.

    A broken case is left out and named, and the run goes on; with `strict` it stops there. Pictures that are
    missing count as pictures in which nobody is found. rows: a folder of this method's rows; memory: a folder
    that any methods on any cases share. `panel` is what `judges` load to.

    Raises:
        ValueError: `pictures` holds no picture of any case; with `strict`, a broken case.
    """
    folder = Path(pictures)
    count = len(cases) if limit is None else min(limit, len(cases))
    if not any(picture_paths(folder, name) for name in cases.names[:count]):
        raise ValueError(
            f"`pictures` {folder} holds no picture of any of the {count} cases: they are called "
            f"{cases.names[0]}.png (or .jpg, .webp), {cases.names[0]}{SEED_MARK}SEED.png for several seeds, "
            f"or {cases.names[0]}/out.jpg."
        )
    job = Job(cases, str(folder), tuple(judges), str(rows), str(memory), settings, device)
    start = said = time.monotonic()
    scored = Scored([], [], {}, 0, 0.0)
    for done, (row, vectors, was_there) in enumerate(_run(job, panel, count, workers), 1):
        if isinstance(row, str):
            if strict:
                raise ValueError(row)
            logger.warning("left out: %s", row)
            scored.broken[cases.names[done - 1]] = row
        else:
            scored.rows.append(row)
            scored.vectors.append(vectors)
            scored.kept += was_there
        if time.monotonic() - said > 10:
            said = time.monotonic()
            logger.info("%d of %d cases, %.0f s left", done, count, (said - start) / done * (count - done))
    scored.seconds = time.monotonic() - start
    return scored


def _run(job: Job, panel: Panel, count: int, workers: int):
    if workers <= 1:
        worker = Worker(job, panel)
        yield from (_attempt(worker, index) for index in range(count))
        return
    # Fresh processes: forking one that has used torch or onnxruntime may hang.
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(job,)
    ) as pool:
        yield from pool.map(_score_index, range(count), chunksize=4)
