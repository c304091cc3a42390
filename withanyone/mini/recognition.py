"""The miniature's face recognisers: two networks of different build, their training, figures and ONNX export.

`Recognizer` gives the embedding that tokens, losses and selection use; `JudgeRecognizer` is of another build
(fused inverted residuals), trained with another loss on other identities, and only ever scores.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from withanyone.precision import autocast

from .faceset import CROP_SIZE, FACE_SIZE, FaceBank, mirrored_traits
from .loop import TrainingLoop, learning_rate, step_rng
from .muon import MuonAdamW, hidden_matrices

logger = logging.getLogger(__name__)

EMBEDDING_DIM = 512


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """x + two 3 x 3 convolutions of x."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _conv(channels, channels)
        self.second = _conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


class FusedInvertedResidual(nn.Module):
    """3 x 3 widening, 1 x 1 narrowing (EfficientNetV2, arXiv:2104.00298); the sum where shapes allow."""

    def __init__(self, inputs: int, outputs: int, hidden: int, stride: int = 1) -> None:
        super().__init__()
        self.widen = _conv(inputs, hidden, 3, stride)
        self.narrow = _conv(hidden, outputs, 1)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.narrow(F.relu(self.widen(x)))
        return x + y if self.residual else y


class EmbeddingHead(nn.Module):
    """(B, C, 7, 7) -> (B, 512): a weight for every place of every channel, then a linear map."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.widen = _conv(channels, width, 1)
        places = nn.Conv2d(width, width, 7, groups=width, bias=False)
        self.places = nn.Sequential(places, nn.BatchNorm2d(width))
        self.project = nn.Linear(width, EMBEDDING_DIM, bias=False)
        self.norm = nn.BatchNorm1d(EMBEDDING_DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = self.places(F.relu(self.widen(x)))  # (B, width, 1, 1)
        return self.norm(self.project(x.flatten(1)))  # (B, 512)


class Recognizer(nn.Module):
    """Aligned faces (B, 3, 112, 112), RGB in [-1, 1] -> raw embeddings (B, 512)."""

    def __init__(self, channels: Sequence[int] = (32, 64, 128), depths: Sequence[int] = (1, 2, 2)) -> None:
        super().__init__()
        stem = nn.Conv2d(3, channels[0], 7, 4, 3, bias=False)
        layers: list[nn.Module] = [stem, nn.BatchNorm2d(channels[0]), nn.ReLU()]
        for index, (width, depth) in enumerate(zip(channels, depths, strict=True)):
            if index:
                layers += [_conv(channels[index - 1], width, 3, 2), nn.ReLU()]
            layers += [Residual(width) for _ in range(depth)]
        self.body = nn.Sequential(*layers)  # (B, C, 7, 7)
        self.head = EmbeddingHead(channels[-1], 384)

    def forward(self, faces: Tensor) -> Tensor:
        return self.head(self.body(faces))


class JudgeRecognizer(nn.Module):
    """As `Recognizer`, of another build: patches of 4 x 4 px, fused inverted residuals, one dense layer."""

    def __init__(self, channels: Sequence[int] = (32, 64, 96), depths: Sequence[int] = (1, 2, 2)) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels[0], 4, 4, bias=False), nn.BatchNorm2d(channels[0])]
        before = channels[0]
        for index, (width, depth) in enumerate(zip(channels, depths, strict=True)):
            if index:
                layers.append(FusedInvertedResidual(before, width, 2 * width, 2))
            layers += [FusedInvertedResidual(width, width, 2 * width) for _ in range(depth)]
            before = width
        self.body = nn.Sequential(*layers)  # (B, C, 7, 7)
        self.squeeze = _conv(before, 32, 1)
        self.project = nn.Linear(32 * 7 * 7, EMBEDDING_DIM, bias=False)
        self.norm = nn.BatchNorm1d(EMBEDDING_DIM)

    def forward(self, faces: Tensor) -> Tensor:
        x = F.relu(self.squeeze(self.body(faces)))  # (B, 32, 7, 7)
        return self.norm(self.project(x.flatten(1)))


# ---- losses


def cosface_logits(cosines: Tensor, labels: Tensor, scale: float, margin: float) -> Tensor:
    """s (cos θ - m [own class])  (CosFace, arXiv:1801.09414, equation 4). cosines (B, C), labels (B,)."""
    return scale * (cosines - margin * F.one_hot(labels, cosines.shape[1]))


def arcface_logits(cosines: Tensor, labels: Tensor, scale: float, margin: float) -> Tensor:
    """s cos(θ + m [own class])  (ArcFace, arXiv:1801.07698, equation 3). cosines (B, C), labels (B,)."""
    own = cosines.gather(1, labels[:, None]).clamp(-1 + 1e-6, 1 - 1e-6)  # (B, 1)
    # Past θ = π - m the cosine would rise again; as in the original a straight line goes on from there.
    straight = own - margin * np.sin(margin)
    shifted = torch.where(own > -np.cos(margin), torch.cos(own.arccos() + margin), straight)
    return scale * cosines.scatter(1, labels[:, None], shifted)


class TraitPrototypes(nn.Module):
    """A direction for every identity there could be, computed from the traits the renderer gave it.

    What is learnt is shared by all people, so a person seen in one picture teaches as much as one seen in
    twenty, and people never drawn serve as negatives.

    Args:
        others: traits (M, T) of people to tell the batch's people apart from.
        negatives: how many of them each step takes.
    """

    def __init__(self, others: np.ndarray, negatives: int = 2048) -> None:
        super().__init__()
        self.register_buffer("others", torch.from_numpy(others).float(), persistent=False)
        self.negatives = min(negatives, len(others))
        first, second = nn.Linear(others.shape[1], EMBEDDING_DIM), nn.Linear(EMBEDDING_DIM, EMBEDDING_DIM)
        self.network = nn.Sequential(first, nn.ReLU(), second)

    def forward(self, traits: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """traits (B, T) -> directions to choose from (C, 512), and which of them is each face's (B,)."""
        own, right = torch.from_numpy(traits).float().unique(dim=0, return_inverse=True)
        others = self.others[rng.choice(len(self.others), self.negatives, replace=False)]
        others = others[(torch.cdist(others, own) > 1e-3).all(1)]
        mean, deviation = self.others.mean(0), self.others.std(0) + 1e-6
        return self.network((torch.cat([own, others]) - mean) / deviation), right


# ---- what a face goes through on its way from a picture


def augment(crops: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Crops with a margin (B, 128, 128, 3) uint8 -> faces (B, 3, 112, 112) in [-1, 1] as practice has them.

    Landmarks are a little off; pictures are small, soft from a decoder, compressed, of other light; something
    may cover part of a face. Not mirrored: marks on one side are part of an identity.
    """
    faces = np.empty((len(crops), FACE_SIZE, FACE_SIZE, 3), np.float32)
    for crop, face in zip(crops, faces, strict=True):
        face[:] = _augment_one(crop, rng)
    return to_tensor(faces)


def _augment_one(crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    centre = (CROP_SIZE - 1) / 2
    turn, size, shift = 0.0, 1.0, np.zeros(2)
    if rng.random() < 0.7:
        turn, size, shift = rng.normal(0, 2.5), np.exp(rng.normal(0, 0.035)), rng.normal(0, 1.8, 2)
    warp = cv2.getRotationMatrix2D((centre, centre), turn, size)
    warp[:, 2] += shift - (CROP_SIZE - FACE_SIZE) / 2
    border = cv2.BORDER_REPLICATE
    face = cv2.warpAffine(crop, warp, (FACE_SIZE, FACE_SIZE), flags=cv2.INTER_LINEAR, borderMode=border)
    if rng.random() < 0.5:
        small = int(rng.integers(24, 96))
        face = cv2.resize(face, (small, small), interpolation=cv2.INTER_AREA)
        back = (cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_LANCZOS4)[rng.integers(3)]
        face = cv2.resize(face, (FACE_SIZE, FACE_SIZE), interpolation=back)
    if rng.random() < 0.1:
        face = cv2.GaussianBlur(face, (0, 0), rng.uniform(0.5, 1.8))
    if rng.random() < 0.12:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(35, 92))]
        face = cv2.imdecode(cv2.imencode(".jpg", face, quality)[1], cv2.IMREAD_COLOR)
    if rng.random() < 0.1:
        height, width = rng.integers(12, 44, 2)
        top, left = rng.integers(0, FACE_SIZE - height), rng.integers(0, FACE_SIZE - width)
        face[top : top + height, left : left + width] = rng.integers(0, 256, 3)
    face = face * np.float32(np.exp(rng.normal(0, 0.1))) + rng.normal(0, 8, 3).astype(np.float32)
    if rng.random() < 0.15:
        face += np.float32(rng.uniform(2, 14)) * rng.standard_normal(face.shape, dtype=np.float32)
    return np.clip(face, 0, 255)


def to_tensor(faces: np.ndarray) -> Tensor:
    """Faces (B, H, W, 3) in 0..255 -> (B, 3, H, W) in [-1, 1], in memory with channels last."""
    return (torch.from_numpy(faces) / 127.5 - 1).permute(0, 3, 1, 2)


def centre_faces(crops: np.ndarray) -> Tensor:
    """Crops with a margin (B, 128, 128, 3) uint8 -> the faces in them (B, 3, 112, 112) in [-1, 1]."""
    margin = (CROP_SIZE - FACE_SIZE) // 2
    return to_tensor(np.ascontiguousarray(crops[:, margin:-margin, margin:-margin]))


@torch.no_grad()
def embed_crops(model: Callable[[Tensor], Tensor], crops: np.ndarray, batch_size: int = 100) -> Tensor:
    """Raw embeddings (N, 512) of crops (N, 128, 128, 3)."""
    batches = [
        model(centre_faces(crops[start : start + batch_size])) for start in range(0, len(crops), batch_size)
    ]
    return torch.cat(batches).float()


# ---- figures


@dataclass
class PairCosines:
    """Cosines of all pairs of faces: of one person, and of two persons."""

    same: np.ndarray
    different: np.ndarray

    @classmethod
    def of(cls, embeddings: Tensor, identities: np.ndarray) -> PairCosines:
        """embeddings (N, 512), raw; identities (N,)."""
        unit = F.normalize(embeddings.float(), dim=1)
        cosines = (unit @ unit.T).numpy()
        first, second = np.triu_indices(len(identities), 1)
        same = identities[first] == identities[second]
        values = cosines[first, second]
        return cls(values[same], values[~same])

    def best_threshold(self) -> float:
        """The threshold of the highest `accuracy`."""
        candidates = np.linspace(-0.2, 0.9, 221)
        return float(candidates[np.argmax([self.accuracy(value) for value in candidates])])

    def accuracy(self, threshold: float) -> float:
        """Verification: mean of the shares told right among same and among different pairs."""
        return float((np.mean(self.same > threshold) + np.mean(self.different <= threshold)) / 2)

    def figures(self, threshold: float) -> dict[str, float]:
        return {
            "verification": round(self.accuracy(threshold), 4),
            "threshold": round(threshold, 3),
            "same_person_median": round(float(np.median(self.same)), 3),
            "same_person_p10": round(float(np.quantile(self.same, 0.1)), 3),
            "same_person_p90": round(float(np.quantile(self.same, 0.9)), 3),
            "strangers_median": round(float(np.median(self.different)), 3),
            "strangers_p99": round(float(np.quantile(self.different, 0.99)), 3),
            "same_pairs": len(self.same),
            "different_pairs": len(self.different),
        }


def rank_one(embeddings: Tensor, identities: np.ndarray) -> float:
    """Share of faces whose nearest other face is of the same person."""
    unit = F.normalize(embeddings.float(), dim=1)
    cosines = unit @ unit.T
    cosines.fill_diagonal_(-2)
    return float(np.mean(identities[cosines.argmax(1).numpy()] == identities))


# ---- training


@dataclass(frozen=True)
class RecognizerSettings:
    """One recogniser's training."""

    steps: int
    batch_size: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 1e-3
    loss: str = "cosface"
    scale: float = 32.0
    margin: float = 0.35
    warmup_share: float = 0.25
    seed: int = 0


LOGITS = {"cosface": cosface_logits, "arcface": arcface_logits}


def train_recognizer(
    model: nn.Module,
    bank_at: Callable[[int], FaceBank],
    others: np.ndarray,
    validation: FaceBank,
    folder: Path,
    settings: RecognizerSettings,
) -> nn.Module:
    """Trains `model` to tell identities apart, and returns it in evaluation mode.

    bank_at: step -> the faces to draw from at that step (they may grow). others: traits (M, T) of people to
    be told from. Scale and margin rise over the first `warmup_share` of the steps. `folder` holds the
    checkpoint; the same call again continues from it.
    """
    torch.manual_seed(settings.seed)
    prototypes = TraitPrototypes(others)
    model.to(memory_format=torch.channels_last).train()
    matrices = [*hidden_matrices(model), *hidden_matrices(prototypes)]
    taken = {id(parameter) for parameter in matrices}
    others = [p for p in (*model.parameters(), *prototypes.parameters()) if id(p) not in taken]
    rate, decay = settings.learning_rate, settings.weight_decay
    optimizer = MuonAdamW(matrices, others, rate, weight_decay=decay)
    config = vars(settings)
    modules = {"model": model, "prototypes": prototypes}
    loop = TrainingLoop(folder, settings.steps, modules, optimizer, config)
    known, shown = validation[np.arange(len(validation))], validation.identities
    for step in loop:
        rng, _ = step_rng(settings.seed, step)
        bank = bank_at(step)
        chosen = rng.choice(len(bank), settings.batch_size, replace=False)
        crops, traits = bank[chosen], bank.traits[chosen]
        half = settings.batch_size // 2  # the other half are the people in the mirror
        crops[:half], traits[:half] = crops[:half, :, ::-1], mirrored_traits(traits[:half])
        faces = augment(crops, rng)

        rise = min(1.0, step / (settings.warmup_share * settings.steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.steps, settings.learning_rate)
        with autocast():
            embeddings = model(faces)  # (B, 512)
        directions, target = prototypes(traits, rng)
        cosines = F.linear(F.normalize(embeddings.float()), F.normalize(directions))  # (B, C)
        scale = settings.scale * (0.5 + 0.5 * rise)
        loss = F.cross_entropy(LOGITS[settings.loss](cosines, target, scale, settings.margin * rise), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        right = (cosines.detach().argmax(1) == target).float().mean().item()
        loop.log(loss=loss.item(), accuracy=right)
        if (step + 1) % max(200, settings.steps // 10) == 0:
            model.eval()
            embedded = embed_crops(model, known)
            model.train()
            pairs = PairCosines.of(embedded, shown)
            logger.info("%s: validation after %d steps %s rank one %.3f", folder.name, step + 1,
                        pairs.figures(pairs.best_threshold()), rank_one(embedded, shown))  # fmt: skip
    return model.eval()


def export_recognizer(model: nn.Module, path: str | Path) -> Path:
    """Writes ONNX in insightface's format: one input (N, 3, 112, 112) RGB in [-1, 1], one output (N, 512)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    axes = {"input.1": {0: "batch"}, "embedding": {0: "batch"}}
    model = model.eval().to(memory_format=torch.contiguous_format)
    torch.onnx.export(
        model, (torch.zeros(2, 3, FACE_SIZE, FACE_SIZE),), str(path), input_names=["input.1"],
        output_names=["embedding"], dynamic_axes=axes, opset_version=13, dynamo=False,
    )  # fmt: skip
    return path
