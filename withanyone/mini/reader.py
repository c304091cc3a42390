"""The miniature's reader: which hat, glasses, hair, expression, scene, light does a picture show?

Two small classifiers of drawn pictures, one for a person (a square around the face, hat and shoulders
included) and one for the whole picture. They judge prompt following and copied attributes; no loss, token or
selection uses them.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from withanyone.mini import pictures, world
from withanyone.mini.loop import TrainingLoop, learning_rate, step_rng
from withanyone.mini.parts import RUNS, add_part_arguments, start_part, write_figures
from withanyone.precision import autocast

logger = logging.getLogger(__name__)

JUDGES = Path(__file__).parent / "judges"
SIZES = {"person": 80, "picture": 96}  # input pixels, square
PERSON_REACH = 2.3  # side of a person's square in heights of the face's box


def person_crop(image: np.ndarray, bbox: Sequence[float], size: int = SIZES["person"]) -> np.ndarray:
    """The square around a face, hat and shoulders included: (H, W, 3) uint8, xyxy pixels -> (size, size, 3)
    uint8.

    Its side is PERSON_REACH times the face's height; its centre lies 5 % of the side under the face's. What
    lies outside
    the picture repeats the border.
    """
    x1, y1, x2, y2 = (float(v) for v in bbox)
    side = PERSON_REACH * (y2 - y1)
    left, top = (x1 + x2 - side) / 2, (y1 + y2 - side) / 2 + 0.05 * side
    pad = int(np.ceil(side))
    padded = Image.fromarray(np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="edge"))
    box = (left + pad, top + pad, left + pad + side, top + pad + side)
    return np.asarray(padded.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0))


def picture_view(image: np.ndarray, size: int = SIZES["picture"]) -> np.ndarray:
    """The whole picture as the reader sees it: (H, W, 3) uint8 -> (size, size, 3) uint8."""
    return np.asarray(
        Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, reducing_gap=2.0)
    )


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.silu(hidden + self.body(hidden))


class AttributeReader(nn.Module):
    """Classes of several attributes from one square: pixels in [-1, 1] (B, 3, S, S) -> {attribute: logits
    (B, K)}."""

    def __init__(
        self, kind: str, attributes: dict[str, Sequence[str]], widths: Sequence[int] = (32, 64, 96)
    ) -> None:
        super().__init__()
        self.kind, self.attributes = kind, {name: tuple(values) for name, values in attributes.items()}
        self.widths = tuple(widths)
        layers: list[nn.Module] = []
        before = 3
        for depth, width in enumerate(widths):
            kernel = 5 if depth == 0 else 3
            layers += [
                nn.Conv2d(before, width, kernel, 2, kernel // 2, bias=False),
                nn.BatchNorm2d(width),
                nn.SiLU(),
                _Residual(width),
            ]  # fmt: skip
            before = width
        self.body = nn.Sequential(*layers)
        # where a thing stands tells what it is (a beard, a hat): keep a 5 x 5 grid instead of one mean
        self.squeeze = nn.Conv2d(before, 32, 1)
        self.hidden = nn.Linear(32 * 25, 256)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(256, len(values)) for name, values in self.attributes.items()}
        )

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.squeeze(self.body(pixels))  # (B, 32, S/8, S/8)
        features = F.interpolate(features, size=(5, 5), mode="area").flatten(1)  # (B, 800)
        hidden = F.silu(self.hidden(F.silu(features)))
        return {name: head(hidden) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, squares: Sequence[np.ndarray], batch: int = 128) -> list[dict[str, str]]:
        """The most likely value of every attribute for each square (S, S, 3) uint8."""
        out: list[dict[str, str]] = []
        for start in range(0, len(squares), batch):
            logits = self(_pixels(np.stack(squares[start : start + batch])))
            picks = {name: values.argmax(1).tolist() for name, values in logits.items()}
            out += [
                {name: self.attributes[name][pick[row]] for name, pick in picks.items()}
                for row in range(len(squares[start : start + batch]))
            ]
        return out

    def save(self, path: Path) -> None:
        """One safetensors file in half precision, config in its metadata."""
        config = {"kind": self.kind, "attributes": self.attributes, "widths": self.widths}
        state = {
            name: value.half() if value.is_floating_point() else value
            for name, value in self.state_dict().items()
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: value.contiguous() for name, value in state.items()}, path, {"config": json.dumps(config)}
        )

    @classmethod
    def load(cls, path: Path) -> AttributeReader:
        """Read what `save` wrote, in fp32 and evaluation mode."""
        with safe_open(path, framework="pt") as file:
            config = json.loads(file.metadata()["config"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open has no iterator)
        reader = cls(**config)
        reader.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
        return reader.eval()


def load_readers(folder: Path = JUDGES) -> dict[str, AttributeReader]:
    """The bundled readers: {"person": ..., "picture": ...}."""
    return {kind: AttributeReader.load(folder / f"{kind}.safetensors") for kind in SIZES}


def _pixels(squares: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(squares).permute(0, 3, 1, 2).float().div(127.5).sub(1)  # (B, 3, S, S)


def attributes_of(kind: str) -> dict[str, tuple[str, ...]]:
    return world.PERSON_ATTRIBUTES if kind == "person" else world.PICTURE_ATTRIBUTES


Drawn = dict[str, tuple[np.ndarray, dict[str, np.ndarray]]]


def labelled_squares(folder: Path, split: str, limit: int, seed: int = 0) -> Drawn:
    """Squares and labels from up to `limit` pictures of the shards of `python -m withanyone.mini pictures`.

    {kind: ((N, S, S, 3) uint8, {attribute: (N,) int64})}; boxes are moved a little, as a detector's are.
    """
    rng = np.random.default_rng([seed, 20_240])
    squares: dict[str, list[np.ndarray]] = {kind: [] for kind in SIZES}
    labels: dict[str, list[np.ndarray]] = {kind: [] for kind in SIZES}
    paths = pictures.shard_paths(folder, split)
    if not paths:
        raise ValueError(
            f"`pictures`: no {split} shards in {folder}; run `python -m withanyone.mini pictures` first"
        )
    for path in paths:
        arrays, _ = pictures.read_shard(path, "pixels", "bboxes", "identities", "attributes", "setting")
        for row, image in enumerate(arrays["pixels"]):
            if len(squares["picture"]) >= limit:
                break
            squares["picture"].append(picture_view(image))
            labels["picture"].append(arrays["setting"][row])
            for place in np.flatnonzero(arrays["identities"][row] >= 0):
                bbox = arrays["bboxes"][row, place]
                moved = bbox + rng.normal(0, 0.03, 4) * (bbox[3] - bbox[1])
                squares["person"].append(person_crop(image, moved))
                labels["person"].append(arrays["attributes"][row, place])
    columns = {kind: np.stack(rows).T for kind, rows in labels.items()}  # (A, N)
    return {
        kind: (np.stack(squares[kind]), dict(zip(attributes_of(kind), columns[kind], strict=True)))
        for kind in SIZES
    }


def soften(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Half of the batches lose detail or gain noise, as pictures out of a small diffusion model do."""
    draw = torch.rand(3, generator=generator)
    if draw[0] < 0.5:
        size = int(pixels.shape[-1] * (0.35 + 0.6 * draw[1]))
        small = F.interpolate(pixels, size=(size, size), mode="area")
        pixels = F.interpolate(small, size=pixels.shape[-2:], mode="bilinear", align_corners=False)
    noise = torch.randn(pixels.shape, generator=generator) * 0.08 * draw[2]
    shift = torch.randint(-3, 4, (2,), generator=generator).tolist()
    return torch.roll(pixels + noise, shift, dims=(2, 3))


def balanced_accuracy(truth: Sequence, guess: Sequence) -> float:
    """Mean over the classes that occur of the share read right."""
    truth, guess = np.asarray(truth), np.asarray(guess)
    return float(np.mean([(guess[truth == value] == value).mean() for value in np.unique(truth)]))


def train_reader(
    kind: str,
    squares: np.ndarray,
    labels: dict[str, np.ndarray],
    folder: Path,
    *,
    steps: int,
    batch: int = 64,
    seed: int = 0,
) -> AttributeReader:
    """Cross-entropy over all attributes, rarer classes weighted up; resumes in `folder`."""
    torch.manual_seed(seed)
    reader = AttributeReader(kind, attributes_of(kind)).train().to(memory_format=torch.channels_last)
    targets = {name: torch.from_numpy(column) for name, column in labels.items()}
    weights = {
        name: (len(column) / len(values) / torch.bincount(column, minlength=len(values)).clamp(min=1)).sqrt()
        for (name, column), values in zip(targets.items(), reader.attributes.values(), strict=True)
    }
    optimizer = torch.optim.AdamW(reader.parameters(), lr=3e-3, weight_decay=0.02)
    loop = TrainingLoop(
        folder, steps, {"reader": reader}, optimizer, {"kind": kind, "batch": batch, "seed": seed}
    )
    for step in loop:
        _, generator = step_rng(seed, step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 3e-3)
        rows = torch.randint(len(squares), (batch,), generator=generator)
        pixels = soften(_pixels(squares[rows.numpy()]), generator).contiguous(
            memory_format=torch.channels_last
        )
        with autocast():
            logits = reader(pixels)
        loss = torch.stack(
            [
                F.cross_entropy(
                    logits[name].float(), target[rows], weight=weights[name], label_smoothing=0.05
                )
                for name, target in targets.items()
            ]
        ).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loop.log(loss=loss.item())
    return reader.eval()


def figures(readers: dict[str, AttributeReader], drawn: Drawn) -> dict:
    """Balanced accuracy of every attribute on true renderings, and the number of squares."""
    out: dict = {}
    for kind, reader in readers.items():
        squares, labels = drawn[kind]
        read = reader.read(list(squares))
        out[kind] = {"count": len(squares)} | {
            name: round(balanced_accuracy([values[k] for k in labels[name]], [row[name] for row in read]), 4)
            for name, values in reader.attributes.items()
        }
    return out


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_part_arguments(parser, "reader", steps=3000)
    parser.add_argument("--pictures", type=Path, default=RUNS / "pictures", help="picture shards")
    parser.add_argument("--limit", type=int, default=12000, help="training pictures")
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=list(SIZES),
        default=list(SIZES),
        help="readers to train; all are measured",
    )


def _run(args: argparse.Namespace) -> None:
    start_part(args)
    drawn = labelled_squares(args.pictures, "train", args.limit, args.seed)
    for kind in args.kinds:
        squares, labels = drawn[kind]
        reader = train_reader(kind, squares, labels, args.out / kind, steps=args.steps, seed=args.seed)
        reader.save(JUDGES / f"{kind}.safetensors")
    held_out = labelled_squares(args.pictures, "validation", 2000, args.seed + 1)
    write_figures(args.pretrained, "reader", {"balanced_accuracy": figures(load_readers(), held_out)})


COMMANDS = {"reader": (_add_arguments, _run)}
