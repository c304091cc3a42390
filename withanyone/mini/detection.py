"""The miniature's face detector: a small SCRFD (arXiv:2105.04714) with landmarks, in insightface's layout.

Strides 8, 16 and 32, two anchors a place. An anchor stands for one size of face; boxes and landmarks are
predicted from the anchor's place (column * stride, row * stride), in units of the anchor's size inside the
network and of the stride in the exported file.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from withanyone.bench.metrics import box_iou
from withanyone.precision import autocast

from .faceset import Scene
from .loop import TrainingLoop, learning_rate, step_rng

logger = logging.getLogger(__name__)

STRIDES = (8, 16, 32)
#: Face sizes (longer side, pixels of the network's input) of the two anchors of each stride.
ANCHOR_SIZES = ((16.0, 28.0), (44.0, 68.0), (104.0, 164.0))
#: A face belongs to every anchor within this factor of its size (neighbours are a factor 1.6 apart).
SIZE_TOLERANCE = 1.4
NMS_THRESHOLD = 0.4  # insightface's


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class FaceDetector(nn.Module):
    """Pictures (B, 3, H, W), RGB, (x - 127.5) / 128, sides divisible by 32 -> one tensor a stride.

    Each is (B, H/s, W/s, 2, 15): per anchor a score (logit), a box (4) and landmarks (10) in anchor sizes.
    """

    def __init__(self, widths: Sequence[int] = (16, 32, 64, 96, 96), neck: int = 64) -> None:
        super().__init__()
        a, b, c, d, e = widths
        self.stem = nn.Sequential(_conv(3, a, 2), _conv(a, b, 2), _conv(b, b))
        self.stages = nn.ModuleList(
            [
                nn.Sequential(_conv(b, c, 2), _conv(c, c), _conv(c, c)),
                nn.Sequential(_conv(c, d, 2), _conv(d, d), _conv(d, d)),
                nn.Sequential(_conv(d, e, 2), _conv(e, e), _conv(e, e)),
            ]
        )
        self.lateral = nn.ModuleList([nn.Conv2d(width, neck, 1) for width in (c, d, e)])
        self.heads = nn.ModuleList(
            [nn.Sequential(_conv(neck, neck), nn.Conv2d(neck, 2 * 15, 1)) for _ in STRIDES]
        )
        for head in self.heads:
            with torch.no_grad():
                head[-1].bias.view(2, 15)[:, 0] = -4.0  # faces are rare
                head[-1].bias.view(2, 15)[:, 1:5] = 0.45  # boxes of about the anchor's size

    def forward(self, pictures: Tensor) -> list[Tensor]:
        features = []
        x = self.stem(pictures)
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        above = None
        outputs: list[Tensor] = []
        for level in (2, 1, 0):
            x = self.lateral[level](features[level])
            if above is not None:
                x = x + F.interpolate(above, scale_factor=2.0, mode="nearest")
            above = x
            raw = self.heads[level](x).permute(0, 2, 3, 1)  # (B, H/s, W/s, 30)
            outputs.insert(0, raw.reshape(*raw.shape[:3], 2, 15))
        return outputs


class ScrfdOutputs(nn.Module):
    """A detector with the nine outputs insightface reads: per stride scores, then boxes, then landmarks.

    Shapes (H/s * W/s * 2, 1 | 4 | 10); scores through a sigmoid, distances in strides. One picture at a time.
    """

    def __init__(self, detector: FaceDetector) -> None:
        super().__init__()
        self.detector = detector
        for stride, sizes in zip(STRIDES, ANCHOR_SIZES, strict=True):
            self.register_buffer(f"unit_{stride}", torch.tensor(sizes).view(1, 1, 1, 2, 1) / stride)

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        scores, boxes, landmarks = [], [], []
        for stride, output in zip(STRIDES, self.detector(pictures), strict=True):
            unit = getattr(self, f"unit_{stride}")
            scores.append(output[..., :1].sigmoid().reshape(-1, 1))
            boxes.append((output[..., 1:5] * unit).reshape(-1, 4))
            landmarks.append((output[..., 5:] * unit).reshape(-1, 10))
        return (*scores, *boxes, *landmarks)


# ---- targets and losses


@dataclass
class Targets:
    """What the anchors of one stride should say. B pictures, h x w places, two anchors."""

    positive: Tensor  # (B, h, w, 2) bool
    ignored: Tensor  # (B, h, w, 2) bool: neither face nor background
    boxes: Tensor  # (B, h, w, 2, 4) distances left, top, right, bottom, in anchor sizes
    landmarks: Tensor  # (B, h, w, 2, 10) offsets, in anchor sizes


def make_targets(faces: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], size: int) -> list[Targets]:
    """Targets for square pictures; per picture bboxes (F, 4), kps (F, 5, 2), cut by a border (F,).

    A face is positive for the anchors of about its size at places near its centre; places a little farther,
    anchors of a somewhat other size, and faces cut by the picture's border count neither way.
    """
    result = []
    for stride, sizes in zip(STRIDES, ANCHOR_SIZES, strict=True):
        places = size // stride
        shape = (len(faces), places, places, 2)
        positive, ignored = np.zeros(shape, bool), np.zeros(shape, bool)
        boxes, landmarks = np.zeros((*shape, 4), np.float32), np.zeros((*shape, 10), np.float32)
        grid = np.arange(places) * stride
        for index, (bboxes, kps, cut) in enumerate(faces):
            nearest = np.full(shape[1:], np.inf)
            for bbox, points, is_cut in zip(bboxes, kps, cut, strict=True):
                centre_x, centre_y = (bbox[0] + bbox[2]) / 2, (bbox[1] + bbox[3]) / 2
                side = max(bbox[2] - bbox[0], bbox[3] - bbox[1])
                far = np.maximum(abs(grid[None, :] - centre_x), abs(grid[:, None] - centre_y))  # (h, w)
                for anchor, unit in enumerate(sizes):
                    ratio = max(side / unit, unit / side)
                    lowest = unit == ANCHOR_SIZES[0][0] and side < unit
                    highest = unit == ANCHOR_SIZES[-1][1] and side > unit
                    fits = ratio < SIZE_TOLERANCE or lowest or highest
                    reach = max(stride, 0.1 * side)
                    ignored[index, ..., anchor] |= (far <= 2 * reach) & (fits or ratio < SIZE_TOLERANCE**2)
                    near = (far <= reach) & (far < nearest[..., anchor])
                    if is_cut or not fits or not near.any():
                        continue
                    nearest[..., anchor][near] = far[near]
                    positive[index, ..., anchor] |= near
                    rows, columns = np.nonzero(near)
                    here = np.stack([grid[columns], grid[rows]], 1)  # (P, 2)
                    distances = np.concatenate([here - bbox[:2], bbox[2:] - here], 1) / unit
                    boxes[index, rows, columns, anchor] = distances
                    offsets = (points[None] - here[:, None]) / unit  # (P, 5, 2)
                    landmarks[index, rows, columns, anchor] = offsets.reshape(-1, 10)
        ignored &= ~positive
        result.append(Targets(*map(torch.from_numpy, (positive, ignored, boxes, landmarks))))
    return result


def focal_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """Σ |y - p|² BCE(p, y)  (quality focal loss, arXiv:2006.04388, equation 2, with hard labels)."""
    labels = positive.float()
    weight = (labels - logits.sigmoid()).square()
    return (weight * F.binary_cross_entropy_with_logits(logits, labels, reduction="none")).sum()


def giou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean of 1 - GIoU (arXiv:1902.09630) of boxes (P, 4) given as distances from one place."""
    size = predicted[:, :2] + predicted[:, 2:]
    target_size = target[:, :2] + target[:, 2:]
    smaller, larger = torch.minimum(predicted, target), torch.maximum(predicted, target)
    overlap = (smaller[:, :2] + smaller[:, 2:]).clamp(0).prod(1)
    hull = (larger[:, :2] + larger[:, 2:]).clamp(1e-3).prod(1)
    union = size.clamp(0).prod(1) + target_size.prod(1) - overlap
    return (1 - overlap / union + (hull - union) / hull).mean()


def detection_loss(outputs: Sequence[Tensor], targets: Sequence[Targets]) -> dict[str, Tensor]:
    """Losses by name, each a mean over positive anchors."""
    logits = torch.cat([o[..., 0][~t.ignored] for o, t in zip(outputs, targets, strict=True)])
    positive = torch.cat([t.positive[~t.ignored] for t in targets])
    predicted = torch.cat([o[t.positive] for o, t in zip(outputs, targets, strict=True)])  # (P, 15)
    count = max(1, len(predicted))
    losses = {"score": focal_loss(logits, positive) / count}
    if len(predicted):
        boxes = torch.cat([t.boxes[t.positive] for t in targets])  # (P, 4)
        landmarks = torch.cat([t.landmarks[t.positive] for t in targets])  # (P, 10)
        near = F.smooth_l1_loss(predicted[:, 1:5], boxes, beta=0.05)  # GIoU is flat where no box is left
        losses["box"] = giou_loss(predicted[:, 1:5], boxes) + near
        losses["kps"] = F.smooth_l1_loss(predicted[:, 5:], landmarks, beta=0.02)
    return losses


LOSS_WEIGHTS = {"score": 1.0, "box": 1.0, "kps": 12.0}


# ---- pictures as the detector meets them


def place(scene: Scene, scale: float, shift: tuple[float, float], size: int) -> tuple[np.ndarray, ...]:
    """Scene scaled and shifted onto a black square: picture (size, size, 3), bboxes, kps, cut by a border."""
    shrink = cv2.INTER_AREA if scale < 0.7 else cv2.INTER_LINEAR
    height, width = scene.image.shape[:2]
    new = (max(8, round(width * scale)), max(8, round(height * scale)))
    resized = cv2.resize(scene.image, new, interpolation=shrink)
    factor = np.array([new[0] / width, new[1] / height], np.float32)
    left, top = round(shift[0]), round(shift[1])
    canvas = np.zeros((size, size, 3), np.uint8)
    x0, y0, x1, y1 = max(0, left), max(0, top), min(size, left + new[0]), min(size, top + new[1])
    if x1 > x0 and y1 > y0:
        canvas[y0:y1, x0:x1] = resized[y0 - top : y1 - top, x0 - left : x1 - left]
    move = np.array([left, top], np.float32)
    bboxes = scene.bboxes * np.tile(factor, 2) + np.tile(move, 2)
    kps = scene.kps * factor + move
    inside = np.clip(bboxes, 0, size)
    area = np.prod(bboxes[:, 2:] - bboxes[:, :2], axis=1)
    seen = np.prod(inside[:, 2:] - inside[:, :2], axis=1) / np.maximum(area, 1e-6)
    here = seen > 0.02
    return canvas, bboxes[here], kps[here], seen[here] < 0.8


def fit(scene: Scene, size: int) -> tuple[np.ndarray, ...]:
    """`place` as insightface does at inference: longer side to `size`, in the top left corner."""
    return place(scene, size / max(scene.image.shape[:2]), (0.0, 0.0), size)


def mirror(scene: Scene) -> Scene:
    """The scene from behind: left and right landmarks change their names."""
    width = scene.image.shape[1]
    bboxes = scene.bboxes.copy()
    bboxes[:, [0, 2]] = width - scene.bboxes[:, [2, 0]]
    kps = scene.kps[:, [1, 0, 2, 4, 3]].copy()
    kps[..., 0] = width - kps[..., 0]
    return Scene(scene.image[:, ::-1], bboxes, kps)


def distort(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Other light, blur, noise, compression: a picture (H, W, 3) uint8 as a decoder may give it."""
    if rng.random() < 0.3:
        picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.4, 1.6))
    if rng.random() < 0.15:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(35, 92))]
        picture = cv2.imdecode(cv2.imencode(".jpg", picture, quality)[1], cv2.IMREAD_COLOR)
    change = np.float32(np.exp(rng.normal(0, 0.15)))
    picture = picture * change + rng.normal(0, 8, 3).astype(np.float32)
    if rng.random() < 0.15:
        picture += np.float32(rng.uniform(2, 12)) * rng.standard_normal(picture.shape, dtype=np.float32)
    return np.clip(picture, 0, 255).astype(np.uint8)


def training_picture(scene: Scene, size: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """A scene at inference's scale half the time, else smaller or larger and cropped; mirrored, distorted."""
    if rng.random() < 0.5:
        scene = mirror(scene)
    height, width = scene.image.shape[:2]
    if rng.random() < 0.5:
        picture, *faces = fit(scene, size)
    else:
        scale = size / max(height, width) * np.exp(rng.uniform(np.log(0.4), np.log(1.6)))
        room = (size - width * scale, size - height * scale)
        shift = tuple(float(rng.uniform(min(0, r), max(0, r))) for r in room)
        picture, *faces = place(scene, scale, shift, size)
    return (distort(picture, rng), *faces)


def to_input(pictures: np.ndarray) -> Tensor:
    """Pictures (B, H, W, 3) uint8 RGB -> (B, 3, H, W), (x - 127.5) / 128."""
    return ((torch.from_numpy(pictures).float() - 127.5) / 128).permute(0, 3, 1, 2)


# ---- inference and figures


@torch.no_grad()
def detect(detector: FaceDetector, pictures: np.ndarray, threshold: float) -> list[tuple[np.ndarray, ...]]:
    """Per picture of (B, S, S, 3) uint8: bboxes (F, 4), kps (F, 5, 2), scores (F,), best first, after NMS."""
    outputs = detector(to_input(pictures))
    result = []
    for index in range(len(pictures)):
        boxes, kps, scores = [], [], []
        for stride, sizes, output in zip(STRIDES, ANCHOR_SIZES, outputs, strict=True):
            raw = output[index].float().numpy()  # (h, w, 2, 15)
            score = 1 / (1 + np.exp(-raw[..., 0]))
            rows, columns, anchors = np.nonzero(score > threshold)
            values = raw[rows, columns, anchors] * np.array(sizes)[anchors][:, None]
            here = np.stack([columns, rows], 1) * stride
            boxes.append(np.concatenate([here - values[:, 1:3], here + values[:, 3:5]], 1))
            kps.append(values[:, 5:].reshape(-1, 5, 2) + here[:, None])
            scores.append(score[rows, columns, anchors])
        boxes, kps, scores = map(np.concatenate, (boxes, kps, scores))
        order, kept = np.argsort(-scores), []
        while len(order):
            first, order = order[0], order[1:]
            kept.append(first)
            order = order[box_iou(boxes[first], boxes[order])[0] <= NMS_THRESHOLD]
        result.append((boxes[kept], kps[kept], scores[kept]))
    return result


@dataclass
class DetectionCount:
    """Running figures of found and missed faces."""

    pictures: int = 0
    faces: int = 0
    found: int = 0
    false_faces: int = 0
    pictures_with_false: int = 0

    def __post_init__(self) -> None:
        self.kps_errors: list[float] = []

    def add(self, bboxes: np.ndarray, kps: np.ndarray, found_bboxes: np.ndarray, found_kps: np.ndarray,
            min_height: float = 24.0) -> None:  # fmt: skip
        """Matches one picture's detections (best first) with its faces at IoU 0.5.

        Faces under `min_height` pixels need not be found, and are no mistake if they are.
        """
        free = np.ones(len(bboxes), bool)
        heights = bboxes[:, 3] - bboxes[:, 1]
        false = 0
        for bbox, points in zip(found_bboxes, found_kps, strict=True):
            overlaps = np.where(free, box_iou(bbox, bboxes)[0], -1.0) if len(bboxes) else np.zeros(0)
            if not len(overlaps) or overlaps.max() <= 0.5:
                false += 1
                continue
            match = int(overlaps.argmax())
            free[match] = False
            if heights[match] >= min_height:
                self.found += 1
                error = np.linalg.norm(points - kps[match], axis=1).mean() / heights[match]
                self.kps_errors.append(float(error))
        self.pictures += 1
        self.faces += int((heights >= min_height).sum())
        self.false_faces += false
        self.pictures_with_false += false > 0

    def figures(self) -> dict[str, float]:
        return {
            "recall": round(self.found / max(1, self.faces), 4),
            "pictures_with_false_face": round(self.pictures_with_false / max(1, self.pictures), 4),
            "kps_error_median": round(float(np.median(self.kps_errors)) if self.kps_errors else 1.0, 4),
            "kps_error_p90": round(float(np.quantile(self.kps_errors, 0.9)) if self.kps_errors else 1.0, 4),
            "faces": self.faces,
            "pictures": self.pictures,
        }


def evaluate(
    detector: FaceDetector, scenes: Sequence[Scene], size: int, threshold: float = 0.5
) -> dict[str, float]:
    """Figures of a detector on scenes; face heights count in the pixels of the original picture."""
    count = DetectionCount()
    for start in range(0, len(scenes), 16):
        batch = scenes[start : start + 16]
        found = detect(detector, np.stack([fit(scene, size)[0] for scene in batch]), threshold)
        for scene, (bboxes, kps, _) in zip(batch, found, strict=True):
            scale = size / max(scene.image.shape[:2])
            count.add(scene.bboxes, scene.kps, bboxes / scale, kps / scale)
    return count.figures()


# ---- training


@dataclass(frozen=True)
class DetectorSettings:
    """One detector's training; every step takes one of `sizes` as the input's side."""

    steps: int
    batch_size: int = 12
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    sizes: tuple[int, ...] = (192, 256)
    seed: int = 0


def train_detector(
    detector: FaceDetector,
    scenes: Sequence[Scene],
    validation: Sequence[Scene],
    folder: Path,
    settings: DetectorSettings,
) -> FaceDetector:
    """Trains `detector` on scenes and returns it in evaluation mode; the same call again continues."""
    torch.manual_seed(settings.seed)
    detector.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(
        detector.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    config = {**vars(settings), "scenes": len(scenes)}
    loop = TrainingLoop(folder, settings.steps, {"detector": detector}, optimizer, config)
    for step in loop:
        rng, _ = step_rng(settings.seed, step)
        size = int(rng.choice(settings.sizes))
        chosen = rng.choice(len(scenes), settings.batch_size, replace=False)
        samples = [training_picture(scenes[index], size, rng) for index in chosen]
        targets = make_targets([sample[1:] for sample in samples], size)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.steps, settings.learning_rate)
        with autocast():
            outputs = detector(to_input(np.stack([sample[0] for sample in samples])))
        losses = detection_loss([output.float() for output in outputs], targets)
        loss = sum(LOSS_WEIGHTS[name] * value for name, value in losses.items())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
        optimizer.step()
        loop.log(**{name: value.item() for name, value in losses.items()})
        if (step + 1) % max(200, settings.steps // 8) == 0:
            detector.eval()
            logger.info("%s: validation after %d steps %s", folder.name, step + 1,
                        evaluate(detector, validation[:300], 256))  # fmt: skip
            detector.train()
    return detector.eval()


def export_detector(detector: FaceDetector, path: str | Path) -> Path:
    """Writes ONNX in insightface's SCRFD layout (height and width free, divisible by 32)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [f"{kind}_{stride}" for kind in ("score", "bbox", "kps") for stride in STRIDES]
    axes = {"input.1": {2: "height", 3: "width"}, **{name: {0: f"anchors_{name}"} for name in names}}
    model = ScrfdOutputs(detector).eval().to(memory_format=torch.contiguous_format)
    torch.onnx.export(
        model, (torch.zeros(1, 3, 256, 256),), str(path), input_names=["input.1"], output_names=names,
        dynamic_axes=axes, opset_version=13, dynamo=False,
    )  # fmt: skip
    return path
