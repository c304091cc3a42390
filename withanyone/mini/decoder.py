"""The decoder's refiner, trained on what it will be given: latents of pictures, and latents the base made.

The base is small, and each of its tokens errs by itself: decoded plainly, its pictures fall into squares. So
more than half of the refiner's training latents are the base's own. A picture of the world gets noise of one
of the sampler's levels, the sampler takes it away again by caption and faces, and from what is left the
refiner is to draw the picture.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from withanyone import FaceAdapter, flow
from withanyone.arcface import Recognizer, align_face
from withanyone.precision import autocast

from . import pictures
from .base import TextModels, bucket_of_path, encode_tokens, latents_of, sample_from, sampler_of
from .build import SAMPLING_DEFAULTS
from .given import FaceModels, GivenFaces, draw_scales, faces_of_shard, perceptual_loss
from .latents import CONFIG_NAMES, PatchAutoencoder, export, psnr, to_tensor
from .loop import TrainingLoop, learning_rate, step_rng
from .muon import MuonAdamW, hidden_matrices
from .parts import RUNS, add_device_argument, add_part_arguments, start_part, write_figures
from .pictures import Bucket

logger = logging.getLogger(__name__)

BLOCKS = 6  # residual blocks of the refiner
SIZE = 96  # pixels a side of a training cut-out
FACE_SHARE = 0.75  # of the cut-outs that lie around a face; the others anywhere
MADE_SHARE = 0.6  # of the cut-outs whose latents the base made
MADE_PICTURES = 0.2  # share of a shard's pictures that the base makes over
START_LEVELS = (0.2, 0.35, 0.5, 0.6)  # noise at which it begins
FEATURE_WEIGHT = 0.05  # of how the faces look to the recogniser
FEATURE_FACES = 6  # a step


# What the base makes of real pictures


@dataclass(frozen=True)
class Maker:
    """The frozen parts that make latents: as the pipeline does, in one batch."""

    vae: PatchAutoencoder
    models: TextModels
    face_models: FaceModels
    transformer: FluxTransformer2DModel
    adapter: FaceAdapter

    @classmethod
    def from_pretrained(cls, folder: Path, adapter: Path, device: torch.device | str = "cpu") -> Maker:
        """Of a pipeline folder, with an adapter of another."""
        transformer = FluxTransformer2DModel.from_pretrained(folder / "transformer").eval().to(device)
        face_adapter = FaceAdapter.from_pretrained(adapter).eval().to(device)
        face_adapter.attach(transformer)
        return cls(
            PatchAutoencoder.from_pretrained(folder / "vae", dtype=torch.float32).eval().to(device),
            TextModels.from_pretrained(folder, device), FaceModels.from_pretrained(folder, device),
            transformer, face_adapter,
        )  # fmt: skip

    @torch.no_grad()
    def make(
        self, bucket: Bucket, images: np.ndarray, captions: list[str], given: GivenFaces, level: float,
        rng: np.random.Generator,
    ) -> Tensor:  # fmt: skip
        """images (B, H, W, 3) uint8 -> latents (B, C, H/8, W/8) that the sampler makes of them from noise of
        at most `level` on."""
        steps = SAMPLING_DEFAULTS["num_inference_steps"]
        sigmas = sampler_of(bucket, steps).sigmas
        first = int((sigmas <= level).nonzero()[0])
        tokens = encode_tokens(self.vae, to_tensor(images))
        noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(int(rng.integers(2**31))))
        noise = noise.to(tokens.device)
        faces = given.encode(self.adapter, draw_scales(len(images), rng))
        tokens = sample_from(
            self.transformer, self.models, flow.noisy_latents(tokens, noise, float(sigmas[first])),
            self.models.token_ids(captions), bucket, steps, SAMPLING_DEFAULTS["true_cfg_scale"],
            (faces, faces if SAMPLING_DEFAULTS["faces_in_negative"] else None), first,
        )  # fmt: skip
        return latents_of(self.vae, tokens, bucket)


@dataclass
class PicturePool:
    """Pictures of one size: pixels (N, H, W, 3) uint8, their faces' boxes (N, P, 4), zeros where nobody is,
    and landmarks (N, P, 5, 2); `made`: latents (N, C, H/8, W/8) that the base made of them, if it did."""

    pixels: np.ndarray
    bboxes: np.ndarray
    kps: np.ndarray
    made: Tensor | None = None


def read_pool(path: Path) -> PicturePool:
    """All pictures of a shard."""
    shard, _ = pictures.read_shard(path, "pixels", "bboxes", "kps")
    return PicturePool(shard["pixels"], shard["bboxes"], shard["kps"])


def made_pool(
    path: Path, folder: Path, maker: Maker, batch_size: int = 16, cache: Path | None = None
) -> PicturePool:
    """A share of a shard's pictures with what the base makes of them, kept in `folder`; `cache`: where their
    encoded faces lie, if not there."""
    kept = folder / path.name
    shard, captions = pictures.read_shard(path, "pixels", "bboxes", "kps")
    if not kept.exists():
        bucket = bucket_of_path(path)
        faces = faces_of_shard(path, cache or folder / "faces", maker.face_models, shard["kps"], bucket)
        rng = np.random.default_rng([*path.stem.encode(), 0xDEC])
        count = max(1, round(MADE_PICTURES * len(captions)))
        rows = np.sort(rng.permutation(len(captions))[:count])
        size = max(4, batch_size * 64 // bucket.num_tokens)
        made = []
        for start in range(0, count, size):
            chosen = [int(row) for row in rows[start : start + size]]
            level = float(rng.choice(START_LEVELS))
            given = GivenFaces.of_rows(faces, chosen)
            told = [captions[row][int(rng.integers(len(captions[row])))] for row in chosen]
            made.append(maker.make(bucket, shard["pixels"][chosen], told, given, level, rng).half().cpu())
        folder.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(".partial")
        save_file({"rows": torch.from_numpy(rows), "latents": torch.cat(made)}, partial)
        partial.replace(kept)
        logger.info("%s: the base made %d of its pictures over", path.name, count)
    with safe_open(kept, framework="pt") as file:
        rows, made = file.get_tensor("rows").numpy(), file.get_tensor("latents")
    return PicturePool(shard["pixels"][rows], shard["bboxes"][rows], shard["kps"][rows], made)


# Training


def reconstruction_loss(pictures: Tensor, others: Tensor, squared: float) -> Tensor:
    """Mean absolute error of colours and of their differences between neighbours, plus `squared` times the
    mean square.

    The differences make edges count; the square is what PSNR measures. pictures, others (B, 3, H, W) in [-1,
    1].
    """
    error = others - pictures
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 0.5 * edges + squared * error.pow(2).mean()


class CutOuts(NamedTuple):
    """A batch of square pieces of pictures."""

    pictures: Tensor  # (B, 3, S, S) in [-1, 1]
    made: dict[int, Tensor]  # row -> latents (C, S/8, S/8) of the base
    faces: list[tuple[int, np.ndarray]]  # row and landmarks (5, 2) of faces that lie in the middle


def draw_cut_outs(pools: Sequence[PicturePool], count: int, size: int, rng: np.random.Generator) -> CutOuts:
    """Cut-outs at multiples of 8 pixels from random pictures, most of them around a face.

    Where there are pools that the base made, MADE_SHARE of the cut-outs are theirs.
    """
    made_pools = [pool for pool in pools if pool.made is not None]
    plain_pools = [pool for pool in pools if pool.made is None] or made_pools
    pixels, made, faces = np.empty((count, size, size, 3), np.uint8), {}, []
    for index in range(count):
        is_made = bool(made_pools) and rng.random() < MADE_SHARE
        among = made_pools if is_made else plain_pools
        pool = among[int(rng.integers(len(among)))]
        row = int(rng.integers(len(pool.pixels)))
        cells = (np.array(pool.pixels.shape[1:3]) - size) // 8  # the last place, in cells down and across
        place = rng.integers(cells + 1)
        people = np.nonzero(pool.bboxes[row, :, 3] > 0)[0]
        person = None
        if len(people) and rng.random() < FACE_SHARE:
            person = rng.choice(people)
            x1, y1, x2, y2 = pool.bboxes[row, person]
            middle = (np.array([y1 + y2, x1 + x2]) - size) / 2 + rng.uniform(-8, 8, 2)
            place = np.clip(np.round(middle / 8).astype(int), 0, cells)
        top, left = (int(cell) for cell in 8 * place)
        pixels[index] = pool.pixels[row, top : top + size, left : left + size]
        if is_made:
            down, across = (slice(start // 8, (start + size) // 8) for start in (top, left))
            made[index] = pool.made[row, :, down, across].float()
        if person is not None:
            faces.append((index, pool.kps[row, person] - np.array([left, top], np.float32)))
    return CutOuts(to_tensor(pixels), made, faces)


def widened(vae: PatchAutoencoder, blocks: int) -> PatchAutoencoder:
    """A copy with `blocks` residual blocks; those it has more change nothing yet."""
    config = {name: vae.config[name] for name in CONFIG_NAMES}
    out = PatchAutoencoder(**{**config, "layers_per_block": blocks})
    for block in out.refiner.blocks[vae.config.layers_per_block :]:
        nn.init.zeros_(block.conv2.weight)
        nn.init.zeros_(block.conv2.bias)
    out.load_state_dict({**out.state_dict(), **vae.state_dict()})
    return out


def train_refiner(
    vae: PatchAutoencoder,
    folder: Path,
    pools: Sequence[PicturePool],
    steps: int,
    batch_size: int = 8,
    seed: int = 0,
    recognizer: Recognizer | None = None,
    size: int = SIZE,
) -> None:
    """Trains the refiner of `vae` in place, in `folder`, resuming where a checkpoint is found; the code
    stays. With a `recognizer` faces are to look to it as in the pictures."""
    vae.encoder.requires_grad_(False)
    vae.decoder.requires_grad_(False)
    vae.to(memory_format=torch.channels_last)
    refiner = vae.refiner
    matrices = hidden_matrices(refiner.blocks)
    others = [p for p in refiner.parameters() if all(p is not matrix for matrix in matrices)]
    optimizer = MuonAdamW(matrices, others, lr=2e-3)
    config = {"part": "decoder", "batch_size": batch_size, "seed": seed}
    loop = TrainingLoop(folder, steps, {"refiner": refiner}, optimizer, config)
    for step in loop:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 2e-3)
        rng, _ = step_rng(seed, step)
        images, made, faces = draw_cut_outs(pools, batch_size, size, rng)
        images = images.to(vae.device)
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.mode()
            if made:
                latents[list(made)] = torch.stack(list(made.values())).to(latents)
        with autocast(vae.device):
            decoded = vae.decode(latents).sample
        decoded = decoded.float()
        loss = reconstruction_loss(images, decoded, squared=4.0 * step / steps)
        if recognizer is not None and faces:
            faces = faces[: max(FEATURE_FACES, 3 * batch_size // 4)]
            rows = torch.tensor([row for row, _ in faces]).to(vae.device)
            kps = torch.from_numpy(np.stack([points for _, points in faces])).float()
            loss = loss + FEATURE_WEIGHT * perceptual_loss(recognizer, decoded[rows], images[rows], kps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(refiner.parameters(), 1.0)
        optimizer.step()
        if vae.device.type == "cpu" or step % 20 == 0:  # reading it waits for the device
            loop.log(loss=loss.item())
    vae.to(memory_format=torch.contiguous_format).eval()


# Measuring


@torch.no_grad()
def psnr_figures(vae: PatchAutoencoder, shards: Sequence[np.ndarray]) -> dict[str, float]:
    """Mean PSNR of held-out pictures, by the linear code alone and with the refiner, at the saved
    precision."""
    linear, refined = [], []
    for images in shards:
        for start in range(0, len(images), 25):
            x = to_tensor(images[start : start + 25]).to(vae.device)
            latents = vae.encode(x).latent_dist.mode()
            linear.append(psnr(x, vae.decoder(latents).clamp(-1, 1)))
            refined.append(psnr(x, vae.decode(latents).sample.clamp(-1, 1)))
    return {
        "pictures": sum(len(images) for images in shards),
        "psnr_linear_code_db": round(float(torch.cat(linear).mean()), 2),
        "psnr_db": round(float(torch.cat(refined).mean()), 2),
    }


@torch.no_grad()
def identity_figures(vae: PatchAutoencoder, folder: Path, face_pack: Path) -> dict[str, object]:
    """Cosine of the recogniser's embedding before and after the code, for held-out faces by height."""
    recognizer = Recognizer.from_onnx(face_pack / "recognition.onnx").eval().to(vae.device)
    cosines: dict[str, list[Tensor]] = {"40 to 60 px": [], "60 px and more": []}
    for path in pictures.shard_paths(folder, "validation"):
        shard, _ = pictures.read_shard(path, "pixels", "bboxes", "kps", "identities")
        for row in range(min(50, len(shard["pixels"]))):
            people = np.nonzero(shard["identities"][row] >= 0)[0]
            if len(people) == 0:
                continue
            x = to_tensor(shard["pixels"][row : row + 1]).to(vae.device)
            y = vae(x).sample.clamp(-1, 1)
            kps = torch.from_numpy(shard["kps"][row, people])
            before, after = (
                recognizer(align_face(image.expand(len(people), -1, -1, -1), kps)) for image in (x, y)
            )
            heights = shard["bboxes"][row, people, 3] - shard["bboxes"][row, people, 1]
            for cosine, height in zip(F.cosine_similarity(before, after), heights, strict=True):
                if height >= 40:
                    cosines["40 to 60 px" if height < 60 else "60 px and more"].append(cosine)
    return {
        name: {
            "faces": len(values),
            "median": round(float(torch.stack(values).median()), 4),
            "10th_percentile": round(float(torch.stack(values).quantile(0.1)), 4),
        }
        for name, values in cosines.items()
        if values
    }


@torch.no_grad()
def made_figures(vae: PatchAutoencoder, pools: Sequence[PicturePool]) -> dict[str, object]:
    """PSNR of what is decoded from the base's latents beside the pictures it made over."""
    values = []
    for pool in pools:
        for start in range(0, len(pool.pixels), 25):
            rows = slice(start, start + 25)
            decoded = vae.decode(pool.made[rows].float().to(vae.device)).sample
            values.append(psnr(to_tensor(pool.pixels[rows]), decoded.cpu()))
    return {"pictures": sum(map(len, values)), "psnr_db": round(float(torch.cat(values).mean()), 2)}


# Command


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_part_arguments(parser, "decoder", steps=5000)
    parser.add_argument("--pictures", type=Path, default=RUNS / "pictures", help="picture shards")
    parser.add_argument("--shards", type=int, default=27, help="training shards")
    parser.add_argument("--batch-size", type=int, default=8, help="cut-outs a step")
    parser.add_argument("--made-batch", type=int, default=16, help="portraits that the base makes at once")
    parser.add_argument("--cache", type=Path, help="faces that `latent-pictures` encoded")
    add_device_argument(parser)
    parser.add_argument(
        "--adapter", type=Path, help="adapter that gives the base its faces; default: the pipeline's"
    )


def _run(args: argparse.Namespace) -> None:
    start_part(args)
    adapter = args.adapter or args.pretrained / "face_adapter"
    maker = Maker.from_pretrained(args.pretrained, adapter, args.device)
    train, held_out = (pictures.shard_paths(args.pictures, split) for split in ("train", "validation"))
    train = train[: args.shards]
    folder, batch = args.out / "made", args.made_batch
    made = {path: made_pool(path, folder, maker, batch, args.cache) for path in (*train, *held_out)}
    vae = widened(maker.vae, BLOCKS).to(args.device)
    pools = [*(read_pool(path) for path in train), *(made[path] for path in train)]
    train_refiner(
        vae,
        args.out,
        pools,
        args.steps,
        args.batch_size,
        seed=args.seed,
        recognizer=maker.face_models.recognizer.requires_grad_(False),
    )
    export(vae, args.pretrained)
    saved = PatchAutoencoder.from_pretrained(args.pretrained / "vae", dtype=torch.float32).eval()
    saved.to(args.device)
    images = [pictures.read_shard(path, "pixels")[0]["pixels"][:50] for path in held_out]
    figures: dict[str, object] = {
        **psnr_figures(saved, images),
        "identity_cosine": identity_figures(saved, args.pictures, args.pretrained / "face_analyzer"),
        "made_by_the_base": made_figures(saved, [made[path] for path in held_out]),
    }
    write_figures(args.pretrained, "latents", figures)


COMMANDS = {"decoder": (_add_arguments, _run)}
