"""The miniature's face pack: commands that train recogniser, detector and judge, and measure them.

    python -m withanyone.mini recognizer      # face_analyzer/recognition.onnx
    python -m withanyone.mini detector        # face_analyzer/detection.onnx
    python -m withanyone.mini judge           # judges/recognition.onnx
    python -m withanyone.mini faces-figures   # pretrained/figures/faces.json

Each command renders what it needs, trains, and exports; stopped at any point, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arcface import Recognizer as OnnxRecognizer
from ..bench.metrics import box_iou
from ..faces import FaceAnalyzer
from .detection import (
    DetectionCount,
    DetectorSettings,
    FaceDetector,
    evaluate,
    export_detector,
    train_detector,
)
from .faceset import FaceBank, FaceSet, Scene, crops_of_shard, scenes_of_shard, trait_rows
from .parts import RUNS
from .pictures import render_shard
from .recognition import (
    JudgeRecognizer,
    PairCosines,
    Recognizer,
    RecognizerSettings,
    centre_faces,
    embed_crops,
    export_recognizer,
    rank_one,
    train_recognizer,
)
from .world import RANGES

logger = logging.getLogger(__name__)

PACK = Path(__file__).parent / "pretrained" / "face_analyzer"
JUDGE = Path(__file__).parent / "judges" / "recognition.onnx"
FIGURES = Path(__file__).parent / "pretrained" / "figures" / "faces.json"

PACK_SETTINGS = {"pack": "withanyone-mini", "det_size": [[256, 256]], "det_thresh": 0.75, "crop_size": 112,
                 "enlarge": True}  # fmt: skip

RECOGNIZER = RecognizerSettings(steps=2000, loss="cosface", scale=32.0, margin=0.35, seed=0)
JUDGE_TRAINING = RecognizerSettings(steps=3000, loss="arcface", scale=24.0, margin=0.3, seed=1)
DETECTOR = DetectorSettings(steps=6000)

VALIDATION_IDENTITIES, VALIDATION_ROUNDS = 200, 6
OTHER_PEOPLE = 8000  # whom the training people are told apart from


def _validation(runs: Path, workers: int) -> FaceSet:
    faces = FaceSet(runs / "faces" / "validation", "validation", VALIDATION_IDENTITIES)
    faces.render(VALIDATION_ROUNDS, picture_rounds=VALIDATION_ROUNDS, workers=workers)
    return faces


@dataclass(frozen=True)
class TrainingPictures:
    """What is rendered to learn from: rounds of a `FaceSet` and shards of the base's pictures.

    The first `shards` are there from the start; every `steps_a_shard` steps one more joins, up to
    `last_shard`.
    """

    split: str
    identities: int
    rounds: int
    shards: int
    last_shard: int = 0
    steps_a_shard: int = 1

    def faceset(self, args: argparse.Namespace) -> FaceSet:
        faces = FaceSet(args.runs / "faces" / self.split, self.split, self.identities)
        faces.render(self.rounds, picture_rounds=self.rounds, workers=args.workers)
        return faces

    def shard_path(self, args: argparse.Namespace, number: int) -> Path:
        return render_shard(args.runs / "pictures", number, self.split)

    def bank_at(self, args: argparse.Namespace) -> Callable[[int], FaceBank]:
        """Step -> faces, rendering what is missing."""
        rounds = self.faceset(args).folders(self.rounds)
        crops = args.runs / "faces" / "shards"

        @lru_cache(maxsize=1)
        def bank(shards: int) -> FaceBank:
            numbers = range(shards)
            return FaceBank([*rounds, *(crops_of_shard(self.shard_path(args, n), crops) for n in numbers)])

        def bank_at(step: int) -> FaceBank:
            grown = self.shards + step // self.steps_a_shard
            return bank(max(self.shards, min(self.last_shard, grown)))

        return bank_at

    def scenes(self, args: argparse.Namespace) -> list[Scene]:
        scenes = self.faceset(args).scenes(self.rounds)
        for number in range(self.shards):
            scenes += scenes_of_shard(self.shard_path(args, number))
        return scenes


RECOGNIZER_PICTURES = TrainingPictures("train", 1500, rounds=2, shards=9, last_shard=16, steps_a_shard=160)
DETECTOR_PICTURES = TrainingPictures("train", 1500, rounds=2, shards=8)
JUDGE_PICTURES = TrainingPictures("judge", 1500, rounds=8, shards=0)


def _add_arguments(
    parser: argparse.ArgumentParser, steps: int, name: str, pictures: TrainingPictures
) -> None:
    parser.add_argument("--steps", type=int, default=steps, help="training steps in all (%(default)s)")
    parser.add_argument("--rounds", type=int, default=pictures.rounds, help="rounds of faces (%(default)s)")
    shards = pictures.shards
    parser.add_argument("--shards", type=int, default=shards, help="picture shards at first (%(default)s)")
    parser.add_argument("--runs", type=Path, default=RUNS, help="checkpoints and renderings")
    parser.add_argument("--name", default=name, help="folder of this run's checkpoint in --runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="processes that render rounds")


def _train(
    args: argparse.Namespace,
    model: nn.Module,
    pictures: TrainingPictures,
    settings: RecognizerSettings,
    out: Path,
) -> None:
    torch.set_num_threads(args.threads)
    validation = FaceBank(_validation(args.runs, args.workers).folders(VALIDATION_ROUNDS))
    bank_at = replace(pictures, rounds=args.rounds, shards=args.shards).bank_at(args)
    rng = np.random.default_rng(settings.seed)
    others = trait_rows(rng.choice(RANGES[pictures.split], OTHER_PEOPLE, replace=False))
    settings = replace(settings, steps=args.steps)
    train_recognizer(model, bank_at, others, validation, args.runs / args.name, settings)
    embedded = embed_crops(model, validation[np.arange(len(validation))])
    pairs = PairCosines.of(embedded, validation.identities)
    logger.info("validation: %s", pairs.figures(pairs.best_threshold()))
    logger.info("written: %s", export_recognizer(model, out))


def add_recognizer_arguments(parser: argparse.ArgumentParser) -> None:
    _add_arguments(parser, RECOGNIZER.steps, "recognizer", RECOGNIZER_PICTURES)


def run_recognizer(args: argparse.Namespace) -> None:
    """Trains and exports the recogniser."""
    torch.manual_seed(RECOGNIZER.seed)
    _train(args, Recognizer(), RECOGNIZER_PICTURES, RECOGNIZER, PACK / "recognition.onnx")
    write_pack_settings()


def add_judge_arguments(parser: argparse.ArgumentParser) -> None:
    _add_arguments(parser, JUDGE_TRAINING.steps, "judge", JUDGE_PICTURES)


def run_judge(args: argparse.Namespace) -> None:
    """Trains and exports the judge: another network, loss and seed, other people and pictures."""
    torch.manual_seed(JUDGE_TRAINING.seed)
    _train(args, JudgeRecognizer(), JUDGE_PICTURES, JUDGE_TRAINING, JUDGE)


def add_detector_arguments(parser: argparse.ArgumentParser) -> None:
    _add_arguments(parser, DETECTOR.steps, "detector", DETECTOR_PICTURES)


def run_detector(args: argparse.Namespace) -> None:
    """Trains and exports the detector."""
    torch.set_num_threads(args.threads)
    validation = _validation(args.runs, args.workers).scenes(VALIDATION_ROUNDS)
    scenes = replace(DETECTOR_PICTURES, rounds=args.rounds, shards=args.shards).scenes(args)
    torch.manual_seed(DETECTOR.seed)
    settings = replace(DETECTOR, steps=args.steps)
    detector = train_detector(FaceDetector(), scenes, validation, args.runs / args.name, settings)
    for threshold in (0.5, 0.6, 0.75, 0.9):
        figures = evaluate(detector, validation, 256, threshold)
        logger.info("validation, threshold %.1f: %s", threshold, figures)
    logger.info("written: %s", export_detector(detector, PACK / "detection.onnx"))
    write_pack_settings()


def write_pack_settings() -> None:
    """Writes `face_analyzer.json` beside the models."""
    PACK.mkdir(parents=True, exist_ok=True)
    (PACK / "face_analyzer.json").write_text(json.dumps(PACK_SETTINGS, indent=2) + "\n")


# ---- figures on test identities


def bootstrap(values: np.ndarray, statistic: Callable[[np.ndarray], float], seed: int = 0) -> list[float]:
    """95 % interval of a statistic of values (N, ...), resampled 1,000 times along the first axis."""
    rng = np.random.default_rng(seed)
    draws = [statistic(values[rng.integers(0, len(values), len(values))]) for _ in range(1000)]
    return [round(float(q), 4) for q in np.quantile(draws, (0.025, 0.975))]


def share_interval(hits: int, count: int) -> list[float]:
    """95 % interval of a share (Wilson)."""
    z, share = 1.96, hits / count
    centre = share + z * z / (2 * count)
    half = z * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return [round(float((centre - half) / scale), 4), round(float((centre + half) / scale), 4)]


def recognition_figures(embeddings: Tensor, identities: np.ndarray, threshold: float) -> dict[str, object]:
    """Verification at a threshold chosen elsewhere, cosines, rank one; intervals by bootstrap over people."""
    figures: dict[str, object] = dict(PairCosines.of(embeddings, identities).figures(threshold))
    unit = F.normalize(embeddings.float(), dim=1)
    cosines = (unit @ unit.T).numpy()
    same = identities[:, None] == identities[None]
    off = ~np.eye(len(identities), dtype=bool)
    rows, owns = [], []
    for person in np.unique(identities):
        mine = identities == person
        own, others = cosines[mine][(same & off)[mine]], cosines[mine][~same[mine]]
        if len(own):  # a person of one found face has no pair
            rows.append((np.mean(own > threshold), np.mean(others <= threshold)))
            owns.append(own)
    figures["verification_interval"] = bootstrap(np.array(rows), lambda shares: float(shares.mean()))
    figures["same_person_median_interval"] = bootstrap(
        np.arange(len(owns)), lambda drawn: float(np.median(np.concatenate([owns[i] for i in drawn])))
    )
    figures["rank_one"] = round(rank_one(embeddings, identities), 4)
    figures["identities"] = len(rows)
    figures["faces"] = len(identities)
    return figures


def add_figures_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--identities", type=int, default=500, help="test people")
    parser.add_argument("--rounds", type=int, default=3, help="pictures of each of them")
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=FIGURES)


def run_figures(args: argparse.Namespace) -> None:
    """Measures recogniser, judge and detector, as shipped, on people never trained on."""
    torch.set_num_threads(args.threads)
    analyzer = FaceAnalyzer.from_pretrained(PACK)
    validation, identities = _validation(args.runs, args.workers).faces(VALIDATION_ROUNDS)
    faces = FaceSet(args.runs / "faces" / "test", "test", args.identities)
    faces.render(args.rounds, picture_rounds=args.rounds, workers=args.workers)
    crops, labels = faces.faces(args.rounds)

    def coach(crops: np.ndarray) -> Tensor:
        inner = ((centre_faces(crops).permute(0, 2, 3, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
        return torch.from_numpy(analyzer.embed(list(inner)))

    figures: dict[str, object] = {
        "command": "python -m withanyone.mini faces-figures "
        f"--identities {args.identities} --rounds {args.rounds}",
        "people": "test range, never trained on; thresholds chosen on validation people",
    }
    embedders = {"recognizer": coach}
    if JUDGE.exists():
        judge = OnnxRecognizer.from_onnx(JUDGE)
        embedders["judge"] = lambda crops: embed_crops(judge, crops)
    else:
        logger.warning("%s is missing: train it with the command `judge` to have its figures", JUDGE)
    thresholds = {}
    for name, embed in embedders.items():
        thresholds[name] = PairCosines.of(embed(validation), identities).best_threshold()
        figures[name] = recognition_figures(embed(crops), labels, thresholds[name])
        logger.info("%s: %s", name, figures[name])

    count = DetectionCount()
    found_embeddings, found_labels = [], []
    for scene, people in zip(faces.scenes(args.rounds), faces.people(args.rounds), strict=True):
        found = sorted(analyzer.detect(scene.image), key=lambda face: -face.det_score)
        bboxes = np.array([face.bbox for face in found]).reshape(-1, 4)
        count.add(scene.bboxes, scene.kps, bboxes, np.array([face.kps for face in found]).reshape(-1, 5, 2))
        for face in found:
            overlaps = box_iou(face.bbox, scene.bboxes)[0] if len(people) else np.zeros(1)
            if overlaps.max() > 0.5:
                found_embeddings.append(face.embedding)
                found_labels.append(people[overlaps.argmax()])
    figures["detector"] = {
        **count.figures(),
        "recall_interval": share_interval(count.found, count.faces),
        "pictures_with_false_face_interval": share_interval(count.pictures_with_false, count.pictures),
        "kps_error_median_interval": bootstrap(np.array(count.kps_errors), lambda e: float(np.median(e))),
        "smallest_face_px": 24,
        "iou": 0.5,
    }
    logger.info("detector: %s", figures["detector"])
    embeddings = torch.from_numpy(np.stack(found_embeddings))
    figures["recognizer_on_detected_faces"] = recognition_figures(
        embeddings, np.array(found_labels), thresholds["recognizer"]
    )
    logger.info("recogniser on detected faces: %s", figures["recognizer_on_detected_faces"])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(figures, indent=2) + "\n")
    logger.info("written: %s", args.out)


Command = tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None]]

COMMANDS: dict[str, Command] = {
    "recognizer": (add_recognizer_arguments, run_recognizer),
    "detector": (add_detector_arguments, run_detector),
    "judge": (add_judge_arguments, run_judge),
    "faces-figures": (add_figures_arguments, run_figures),
}
