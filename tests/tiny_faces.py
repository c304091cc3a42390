"""A face pack without trained weights: a detector that finds painted faces exactly, and a random recogniser.

`paint_face` paints a "face", a rectangle of magenta shades whose pattern depends on the identity. The
detector's weights are set in closed form: it measures how far the magenta reaches to the left, right, top and
bottom of each anchor, so that box, key points and score follow from the picture, at any size and for any
number of faces. It has SCRFD's output layout (strides 8, 16, 32, two anchors, nine outputs). The recogniser
has random weights, with batch statistics from painted faces, so that two pictures of one identity are alike
and those of two are not.

    write_pack(folder)                                  # detection.onnx, recognition.onnx, face_analyzer.json
    picture = blank(256, 256)
    picture = paint_face(picture, (40, 30, 120, 130), identity=3)
    FaceAnalyzer.from_pretrained(folder).detect(picture)   # one face, its box within a pixel or so

Also `IResNet`, the architecture of insightface's ArcFace models, for files in the layout of glintr100.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from withanyone.arcface import align_face

KPS_IN_BOX = ((0.30, 0.40), (0.70, 0.40), (0.50, 0.62), (0.35, 0.80), (0.65, 0.80))
"""Key points of a painted face, as shares of its box's width and height."""

BACKGROUND = (90, 130, 100)
SETTINGS = {"pack": "tiny", "det_size": [[256, 256]], "det_thresh": 0.4, "crop_size": 64, "enlarge": False}


def blank(width: int = 128, height: int = 128, color: tuple[int, int, int] = BACKGROUND) -> Image.Image:
    """A picture without a face (`color` must not be magenta)."""
    return Image.new("RGB", (width, height), color)


def paint_face(image: Image.Image, box: Sequence[float], identity: int = 0) -> Image.Image:
    """A copy of `image` with the face of `identity` in `box` (x1, y1, x2, y2, cut to whole pixels)."""
    x1, y1, x2, y2 = (int(round(v)) for v in box)
    rng = np.random.default_rng(1000 + identity)
    pattern = rng.uniform((150, 0, 150), (255, 95, 255), size=(4, 4, 3)).round().astype(np.uint8)
    image = image.convert("RGB")
    image.paste(Image.fromarray(pattern).resize((x2 - x1, y2 - y1), Image.Resampling.BILINEAR), (x1, y1))
    return image


def kps_of(box: Sequence[float]) -> np.ndarray:
    """(5, 2) the key points of a face painted into `box`."""
    x1, y1, x2, y2 = box
    return np.array([(x1 + u * (x2 - x1), y1 + v * (y2 - y1)) for u, v in KPS_IN_BOX], np.float32)


def write_pack(folder: str | Path, seed: int = 0, *, settings: dict | None = None) -> Path:
    """Write the pack into `folder`; `settings`: None for SETTINGS, {} for a bare pack without JSON."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    export_detector(MagentaDetector(), folder / "detection.onnx")
    export_recognizer(recognizer(seed), folder / "recognition.onnx")
    settings = SETTINGS if settings is None else settings
    if settings:
        (folder / "face_analyzer.json").write_text(json.dumps(settings))
    return folder


# ----------------------------------------------------------------------------------------------------------


class MagentaDetector(nn.Module):
    """Finds rectangles of magenta. Input (1, 3, H, W), (RGB - 127.5) / 128; outputs as SCRFD's."""

    strides = (8, 16, 32)
    doublings = 8  # reaches of up to 2^8 pixels

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        red, green, blue = x[:, 0:1], x[:, 1:2], x[:, 2:3]
        inside = (4 * (torch.minimum(red, blue) - green) - 0.5).clamp(0, 1)  # (1, 1, H, W), soft at the edges
        reach = [self.reach(inside, axis, sign) for axis, sign in ((3, -1), (2, -1), (3, 1), (2, 1))]
        scores, boxes, points = [], [], []
        for stride in self.strides:
            left, top, right, bottom = (r[:, :, ::stride, ::stride] for r in reach)
            size = torch.maximum(left + right, top + bottom)
            # A face belongs to one stride by its size, and to the anchors beside its centre.
            low, high = {8: (12, 48), 16: (48, 96), 32: (96, 1000)}[stride]
            fits = (size >= low).float() * (size < high).float()
            off = torch.maximum((right - left).abs(), (bottom - top).abs()) / stride
            score = fits * (off <= 1.3).float() * (0.95 - 0.3 * off)
            box = torch.cat([left, top, right, bottom], 1) / stride
            width, height = left + right, top + bottom
            kps = [p for u, v in KPS_IN_BOX for p in (u * width - left, v * height - top)]
            kps = torch.cat(kps, 1) / stride
            for outputs, value in ((scores, score), (boxes, box), (points, kps)):
                twice = torch.cat([value, value], 1)  # two anchors a place
                outputs.append(twice.permute(0, 2, 3, 1).reshape(-1, value.shape[1]))
        return (*scores, *boxes, *points)

    def reach(self, inside: Tensor, axis: int, sign: int) -> Tensor:
        """How many pixels of unbroken magenta lie on one side of each pixel, itself included if sign is 1."""
        total = inside if sign > 0 else self.shift(inside, axis, sign, 1)
        full = total
        for k in range(self.doublings):
            total = total + full * self.shift(total, axis, sign, 2**k)
            full = full * self.shift(full, axis, sign, 2**k)
        return total

    @staticmethod
    def shift(x: Tensor, axis: int, sign: int, by: int) -> Tensor:
        """The value `by` pixels further to that side, 0 beyond the edge."""
        before, after = (by, 0) if sign < 0 else (0, by)
        padded = F.pad(x, (before, after, 0, 0) if axis == 3 else (0, 0, before, after))
        return padded.narrow(axis, 0, x.shape[axis]) if sign < 0 else padded.narrow(axis, by, x.shape[axis])


class TinyRecognizer(nn.Module):
    """Convolutions, a depthwise convolution over the last map, a projection and a batch norm; 512 numbers."""

    def __init__(self, width: int = 16):
        super().__init__()
        layers, inputs = [], 3
        for outputs in (width, 2 * width, 2 * width, 4 * width):
            layers += [
                nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.PReLU(outputs),
            ]
            inputs = outputs
        self.features = nn.Sequential(*layers)  # (B, 4 * width, 7, 7)
        self.whole = nn.Conv2d(4 * width, 4 * width, 7, groups=4 * width, bias=False)
        self.project = nn.Linear(4 * width, 512, bias=False)
        self.norm = nn.BatchNorm1d(512)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.project(torch.flatten(self.whole(self.features(x)), 1)))


def recognizer(seed: int = 0, people: int = 64) -> TinyRecognizer:
    """Random weights; batch statistics of aligned painted faces of identities no test uses (5000 and on)."""
    torch.manual_seed(seed)
    net = TinyRecognizer()
    return calibrate(net, painted_batch(range(5000, 5000 + people)))


def painted_batch(identities: Sequence[int]) -> Tensor:
    """(B, 3, 112, 112) in [-1, 1]: aligned faces, painted into boxes of varied sizes and proportions."""
    rng = np.random.default_rng(0)
    pictures, kps = [], []
    for identity in identities:
        width, ratio = rng.uniform(40, 90), rng.uniform(1.1, 1.4)
        corner = rng.uniform(2, (126 - width, 126 - width * ratio))
        box = np.rint([*corner, corner[0] + width, corner[1] + width * ratio])
        pictures.append(np.asarray(paint_face(blank(128, 128), box, identity), np.float32) / 127.5 - 1)
        kps.append(kps_of(box))
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)  # (B, 3, 128, 128)
    return align_face(images, torch.from_numpy(np.stack(kps)))


@torch.no_grad()
def calibrate(net: nn.Module, batch: Tensor) -> nn.Module:
    """Give every batch norm the statistics of `batch`, so that no activation explodes; eval mode."""
    norms = [m for m in net.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    for norm in norms:
        norm.momentum = None  # a plain average
        norm.reset_running_stats()
    net.train()(batch)
    return net.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------


class IResBlock(nn.Module):
    """IResNet's residual block: norm, conv, norm, PReLU, conv, norm."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
        self.bn2, self.prelu = nn.BatchNorm2d(outputs), nn.PReLU(outputs)
        self.conv2, self.bn3 = nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        return out + (x if self.downsample is None else self.downsample(x))


class IResNet(nn.Module):
    """ArcFace's IResNet. `IResNet((3, 13, 30, 3), 64)` is IResNet-100, the layout of glintr100."""

    def __init__(self, layers: Sequence[int] = (1, 1, 1, 1), width: int = 8):
        super().__init__()
        self.conv1, self.bn1, self.prelu = (
            nn.Conv2d(3, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.PReLU(width),
        )
        blocks, inputs = [], width
        for i, count in enumerate(layers):
            outputs = width * 2**i
            blocks += [
                IResBlock(inputs if j == 0 else outputs, outputs, 2 if j == 0 else 1) for j in range(count)
            ]
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.bn2, self.dropout = nn.BatchNorm2d(inputs), nn.Dropout(0.0)
        self.fc, self.features = nn.Linear(inputs * 49, 512), nn.BatchNorm1d(512)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn2(self.blocks(self.prelu(self.bn1(self.conv1(x)))))
        return self.features(self.fc(torch.flatten(self.dropout(x), 1)))


def iresnet(layers: Sequence[int] = (1, 1, 1, 1), width: int = 8, seed: int = 0, people: int = 16) -> IResNet:
    """An IResNet with random weights and sane batch statistics."""
    torch.manual_seed(seed)
    net = IResNet(layers, width)
    for module in net.modules():
        if isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, 0.1, 0.4)
    return calibrate(net, painted_batch(range(5000, 5000 + people)))


# ----------------------------------------------------------------------------------------------------------


def export_detector(net: nn.Module, path: Path) -> None:
    names = [f"{kind}_{stride}" for kind in ("score", "bbox", "kps") for stride in (8, 16, 32)]
    axes = {"input.1": {2: "height", 3: "width"}, **{name: {0: f"n_{name}"} for name in names}}
    _export(net, torch.zeros(1, 3, 64, 64), path, names, axes)


def export_recognizer(net: nn.Module, path: Path, opset: int = 17) -> None:
    _export(
        net,
        torch.zeros(1, 3, 112, 112),
        path,
        ["embedding"],
        {"input.1": {0: "batch"}, "embedding": {0: "batch"}},
        opset,
    )


def _export(
    net: nn.Module, example: Tensor, path: Path, names: list[str], axes: dict, opset: int = 17
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the legacy exporter announces its retirement
        torch.onnx.export(
            net.eval(), (example,), str(path), input_names=["input.1"], output_names=names, dynamic_axes=axes,
            opset_version=opset, dynamo=False,
        )  # fmt: skip
