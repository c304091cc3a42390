"""The miniature's image encoder, in SigLIP's place: a small SiglipVisionModel that sees face crops.

Trained for what changes from picture to picture (hair, hat, glasses, beard, expression, pose, light), with a
pull towards the frozen text embedding of the person's description, and for the crop's colours in their
places, so that its tokens hold the photo's appearance and not the identity alone.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from withanyone.faces import crop_face
from withanyone.precision import autocast

from . import text, words, world
from .latents import to_tensor
from .loop import TrainingLoop, learning_rate, step_rng
from .parts import RUNS, add_part_arguments, save_half, start_part, write_figures
from .pictures import read_shard, shard_paths

logger = logging.getLogger(__name__)

IMAGE_SIZE = 112
PATCH_SIZE = 16
ATTRIBUTES = (*world.PERSON_ATTRIBUTES.items(), ("light", world.PICTURE_ATTRIBUTES["light"]))
#: Attributes that a crop of the face cannot show well; no head is trained for them.
OUTSIDE_THE_CROP = ("clothing", "clothing_color")
SEEN = tuple((name, values) for name, values in ATTRIBUTES if name not in OUTSIDE_THE_CROP)
TEMPERATURE = 0.07


def vision_config() -> SiglipVisionConfig:
    """112 px in patches of 16: 49 tokens, 128 wide, four layers."""
    return SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )


# Crops


def face_crop(image: np.ndarray, bbox: Sequence[float], size: int = IMAGE_SIZE) -> np.ndarray:
    """The square around a face as the pipeline cuts it: (H, W, 3) uint8 and xyxy pixels -> (size, size, 3)
    uint8."""
    return np.asarray(crop_face(Image.fromarray(image), bbox, size))


@dataclass
class Crops:
    """Face crops (N, 112, 112, 3) uint8 with what is true of them, aligned by row.

    labels (N, len(ATTRIBUTES)); angles (N, 3) yaw, pitch, roll in radians; identities (N,).
    """

    pixels: np.ndarray
    labels: np.ndarray
    angles: np.ndarray
    identities: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)


def load_crops(folder: Path, split: str, limit: int, min_height: float = 36.0, seed: int = 0) -> Crops:
    """Crops of faces of at least `min_height` pixels from the picture shards, boxes jittered as a detector's
    are."""
    rng = np.random.default_rng((seed, 0xC0))
    pixels, labels, angles, identities = [], [], [], []
    light = list(world.PICTURE_ATTRIBUTES).index("light")
    for path in shard_paths(folder, split):
        shard, _ = read_shard(path)
        for row, place in zip(*np.nonzero(shard["identities"] >= 0), strict=True):
            bbox = shard["bboxes"][row, place]
            height = bbox[3] - bbox[1]
            if height < min_height or len(pixels) >= limit:
                continue
            jittered = bbox + rng.normal(0, 0.03, 4) * height
            pixels.append(face_crop(shard["pixels"][row], jittered))
            labels.append([*shard["attributes"][row, place], shard["setting"][row, light]])
            angles.append(shard["angles"][row, place])
            identities.append(shard["identities"][row, place])
        if len(pixels) >= limit:
            break
    if not pixels:
        raise ValueError(
            f"`pictures` {folder} holds no {split} shards: run `python -m withanyone.mini pictures` first."
        )
    return Crops(np.stack(pixels), np.array(labels), np.stack(angles), np.array(identities))


def draw(crops: Crops, rows: np.ndarray, rng: np.random.Generator) -> Crops:
    """Some of the crops, each as it is or, as often, flipped left to right, with what is true of it then."""
    pose = list(world.PERSON_ATTRIBUTES).index("pose")
    left, right = (world.PERSON_ATTRIBUTES["pose"].index(side) for side in ("left", "right"))
    pixels, labels, angles = crops.pixels[rows].copy(), crops.labels[rows].copy(), crops.angles[rows].copy()
    flipped = rng.random(len(rows)) < 0.5
    pixels[flipped] = pixels[flipped, :, ::-1]
    angles[flipped] *= (-1, 1, -1)  # yaw and roll turn the other way
    swapped = np.select([labels[:, pose] == left, labels[:, pose] == right], [right, left], labels[:, pose])
    labels[:, pose] = np.where(flipped, swapped, labels[:, pose])
    return Crops(pixels, labels, angles, crops.identities[rows])


def description(labels: np.ndarray, rng: np.random.Generator) -> str:
    """A person in words, from a row of `Crops.labels`."""
    attributes = {name: values[index] for (name, values), index in zip(ATTRIBUTES, labels, strict=True)}
    return words.describe_person(attributes, rng, 0.9)


# Training


class Heads(nn.Module):
    """What the encoder is asked while it is trained; none of it is kept.

    From the tokens as a set: every attribute, a query each; three angles; from each token: its own patch in
    4 x 4 colours; from the pooled vector: a direction in the text encoder's space.
    """

    def __init__(self, width: int = 128, text_width: int = text.WIDTH) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(SEEN) + 1, width) * width**-0.5)
        self.values = nn.Linear(width, width)
        self.attributes = nn.ModuleList(nn.Linear(width, len(values)) for _, values in SEEN)
        self.angles = nn.Linear(width, 3)
        self.colors = nn.Linear(width, 48)
        self.to_text = nn.Linear(width, text_width)

    def forward(self, tokens: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """tokens (B, 49, D) -> logits a seen attribute, angles (B, 3), colours (B, 49, 48)."""
        scores = torch.einsum("btd,qd->bqt", tokens, self.queries)
        read = scores.softmax(dim=-1) @ self.values(tokens)  # (B, Q, D)
        logits = [head(read[:, index]) for index, head in enumerate(self.attributes)]
        return logits, self.angles(read[:, -1]), self.colors(tokens)


def patch_colors(pixels: Tensor) -> Tensor:
    """Each patch of 16 x 16 pixels shrunk to 4 x 4: (B, 3, 112, 112) -> (B, 49, 48)."""
    small = F.avg_pool2d(pixels, PATCH_SIZE // 4)  # (B, 3, 28, 28)
    return F.unfold(small, 4, stride=4).transpose(1, 2)  # (B, 49, 48)


def contrastive_loss(images: Tensor, texts: Tensor) -> Tensor:
    """-log softmax of cos / TEMPERATURE at the matching pair, both ways. images, texts (B, D)."""
    similarity = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T / TEMPERATURE  # (B, B)
    match = torch.arange(len(similarity))
    return (F.cross_entropy(similarity, match) + F.cross_entropy(similarity.T, match)) / 2


def train(
    folder: Path, crops: Crops, text_encoder: CLIPTextModel, steps: int, batch_size: int = 64, seed: int = 0
) -> SiglipVisionModel:
    """Trains the encoder in `folder`, resuming where a checkpoint is found."""
    torch.manual_seed(seed)
    encoder, heads = SiglipVisionModel(vision_config()), Heads()
    tokenizer = text.build_tokenizer()
    text_encoder.requires_grad_(False).eval()
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.02)
    config = {"part": "image encoder", "crops": len(crops), "batch_size": batch_size, "seed": seed}
    loop = TrainingLoop(folder, steps, {"encoder": encoder, "heads": heads}, optimizer, config)
    seen = [index for index, (name, _) in enumerate(ATTRIBUTES) if name not in OUTSIDE_THE_CROP]
    for step in loop:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 1.5e-3)
        rng, _ = step_rng(seed, step)
        rows = rng.choice(len(crops), batch_size, replace=False)
        batch = draw(crops, rows, rng)
        pixels, labels = to_tensor(batch.pixels), torch.from_numpy(batch.labels)
        described = [description(row, rng) for row in batch.labels]
        with torch.no_grad():
            texts = text_encoder(text.tokenize(tokenizer, described)).pooler_output
        with autocast():
            output = encoder(pixels)
            logits, angles, colors = heads(output.last_hidden_state)
            images = heads.to_text(output.pooler_output)
        attribute_loss = sum(
            F.cross_entropy(scores.float(), labels[:, index])
            for scores, index in zip(logits, seen, strict=True)
        ) / len(seen)
        angle_loss = F.mse_loss(angles.float(), torch.from_numpy(batch.angles) / 0.3)
        color_loss = F.mse_loss(colors.float(), patch_colors(pixels))
        text_loss = contrastive_loss(images.float(), texts)
        optimizer.zero_grad(set_to_none=True)
        (attribute_loss + 0.3 * angle_loss + color_loss + 0.2 * text_loss).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        loop.log(
            attributes=attribute_loss.item(),
            angles=angle_loss.item(),
            colors=color_loss.item(),
            text=text_loss.item(),
        )
    return encoder.eval()


# Measuring


@torch.no_grad()
def features(encoder: SiglipVisionModel, pixels: np.ndarray, batch_size: int = 100) -> Tensor:
    """All tokens of each crop as one row: (N, 49 * D)."""
    batches = [to_tensor(pixels[start : start + batch_size]) for start in range(0, len(pixels), batch_size)]
    return torch.cat([encoder(batch).last_hidden_state.flatten(1) for batch in batches])


def ridge(inputs: Tensor, targets: Tensor, strength: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """The linear map W, b with least |X W + b - Y|^2 + strength * mean|x|^2 |W|^2, in its dual form (few
    rows)."""
    center, offset = inputs.mean(dim=0), targets.mean(dim=0)
    x, y = (inputs - center).double(), (targets - offset).double()
    gram = x @ x.T
    gram += strength * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return (x.T @ torch.linalg.solve(gram, y)).float(), center, offset


def apply(probe: tuple[Tensor, Tensor, Tensor], inputs: Tensor) -> Tensor:
    """(N, X) through a map that `ridge` found."""
    weight, center, offset = probe
    return (inputs - center) @ weight + offset


def balanced_accuracy(guesses: np.ndarray, truth: np.ndarray) -> float:
    """Mean over the values that occur of the share found of each."""
    return float(np.mean([(guesses[truth == value] == value).mean() for value in np.unique(truth)]))


def probe_figures(encoder: SiglipVisionModel, train_crops: Crops, held_out: Crops) -> dict[str, float]:
    """Balanced accuracy of a linear probe (ridge on one-hot targets) for each seen attribute, and yaw's
    R^2."""
    inputs, others = features(encoder, train_crops.pixels), features(encoder, held_out.pixels)
    columns, result = [], {}
    for index, (name, values) in enumerate(ATTRIBUTES):
        if name not in OUTSIDE_THE_CROP:
            one_hot = F.one_hot(torch.from_numpy(train_crops.labels[:, index]), len(values)).float()
            columns.append((name, index, one_hot / one_hot.mean(dim=0).clamp(min=1e-3).sqrt()))
    yaw = torch.from_numpy(train_crops.angles[:, :1])
    targets = torch.cat([*(target for _, _, target in columns), yaw], dim=1)
    found = apply(ridge(inputs, targets, 0.01), others)
    start = 0
    for name, index, target in columns:
        guesses = found[:, start : start + target.shape[1]].argmax(dim=1).numpy()
        result[name] = round(balanced_accuracy(guesses, held_out.labels[:, index]), 4)
        start += target.shape[1]
    true_yaw = torch.from_numpy(held_out.angles[:, 0])
    residual = (found[:, -1] - true_yaw).pow(2).mean() / true_yaw.var()
    return result | {"yaw_r2": round(1 - float(residual), 4)}


@torch.no_grad()
def retrieval_figures(
    encoder: SiglipVisionModel,
    text_encoder: CLIPTextModel,
    train_crops: Crops,
    held_out: Crops,
    among: int = 100,
) -> dict[str, float]:
    """How often, among `among` held-out people, a crop finds its own description first and the reverse.

    The crop's tokens are brought to CLIP's pooled space by a linear map fitted on training people.
    """
    tokenizer, rng = text.build_tokenizer(), np.random.default_rng(0x7E)

    def embed(crops: Crops) -> Tensor:
        described = [description(row, rng) for row in crops.labels]
        return text_encoder(text.tokenize(tokenizer, described)).pooler_output

    probe = ridge(features(encoder, train_crops.pixels), embed(train_crops), 0.01)
    texts = embed(held_out)
    images = apply(probe, features(encoder, held_out.pixels))
    center = texts.mean(dim=0)
    similarity = F.normalize(images - center, dim=1) @ F.normalize(texts - center, dim=1).T
    hits = {"caption_from_picture": [], "picture_from_caption": []}
    for start in range(0, len(held_out) - among + 1, among):
        block = similarity[start : start + among, start : start + among]
        hits["caption_from_picture"].append(
            (block.argmax(dim=1) == torch.arange(among)).float().mean().item()
        )
        hits["picture_from_caption"].append(
            (block.argmax(dim=0) == torch.arange(among)).float().mean().item()
        )
    return {"among": among} | {name: round(float(np.mean(shares)), 4) for name, shares in hits.items()}


def export(encoder: SiglipVisionModel, out: Path) -> None:
    """Writes the encoder and its processor into a pipeline folder, in half precision."""
    save_half(encoder, out / "image_encoder")
    SiglipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(
        out / "feature_extractor"
    )


def measure(encoder: SiglipVisionModel, text_encoder: CLIPTextModel, pictures: Path) -> dict[str, object]:
    """Figures on validation people: linear probes beside random weights, and retrieval by text."""
    fitted_on, held_out = (
        load_crops(pictures, "train", 3000, seed=1),
        load_crops(pictures, "validation", 1000, seed=1),
    )
    torch.manual_seed(0)
    untrained = SiglipVisionModel(vision_config()).eval()
    return {
        "held_out_crops": len(held_out),
        "linear_probe_balanced_accuracy": probe_figures(encoder, fitted_on, held_out),
        "linear_probe_on_random_weights": probe_figures(untrained, fitted_on, held_out),
        "retrieval": retrieval_figures(encoder, text_encoder, fitted_on, held_out),
        "retrieval_on_random_weights": retrieval_figures(untrained, text_encoder, fitted_on, held_out),
    }


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_part_arguments(parser, "image_encoder", steps=3000)
    parser.add_argument("--pictures", type=Path, default=RUNS / "pictures", help="picture shards")
    parser.add_argument("--crops", type=int, default=24000, help="training crops held in memory")
    parser.add_argument("--batch-size", type=int, default=64)


def _run(args: argparse.Namespace) -> None:
    start_part(args)
    text_encoder = CLIPTextModel.from_pretrained(args.pretrained / "text_encoder", dtype=torch.float32)
    crops = load_crops(args.pictures, "train", args.crops)
    encoder = train(args.out, crops, text_encoder, args.steps, args.batch_size, args.seed)
    export(encoder, args.pretrained)
    write_figures(args.pretrained, "image-encoder", measure(encoder, text_encoder, args.pictures))


COMMANDS = {"image-encoder": (_add_arguments, _run)}
