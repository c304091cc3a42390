"""The miniature's FLUX: a FluxTransformer2DModel trained from nothing to draw people from captions.

Flow matching as FluxPipeline samples it: the transformer sees packed noisy latents at `sigma` and predicts
the velocity noise - latents. Captions go through the frozen text encoders; one in ten is replaced by the
empty one, so that true guidance works. Sizes are mixed, a batch of one size a step, about the same number of
tokens each.

The learning rate is constant on the trunk, which can be continued for ever, and falls to zero on a branch
that starts from the trunk's last step; the branch's averaged weights are the model.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.distributed as dist
import torch.fx.experimental._config
from diffusers import FluxPipeline, FluxTransformer2DModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, PreTrainedTokenizerFast, T5EncoderModel

from withanyone import FaceAdapter, flow
from withanyone.adapter import CONDITIONING_KEY
from withanyone.conditioning import FaceConditioning
from withanyone.faces import FaceAnalyzer
from withanyone.precision import autocast, make_muon

from . import pictures, text
from .given import (
    FaceModels,
    GivenFaces,
    draw_scales,
    encode_faces,
    faces_of_shard,
    new_adapter,
    perceptual_loss,
)
from .latents import PatchAutoencoder, to_tensor
from .loop import TrainingLoop, step_rng
from .parts import (
    RUNS,
    add_device_argument,
    add_part_arguments,
    device_name,
    export_adapter,
    part_of,
    start_part,
    write_figures,
)
from .pictures import Bucket
from .scheduler import SeededFlowMatchScheduler

logger = logging.getLogger(__name__)

PATCH = 16  # pixels a side of a FLUX token
SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)  # where the held-out error is measured
HELD_OUT_PICTURES = 256  # on how many it is measured at the end
TEXT_DROPOUT = 0.1
OPEN_END = 10**6  # the trunk's own number of steps: it can always be continued
CAPTIONS = 3  # captions of each training picture
SHORT_TEXT = 24  # tokens that every caption of one person fits in
#: Draws of a bucket at the trunk's start and from step 3000 on: portraits teach faces cheapest, groups come
#: in later.
SHARES = {
    pictures.PORTRAIT: (0.76, 0.42),
    pictures.PAIR: (0.10, 0.20),
    pictures.GROUP: (0.06, 0.22),
    pictures.WIDE: (0.03, 0.05),
    pictures.TALL: (0.03, 0.04),
    pictures.WIDE_GROUP: (0.02, 0.07),
}
SHARES_SETTLE = 3000
FLAT_SHARE = 0.6  # of a timed run's time has the full learning rate
#: How much more a token of a face counts in the loss than any other: faces are a tenth of a picture, and what
#: people look at.
FACE_WEIGHT = 8.0
#: Of how a face's clean estimate looks to the recogniser, where noise is low enough for it to be a face.
FEATURE_WEIGHT = 0.1
FEATURE_MAX_SIGMA = 0.5
FEATURE_FACES = 24  # a step and process, or more where a step has more tokens:
TOKENS_A_FEATURE_FACE = 256
FACE_SHARE = 0.8  # of batches whose people are given by their faces, where an adapter learns along


def transformer_config(latent_channels: int = 24) -> dict[str, object]:
    """FLUX 256 wide: two double and four single blocks, 9 M parameters."""
    return {
        "patch_size": 1,
        "in_channels": 4 * latent_channels,
        "num_layers": 2,
        "num_single_layers": 4,
        "attention_head_dim": 64,
        "num_attention_heads": 4,
        "joint_attention_dim": text.WIDTH,
        "pooled_projection_dim": text.WIDTH,
        "guidance_embeds": False,
        "axes_dims_rope": (16, 24, 24),
    }


# Text


@dataclass
class TextModels:
    """The frozen tokenizer and encoders of a pipeline folder."""

    tokenizer: PreTrainedTokenizerFast
    clip: CLIPTextModel
    t5: T5EncoderModel

    @classmethod
    def from_pretrained(cls, folder: Path, device: torch.device | str = "cpu") -> TextModels:
        """Loads them in fp32."""
        return cls(
            PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer_2"),
            CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval().to(device),
            T5EncoderModel.from_pretrained(folder / "text_encoder_2", dtype=torch.float32).eval().to(device),
        )

    @torch.no_grad()
    def encode(self, token_ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """token_ids (B, 64) padded -> T5's states (B, length, D), padded to `length`, and CLIP's pooled (B,
        D)."""
        used = int((token_ids != self.tokenizer.pad_token_id).sum(dim=1).max())
        token_ids = token_ids.to(self.clip.device)
        return self.t5(token_ids[:, :length])[0], self.clip(token_ids[:, :used]).pooler_output

    def token_ids(self, captions: list[str]) -> Tensor:
        """(B, 64) padded token ids, as FluxPipeline makes them."""
        return text.tokenize(self.tokenizer, captions, text.MAX_TEXT_TOKENS)


# Data


def bucket_of_path(path: Path) -> Bucket:
    """The bucket of a shard's pictures, by its file's number."""
    return pictures.bucket_of(int(path.stem.split("_")[1]))


def pack(latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) -> FLUX tokens (B, h/2 * w/2, 4C), as FluxPipeline packs them."""
    batch, channels, height, width = latents.shape
    return FluxPipeline._pack_latents(latents, batch, channels, height, width)


def encode_tokens(vae: PatchAutoencoder, x: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] -> FLUX tokens (B, T, 96)."""
    latents = vae.encode(x.to(vae.device)).latent_dist.mode()
    return pack((latents - vae.config.shift_factor) * vae.config.scaling_factor)


def latents_of(vae: PatchAutoencoder, tokens: Tensor, bucket: Bucket) -> Tensor:
    """FLUX tokens (B, T, 96) -> what `vae` decodes (B, C, H/8, W/8)."""
    latents = FluxPipeline._unpack_latents(tokens, bucket.height, bucket.width, 8)
    return latents / vae.config.scaling_factor + vae.config.shift_factor


def decode_tokens(vae: PatchAutoencoder, tokens: Tensor, bucket: Bucket) -> Tensor:
    """FLUX tokens (B, T, 96) -> pictures (B, 3, H, W), about [-1, 1]. Gradients flow through."""
    return vae.decode(latents_of(vae, tokens, bucket)).sample


def face_share(bboxes: np.ndarray, bucket: Bucket, mirrored: bool = False) -> Tensor:
    """How much of each token's 16 x 16 pixels lies in a face's box: (N, T) fp16 in [0, 1].

    bboxes: (N, P, 4) xyxy pixels, zeros where nobody is. mirrored: of the pictures flipped left to right.
    """

    def overlap(low: np.ndarray, high: np.ndarray, size: int) -> np.ndarray:
        start = np.arange(0, size, PATCH)
        inside = np.minimum(high[..., None], start + PATCH) - np.maximum(low[..., None], start)
        return np.clip(inside / PATCH, 0, 1)  # (N, P, size / 16)

    left, top, right, bottom = np.moveaxis(bboxes.astype(np.float64), -1, 0)
    across = overlap(left, right, bucket.width)
    across = across[..., ::-1] if mirrored else across
    share = (overlap(top, bottom, bucket.height)[..., None] * across[..., None, :]).max(axis=1)
    return torch.from_numpy(share.reshape(len(share), -1)).half()


@torch.no_grad()
def encode_shard(
    path: Path, cache: Path, vae: PatchAutoencoder, models: TextModels, mirror: bool
) -> dict[str, Tensor]:
    """A shard's pictures as tokens (N, T, 96) fp16 and its captions as ids (N, K, 64) uint8; kept in `cache`.

    mirror: the pictures flipped left to right as well, with captions to match: twice the pictures.
    """
    kept = cache / path.name
    if not kept.exists():
        shard, captions = pictures.read_shard(path, "pixels", "attributes", "setting")
        number = int(path.stem.split("_")[1])
        tokens, ids = [], []
        for mirrored in (False, True) if mirror else (False,):
            for start in range(0, len(shard["pixels"]), 50):
                images = shard["pixels"][start : start + 50]
                x = to_tensor(np.ascontiguousarray(images[:, :, ::-1]) if mirrored else images)
                tokens.append(encode_tokens(vae, x).half().cpu())
            if mirror:
                rng = np.random.default_rng((number, mirrored))
                captions = pictures.captions_from_attributes(shard, CAPTIONS, rng, mirrored)
            told = [models.token_ids([several[k] for several in captions]) for k in range(len(captions[0]))]
            ids.append(torch.stack(told, dim=1).to(torch.uint8))
        cache.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(".partial")
        save_file({"tokens": torch.cat(tokens), "token_ids": torch.cat(ids)}, partial)
        partial.replace(kept)
    with safe_open(kept, framework="pt") as file:
        return {name: file.get_tensor(name) for name in ("tokens", "token_ids")}


class Drawn(NamedTuple):
    """A batch of pictures."""

    tokens: Tensor  # (B, T, 96) fp32
    token_ids: Tensor  # (B, 64): one of the picture's captions
    face_share: Tensor  # (B, T) fp32, of `face_share`
    faces: GivenFaces | None


class LatentPictures:
    """All pictures as tokens, by bucket; `refresh` takes in shards that were rendered since.

    What is large lies where the models are, so a GPU draws its batches from its own memory. With `waits` only
    shards are taken that another process has encoded (`python -m withanyone.mini latent-pictures`).
    """

    def __init__(
        self,
        folder: Path,
        cache: Path,
        split: str,
        vae: PatchAutoencoder,
        models: TextModels,
        face_models: FaceModels | None = None,
        waits: bool = False,
    ) -> None:
        self.folder, self.cache, self.split, self.vae, self.models = folder, cache, split, vae, models
        self.face_models, self.waits = face_models, waits
        #: One shard a bucket, made of all: the pictures, then the mirrored ones.
        self.pools: dict[Bucket, dict[str, Tensor]] = {}
        self.seen: set[str] = set()
        self.refresh()

    def refresh(self) -> None:
        """Loads the shards that are new."""
        new: dict[Bucket, list[dict[str, Tensor]]] = {}
        for path in pictures.shard_paths(self.folder, self.split):
            if path.name not in self.seen and (not self.waits or is_encoded(path, self.cache)):
                self.seen.add(path.name)
                new.setdefault(bucket_of_path(path), []).append(self._read(path))
        for bucket, shards in new.items():
            pool = self.pools.get(bucket)
            self.pools[bucket] = joined([*([] if pool is None else [pool]), *shards])

    def wait(self, seconds: float = 2.0) -> None:
        """Until another process has encoded the first portraits."""
        while pictures.PORTRAIT not in self.pools:
            logger.info("%s has no encoded portraits yet: waiting for `latent-pictures`", self.cache)
            time.sleep(seconds)
            self.refresh()

    def _read(self, path: Path) -> dict[str, Tensor]:
        bucket, mirror = bucket_of_path(path), self.split == "train"
        shard = encode_shard(path, self.cache, self.vae, self.models, mirror)
        known = pictures.read_shard(path, "bboxes", "kps")[0]
        sides = (False, True) if mirror else (False,)
        shard["face_share"] = torch.cat([face_share(known["bboxes"], bucket, side) for side in sides])
        shard["plain"] = torch.arange(len(known["bboxes"]))  # rows that are not mirrored
        if self.face_models is not None:
            shard |= faces_of_shard(path, self.cache, self.face_models, known["kps"], bucket)
        for name in ("tokens", "face_share"):
            shard[name] = shard[name].to(self.vae.device)
        return shard

    def count(self, bucket: Bucket) -> int:
        """Number of pictures of a bucket."""
        return len(self.pools[bucket]["tokens"]) if bucket in self.pools else 0

    def draw(
        self, bucket: Bucket, batch_size: int, rng: np.random.Generator, with_faces: bool = False
    ) -> Drawn:
        """Random pictures; with_faces: and the faces of their people, which mirrored pictures don't have."""
        pool = self.pools[bucket]
        rows = torch.from_numpy(rng.integers(len(pool["plain" if with_faces else "tokens"]), size=batch_size))
        which = torch.from_numpy(rng.integers(pool["token_ids"].shape[1], size=batch_size))
        there = rows.to(pool["tokens"].device)
        tokens, shares = (pool[name][there].float() for name in ("tokens", "face_share"))
        ids = pool["token_ids"][rows, which].long()
        return Drawn(tokens, ids, shares, GivenFaces.of_rows(pool, rows) if with_faces else None)


def is_encoded(path: Path, cache: Path) -> bool:
    """Whether a picture shard's tokens and faces lie in `cache`."""
    return (cache / path.name).exists() and (cache / f"faces_{path.name}").exists()


def joined(shards: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One shard of several of a bucket: first what is not mirrored of all, then what is."""
    if len(shards) == 1:
        return shards[0]
    plain = [len(shard["plain"]) for shard in shards]
    out = {}
    for name, first in shards[0].items():
        values = [shard[name] for shard in shards]
        people = {"embeddings": 1, "features": 1, "bboxes": 1, "kps": 1, "face_mask": 2}.get(name)
        if people is not None:  # shards differ in how many people their fullest picture has
            most = max(value.shape[people] for value in values)
            for place, value in enumerate(values):
                padding = [0] * (2 * (first.ndim - people))
                padding[-1] = most - value.shape[people]
                values[place] = torch.nn.functional.pad(value, padding)
        pieces = [value[:number] for value, number in zip(values, plain, strict=True)]
        pieces += [value[number:] for value, number in zip(values, plain, strict=True)]
        out[name] = torch.cat(pieces)
    return out


def bucket_shares(step: int) -> np.ndarray:
    """How often each bucket of SHARES is drawn at a step: from its first to its second share."""
    progress = min(1.0, step / SHARES_SETTLE)
    shares = np.array([first + (last - first) * progress for first, last in SHARES.values()])
    return shares / shares.sum()


def batch_size_of(bucket: Bucket, tokens_per_step: int) -> int:
    """Pictures a step, so that every bucket's step has about the same number of image tokens."""
    return max(2, tokens_per_step // bucket.num_tokens)


# Training


class Optimizers:
    """Muon for the matrices of the blocks, AdamW for all else, behind one optimiser's interface.

    Muon's learning rate is scaled to AdamW's update size (`match_rms_adamw`), so one rate serves both; a
    group's `share` of it: the adapter's cross-attentions take half, its MLPs a quarter.
    """

    def __init__(self, model: FluxTransformer2DModel, adapter: FaceAdapter | None = None) -> None:
        matrices, rest = [], []
        for name, parameter in model.named_parameters():
            in_block = "transformer_blocks" in name and "norm" not in name
            (matrices if in_block and parameter.ndim == 2 else rest).append(parameter)
        muon, adam = [{"params": matrices, "share": 1.0}], [{"params": rest, "share": 1.0}]
        if adapter is not None:
            named = list(adapter.named_parameters())
            attends = {name for name, p in named if name.startswith("ipa_") and p.ndim == 2}
            muon.append({"params": [p for name, p in named if name in attends], "share": 0.5})
            adam.append({"params": [p for name, p in named if name not in attends], "share": 0.25})
        self.parts = (
            make_muon(muon, weight_decay=0.01),
            torch.optim.AdamW(adam, betas=(0.9, 0.98), weight_decay=0.01),
        )

    def set_learning_rate(self, rate: float) -> None:
        """Gives every group its share of `rate`."""
        for group in self.param_groups:
            group["lr"] = group["share"] * rate

    def _num_first(self) -> int:
        return sum(len(group["params"]) for group in self.parts[0].param_groups)

    @property
    def param_groups(self) -> list[dict]:
        """Both optimisers' groups."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        """One step of both."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, dict]:
        """Both states under one numbering: Muon's parameters first."""
        first = self._num_first()
        states = [part.state_dict()["state"] for part in self.parts]
        return {"state": {**states[0], **{first + index: entry for index, entry in states[1].items()}}}

    def load_state_dict(self, state_dict: Mapping[str, dict]) -> None:
        """Takes up a `state_dict`."""
        first = self._num_first()
        states: tuple[dict, dict] = ({}, {})
        for index, entry in state_dict["state"].items():
            states[index >= first][index - first if index >= first else index] = entry
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict({**part.state_dict(), "state": state})


# Several processes (torchrun): each has batches of its own, gradients are averaged, rank 0 writes.

RANK_STRIDE = 10_000_019  # between the seeds of two ranks


def join_processes() -> None:
    """Joins the group that torchrun started, if it did."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")


def rank() -> int:
    """Number of this process, 0 where it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Every process gets the mean gradient; it travels in bf16. A parameter without one counts as 0."""
    if not dist.is_initialized():
        return
    flat = torch.cat(
        [
            torch.zeros(p.numel(), dtype=torch.bfloat16) if p.grad is None else p.grad.flatten().bfloat16()
            for p in parameters
        ]
    )
    dist.all_reduce(flat)
    flat = flat.float().div_(dist.get_world_size())
    for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = gradient.view_as(parameter)


def position_ids(bucket: Bucket, text_length: int) -> tuple[Tensor, Tensor]:
    """FluxPipeline's img_ids (T, 3) (0, row, column) and txt_ids (L, 3) of zeros."""
    rows, columns = bucket.height // PATCH, bucket.width // PATCH
    image_ids = FluxPipeline._prepare_latent_image_ids(1, rows, columns, torch.device("cpu"), torch.float32)
    return image_ids, torch.zeros(text_length, 3)


def training_sigmas(batch_size: int, bucket: Bucket, generator: torch.Generator) -> Tensor:
    """sigma = sigmoid(n + 0.3 + ln sqrt(T / 64)), n normal: (B,). Larger pictures need more noise to hide
    the same."""
    mu = 0.3 + 0.5 * np.log(bucket.num_tokens / 64)
    return torch.sigmoid(torch.randn(batch_size, generator=generator) + mu)


def text_length_of(bucket: Bucket, rng: np.random.Generator) -> int:
    """Text tokens of a step: the pipeline's 64, or fewer where captions are short, which is cheaper to train
    on.

    Padding is not masked in FLUX; as its length varies here, the model learns to take nothing from it.
    """
    short = bucket.people[2:] == () and rng.random() < 0.85
    return SHORT_TEXT if short else text.MAX_TEXT_TOKENS


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * model."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def compile_blocks(model: FluxTransformer2DModel) -> None:
    """Compiles the model's blocks: a step is 1.4 times as fast on a CPU, where each kind of block compiles
    once a shape. On a GPU it compiles once for all, since there a step is short and a compilation long.

    Call it before an adapter is attached: the adapter's hooks then stay outside the graphs, so that faces, of
    which no two pictures have the same tokens, compile nothing anew.
    """
    torch._dynamo.config.recompile_limit = 64

    def without_faces(forward: Callable) -> Callable:
        def call(*args, joint_attention_kwargs=None, **kwargs):  # the blocks ignore the faces in it
            return forward(*args, **kwargs)

        return call

    dynamic = model.device.type == "cuda"
    torch.fx.experimental._config.use_duck_shape = not dynamic  # as many words as image tokens: by chance
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.forward = without_faces(torch.compile(block.forward, dynamic=dynamic))


class Trainer:
    """Model, its average, optimisers and data of a run; `step` does one step.

    Where the data has faces, an adapter learns along with the model.
    """

    def __init__(
        self,
        data: LatentPictures,
        models: TextModels,
        seed: int,
        tokens_per_step: int,
        init_from: Path | None = None,
        compiled: bool = False,
        face_share: float = FACE_SHARE,
        init_adapter: Path | None = None,
        face_weight: float = FACE_WEIGHT,
        feature_weight: float = FEATURE_WEIGHT,
    ) -> None:
        torch.manual_seed(seed)
        self.data, self.models, self.seed, self.tokens_per_step = data, models, seed, tokens_per_step
        self.face_share, self.face_weight = face_share, face_weight
        self.feature_weight = feature_weight
        self.model = FluxTransformer2DModel(**transformer_config(data.vae.config.latent_channels))
        if init_from is not None:
            self.model.load_state_dict(FluxTransformer2DModel.from_pretrained(init_from).state_dict())
        self.device = data.vae.device
        self.model.to(self.device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        if compiled:
            compile_blocks(self.model)
        self.adapter = self.adapter_average = None
        if data.face_models is not None:
            self.adapter = new_adapter(self.model, data.face_models.image_encoder.config.hidden_size).train()
            if init_adapter is not None:
                self.adapter.load_state_dict(FaceAdapter.from_pretrained(init_adapter).state_dict())
            self.adapter.to(self.device)
            self.adapter_average = copy.deepcopy(self.adapter).requires_grad_(False).eval()
            self.adapter.attach(self.model)
            self.adapter_average.attach(self.average)
        self.optimizers = Optimizers(self.model, self.adapter)
        self.empty_ids = models.token_ids([""])[0]

    def step(self, step: int, learning_rate: float, average_decay: float) -> Tensor:
        """One optimiser step; everything random follows from (seed, step, rank). Returns the loss, ()."""
        rng, generator = step_rng(self.seed + RANK_STRIDE * rank(), step)
        # 1. A batch of one size, captions dropped here and there.
        buckets = list(SHARES)
        bucket = buckets[int(rng.choice(len(buckets), p=bucket_shares(step)))]
        if bucket not in self.data.pools:
            bucket = pictures.PORTRAIT
        batch_size = batch_size_of(bucket, self.tokens_per_step)
        with_faces = self.adapter is not None and rng.random() < self.face_share
        latents, token_ids, shares, given = self.data.draw(bucket, batch_size, rng, with_faces)
        dropped = torch.from_numpy(rng.random(batch_size) < TEXT_DROPOUT)
        token_ids = torch.where(dropped[:, None], self.empty_ids, token_ids)
        text_length = text_length_of(bucket, rng)
        states, pooled = self.models.encode(token_ids, text_length)
        # 2. Noise, drawn where it is needed.
        sigma = training_sigmas(batch_size, bucket, generator)
        if self.device.type != "cpu":
            generator = torch.Generator(self.device).manual_seed(int(rng.integers(2**62)))
        noise = torch.randn(latents.shape, generator=generator, device=self.device)
        noisy_latents = flow.noisy_latents(latents, noise, sigma)
        # 3. The velocity and its error.
        faces = None
        if given is not None:
            with autocast(self.device):
                faces = given.encode(self.adapter, draw_scales(batch_size, rng))
        position = position_ids(bucket, text_length)
        velocity = velocity_of(self.model, noisy_latents, sigma, (states, pooled), position, faces)
        error = (velocity - flow.velocity(latents, noise)).pow(2).mean(dim=-1)  # (B, T)
        loss = weighted_mean(error, 1 + (self.face_weight - 1) * shares)
        if given is not None and self.feature_weight:
            denoised = flow.denoised(noisy_latents, velocity, sigma)
            loss = loss + self.feature_weight * self.feature_loss(denoised, latents, sigma, given, bucket)
        # 4. The step.
        parameters = [p for group in self.optimizers.param_groups for p in group["params"]]
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizers.set_learning_rate(learning_rate)
        self.optimizers.step()
        update_average(self.average, self.model, average_decay)
        if self.adapter is not None:
            update_average(self.adapter_average, self.adapter, average_decay)
        return loss.detach()

    def feature_loss(
        self, denoised: Tensor, latents: Tensor, sigma: Tensor, given: GivenFaces, bucket: Bucket
    ) -> Tensor:
        """`perceptual_loss` of the faces in the clean estimate beside those in the clean latents, (B, T, 96)
        both, of the pictures whose noise is low; 0 where none is."""
        low = (sigma <= FEATURE_MAX_SIGMA).tolist()
        chosen = [(b, f) for b, number in enumerate(given.count) if low[b] for f in range(number)]
        chosen = chosen[: max(FEATURE_FACES, self.tokens_per_step // TOKENS_A_FEATURE_FACE)]
        if not chosen:
            return denoised.new_zeros(())
        of_picture, of_face = torch.tensor(chosen).T
        kps = given.kps[of_picture, of_face].float()
        rows, place = (index.to(self.device) for index in of_picture.unique(return_inverse=True))
        with autocast(self.device):
            made = decode_tokens(self.data.vae, denoised[rows], bucket)
            with torch.no_grad():
                targets = decode_tokens(self.data.vae, latents[rows], bucket)
        recognizer = self.data.face_models.recognizer
        return perceptual_loss(recognizer, made[place].float(), targets[place].float(), kps)

    def loop(self, folder: Path, steps: int, name: str) -> TrainingLoop:
        """The resumable loop over this trainer's state."""
        config = {
            "part": name,
            "seed": self.seed,
            "tokens_per_step": self.tokens_per_step,
            "face_weight": self.face_weight,
            "feature_weight": self.feature_weight,
        }
        modules = {"transformer": self.model, "average": self.average}
        if self.adapter is not None:
            modules |= {"adapter": self.adapter, "adapter_average": self.adapter_average}
            config["face_share"] = self.face_share
        loop = TrainingLoop(folder, OPEN_END, modules, self.optimizers, config, writes=rank() == 0)
        loop.steps = steps
        return loop


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Mean of `values`, each counted by its weight."""
    return (values * weights).sum() / weights.sum()


def face_kwargs(faces: FaceConditioning | None) -> dict[str, FaceConditioning] | None:
    """`joint_attention_kwargs` of a call of the transformer."""
    return None if faces is None else {CONDITIONING_KEY: faces}


def velocity_of(
    model: FluxTransformer2DModel,
    noisy_latents: Tensor,
    sigma: Tensor,
    text: tuple[Tensor, Tensor],
    position: tuple[Tensor, Tensor],
    faces: FaceConditioning | None,
) -> Tensor:
    """Velocity (B, T, 96) at `sigma` (B,). `text`: states and pooled; `position`: of `position_ids`."""
    device = noisy_latents.device
    with autocast(device):
        velocity = model(
            hidden_states=noisy_latents,
            encoder_hidden_states=text[0],
            pooled_projections=text[1],
            timestep=sigma.to(device),
            img_ids=position[0].to(device),
            txt_ids=position[1].to(device),
            joint_attention_kwargs=face_kwargs(faces),
            return_dict=False,
        )[0]
    return velocity.float()


def run_loop(trainer: Trainer, loop: TrainingLoop, rate: Callable[[int], float], first: int,
             every: Callable[[int], None]) -> None:  # fmt: skip
    """Trains until the loop's last step. `rate`: a step's learning rate, or below 0 to end there; `first`:
    data's number of the loop's step 0.

    A SIGTERM or ctrl-c saves a checkpoint before it ends the run.
    """

    signals: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        signals.append(
            number
        )  # the step in hand is finished first, or the run could not be continued exactly

    handlers = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for step in loop:
            learning_rate = rate(step)
            if learning_rate < 0:
                loop.save()
                break
            if step % 100 == 0:
                trainer.data.refresh()
            # By this loop's own steps: an average as long as a short run would hold on to where it began.
            decay = min(0.998, (1 + step) / (10 + step))
            loss = trainer.step(first + step, learning_rate, decay)
            if trainer.device.type == "cpu" or step % 20 == 0:  # reading it waits for the device
                loop.log(loss=float(loss))
            every(step + 1)
            if signals:
                loop.step = step + 1
                loop.save()
                raise SystemExit(f"stopped after {loop.step} steps; the same command goes on from there")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def timed_rate(peak: float, seconds: float, clock: Callable[[], float] = time.monotonic) -> Callable:
    """Learning rates of a run that has so much time: warm-up, `peak`, and from FLAT_SHARE of the time on down
    to zero at its end; -1 after it."""
    started = clock()

    def rate(step: int) -> float:
        left = 1 - (clock() - started) / seconds
        return -1.0 if left <= 0 else peak * min(1.0, (step + 1) / 100, left / (1 - FLAT_SHARE))

    return rate


# Measuring


@torch.no_grad()
def held_out_errors(
    model: FluxTransformer2DModel, data: LatentPictures, count: int = 48, adapter: FaceAdapter | None = None
) -> dict[str, dict[str, float]]:
    """Mean squared error of the velocity at SIGMAS for the main buckets, over whole pictures and over faces
    alone, always on the same pictures and noise; `adapter`: with their people given by their faces."""
    model.eval()
    result: dict[str, dict[str, float]] = {}
    for name, bucket in (
        ("one person", pictures.PORTRAIT),
        ("two", pictures.PAIR),
        ("groups", pictures.GROUP),
    ):
        if bucket not in data.pools:
            logger.warning("no held-out pictures of %s: no errors of them", name)
            continue
        size = max(8, count * 64 // bucket.num_tokens)
        drawn = data.draw(bucket, size, np.random.default_rng(0), adapter is not None)
        latents, token_ids, shares, given = drawn
        states, pooled = data.models.encode(token_ids, text.MAX_TEXT_TOKENS)
        position = position_ids(bucket, text.MAX_TEXT_TOKENS)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents.device)
        faces = None if given is None else given.encode(adapter)
        result[name], result[f"{name}, faces"] = {}, {}
        for sigma in SIGMAS:
            noisy_latents = flow.noisy_latents(latents, noise, sigma)
            level = torch.full((size,), sigma)
            velocity = velocity_of(model, noisy_latents, level, (states, pooled), position, faces)
            error = (velocity - flow.velocity(latents, noise)).pow(2).mean(dim=-1)
            result[name][f"sigma {sigma}"] = round(float(error.mean()), 4)
            result[f"{name}, faces"][f"sigma {sigma}"] = round(float(weighted_mean(error, shares)), 4)
    model.train()
    return result


@torch.no_grad()
def sample(
    model: FluxTransformer2DModel,
    vae: PatchAutoencoder,
    models: TextModels,
    captions: list[str],
    bucket: Bucket,
    steps: int = 20,
    guidance: float = 2.0,
    seed: int = 0,
    faces: FaceConditioning | None = None,
) -> np.ndarray:
    """Pictures (N, H, W, 3) uint8 for captions, with true guidance: what FluxPipeline does, in one batch.

    `faces`: of N rows; they act in both passes.
    """
    size = len(captions)
    generator = torch.Generator().manual_seed(seed)
    shape = (size, vae.config.latent_channels, bucket.height // 8, bucket.width // 8)
    latents = pack(torch.randn(shape, generator=generator)).to(vae.device)
    token_ids = models.token_ids(captions)
    latents = sample_from(model, models, latents, token_ids, bucket, steps, guidance, (faces, faces))
    x = decode_tokens(vae, latents, bucket).clamp(-1, 1)
    return ((x.permute(0, 2, 3, 1) + 1) * 127.5).round().byte().cpu().numpy()


def sampler_of(bucket: Bucket, steps: int) -> SeededFlowMatchScheduler:
    """The sampler of `steps` steps, ready for pictures of a size."""
    sampler = scheduler()
    sampler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=scheduler_mu(bucket.num_tokens))
    return sampler


@torch.no_grad()
def sample_from(
    model: FluxTransformer2DModel,
    models: TextModels,
    noisy_latents: Tensor,
    token_ids: Tensor,
    bucket: Bucket,
    steps: int,
    guidance: float,
    faces: tuple[FaceConditioning | None, FaceConditioning | None] = (None, None),
    first: int = 0,
) -> Tensor:
    """The clean tokens (B, T, 96) that the sampler makes of `noisy_latents` from its step `first` on.

    token_ids: (B, 64) of the captions; faces: of the pass that is told them and of the one that is not.
    """
    size, sampler = len(noisy_latents), sampler_of(bucket, steps)
    empty = models.token_ids([""] * size)
    states, pooled = models.encode(torch.cat([token_ids, empty]), text.MAX_TEXT_TOKENS)
    passes = tuple(zip(states.chunk(2), pooled.chunk(2), faces, strict=True))
    position = position_ids(bucket, text.MAX_TEXT_TOKENS)
    sampler.set_begin_index(first)
    latents = noisy_latents
    for timestep in sampler.timesteps[first:]:
        sigma = (timestep / sampler.config.num_train_timesteps).expand(size)
        told, untold = (
            velocity_of(model, latents, sigma, (words, pooled_words), position, given)
            for words, pooled_words, given in passes
        )
        velocity = untold + guidance * (told - untold)
        latents = sampler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


def sample_sheet(
    trainer: Trainer, held_out: LatentPictures, captions: Mapping[Bucket, list[str]], path: Path
) -> None:
    """Rows of pictures of the world (held-out people) and, under each row, samples of their captions; under
    those, where an adapter learns along, samples given their people's faces too."""
    folder, rows = held_out.folder, []
    trainer.average.eval()
    for bucket, told in captions.items():
        paths = [
            path for path in pictures.shard_paths(folder, "validation") if bucket_of_path(path) == bucket
        ]
        real = pictures.read_shard(paths[0], "pixels")[0]["pixels"][: len(told)]
        several = [real, sample(trainer.average, trainer.data.vae, trainer.models, told, bucket)]
        if trainer.adapter_average is not None:
            given = GivenFaces.of_rows(held_out.pools[bucket], range(len(told)))
            with torch.no_grad():
                faces = given.encode(trainer.adapter_average)
            several.append(
                sample(trainer.average, trainer.data.vae, trainer.models, told, bucket, faces=faces)
            )
        for start in range(0, len(told), 1152 // bucket.width):
            stop = start + 1152 // bucket.width
            for row in (images[start:stop] for images in several):
                joined = np.concatenate(list(row), axis=1)
                rows.append(np.pad(joined, ((0, 0), (0, max(0, 1152 - joined.shape[1])), (0, 0)))[:, :1152])
    Image.fromarray(np.concatenate(rows)).save(path)


def sheet_captions(folder: Path) -> dict[Bucket, list[str]]:
    """Captions of the first validation pictures of the three main buckets."""
    result = {}
    for bucket, count in ((pictures.PORTRAIT, 18), (pictures.PAIR, 6), (pictures.GROUP, 4)):
        for path in pictures.shard_paths(folder, "validation"):
            if bucket_of_path(path) == bucket:
                result[bucket] = [both[0] for both in pictures.read_shard(path, "setting")[1][:count]]
                break
    return result


@torch.no_grad()
def guidance_figures(
    folder: Path, out: Path, count: int, scales: Sequence[float]
) -> dict[str, dict[str, float]]:
    """What true guidance does: per scale, the share of pictures in which the asked number of faces is found.

    Captions of held-out people, `count` of one person and half as many of two; the pipeline folder's own
    detector.
    """
    models = TextModels.from_pretrained(out)
    vae = PatchAutoencoder.from_pretrained(out / "vae", dtype=torch.float32).eval()
    model = FluxTransformer2DModel.from_pretrained(out / "transformer").eval()
    analyzer = FaceAnalyzer.from_pretrained(out / "face_analyzer")
    captions: dict[Bucket, list[tuple[str, int]]] = {pictures.PORTRAIT: [], pictures.PAIR: []}
    for path in pictures.shard_paths(folder, "validation"):
        bucket = bucket_of_path(path)
        if bucket in captions:
            shard, several = pictures.read_shard(path, "identities")
            people = (shard["identities"] >= 0).sum(axis=1).tolist()
            captions[bucket] += [(texts[0], number) for texts, number in zip(several, people, strict=True)]
    result: dict[str, dict[str, float]] = {}
    for scale in scales:
        result[f"true_cfg_scale {scale:g}"] = found = {}
        for name, bucket, number in (
            ("one person", pictures.PORTRAIT, count),
            ("two", pictures.PAIR, count // 2),
        ):
            asked = captions[bucket][:number]
            made = sample(model, vae, models, [text for text, _ in asked], bucket, 25, scale)
            right = [
                len(analyzer.detect(picture)) == people
                for picture, (_, people) in zip(made, asked, strict=True)
            ]
            found[name] = round(float(np.mean(right)), 4)
    return result


# Export


def scheduler() -> SeededFlowMatchScheduler:
    """FLUX's scheduler, stochastic; its line for mu goes through the miniature's own token counts."""
    return SeededFlowMatchScheduler(
        stochastic_sampling=True,
        use_dynamic_shifting=True,
        base_image_seq_len=64,
        max_image_seq_len=256,
        base_shift=0.4,
        max_shift=0.9,
    )


def scheduler_mu(num_tokens: int) -> float:
    """The mu that FluxPipeline computes from `scheduler()` for a number of tokens."""
    return 0.4 + (0.9 - 0.4) * (num_tokens - 64) / (256 - 64)


def export(model: FluxTransformer2DModel, out: Path) -> None:
    """Writes transformer and scheduler into a pipeline folder, in half precision."""
    copied = FluxTransformer2DModel(**transformer_config(model.config.in_channels // 4))
    copied.load_state_dict(model.state_dict())
    copied.to(torch.bfloat16).save_pretrained(out / "transformer")
    scheduler().save_pretrained(out / "scheduler")


# Command


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_part_arguments(parser, "base", steps=20000)
    parser.add_argument(
        "--cooldown", type=int, default=6000, help="steps of the branch with falling learning rate"
    )
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--tokens-per-step", type=int, default=2048, help="image tokens a step: 32 portraits")
    parser.add_argument("--pictures", type=Path, default=RUNS / "pictures", help="picture shards")
    parser.add_argument(
        "--sheet-steps", type=int, default=500, help="steps between sheets, errors and exports"
    )
    parser.add_argument(
        "--init-from",
        type=Path,
        help="transformer folder to go on from where no checkpoint is left",
    )
    parser.add_argument("--init-adapter", type=Path, help="with --with-faces: adapter folder to go on from")
    parser.add_argument(
        "--init-steps",
        type=int,
        default=0,
        help="steps that --init-from had: data goes on there",
    )
    parser.add_argument(
        "--with-faces",
        action="store_true",
        help="an adapter learns along, people given by their faces",
    )
    parser.add_argument("--face-share", type=float, default=FACE_SHARE, help="batches with people given")
    parser.add_argument(
        "--face-weight",
        type=float,
        default=FACE_WEIGHT,
        help="of a face's tokens in the loss; 1: as all others",
    )
    parser.add_argument(
        "--feature-weight",
        type=float,
        default=FEATURE_WEIGHT,
        help="of how given faces look to the recogniser; 0: not at all",
    )
    parser.add_argument("--no-compile", action="store_true", help="blocks as they are: no compiler")
    parser.add_argument(
        "--minutes",
        type=float,
        help="instead of --steps and --cooldown: a run of so much time, on a machine that is lent for it",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        help="encoded pictures, of `latent-pictures` that works meanwhile; default: in --out, made here",
    )
    add_device_argument(parser)


def _load(folder: Path, device: str) -> tuple[TextModels, PatchAutoencoder]:
    """The frozen parts that the base learns with."""
    models = TextModels.from_pretrained(folder, device)
    vae = PatchAutoencoder.from_pretrained(folder / "vae", dtype=torch.float32)
    vae.eval().requires_grad_(False).to(device)
    return models, vae


def _run(args: argparse.Namespace) -> None:
    start_part(args)
    join_processes()
    models, vae = _load(args.pretrained, args.device)
    face_models = FaceModels.from_pretrained(args.pretrained, args.device) if args.with_faces else None
    cache = args.cache or args.out / "latents"
    data = LatentPictures(args.pictures, cache, "train", vae, models, face_models, args.cache is not None)
    if args.cache is not None:
        data.wait()
    held_out = LatentPictures(args.pictures, cache, "validation", vae, models, face_models)
    captions = sheet_captions(args.pictures)
    trainer = Trainer(
        data, models, args.seed, args.tokens_per_step, args.init_from, compiled=not args.no_compile,
        face_share=args.face_share, init_adapter=args.init_adapter, face_weight=args.face_weight,
        feature_weight=args.feature_weight,
    )  # fmt: skip

    def errors(count: int) -> dict[str, object]:
        found: dict[str, object] = {
            "held_out_velocity_error": held_out_errors(trainer.average, held_out, count)
        }
        if trainer.adapter_average is not None:
            found["held_out_velocity_error_with_faces"] = held_out_errors(
                trainer.average, held_out, count, trainer.adapter_average
            )
        return found

    def write() -> None:
        export(trainer.average, args.pretrained)
        if trainer.adapter_average is not None:  # the pipeline's own is tuned from it (mini_adapter.yaml)
            export_adapter(trainer.adapter_average, args.out / "face_adapter")

    def watch(offset: int) -> Callable[[int], None]:
        def every(step: int) -> None:
            if step % args.sheet_steps or rank():
                return
            line = json.dumps({"step": offset + step, **errors(48)})
            with (args.out / "errors.jsonl").open("a") as file:
                file.write(line + "\n")
            logger.info("held-out velocity error: %s", line)
            sample_sheet(trainer, held_out, captions, args.out / f"sheet_{offset + step:06d}.png")
            write()

        return every

    peak = args.learning_rate
    if args.minutes is not None:
        timed = trainer.loop(args.out / "timed", OPEN_END, "base, timed")
        begun = timed.step
        rate = timed_rate(peak, 60 * args.minutes)
        run_loop(trainer, timed, rate, args.init_steps, watch(args.init_steps))
        if rank():
            return
        write()
        told = {"steps": args.init_steps + timed.step, "steps_of_this_run": timed.step - begun,
                "pictures_without_mirrored": {
                    f"{b.width} x {b.height}": len(pool["plain"]) for b, pool in data.pools.items()
                },
                "device": device_name(args.device)}  # fmt: skip
        write_figures(args.pretrained, "base", {**errors(HELD_OUT_PICTURES), **told})
        return
    trunk = trainer.loop(args.out / "trunk", args.steps, "base, trunk")
    first = args.init_steps
    run_loop(trainer, trunk, lambda step: peak * min(1.0, (step + 1) / 100), first, watch(first))
    branch = trainer.loop(args.out / f"branch_{args.steps}", args.cooldown, "base, branch")
    run_loop(
        trainer,
        branch,
        lambda step: peak * (1 - step / args.cooldown),
        first + args.steps,
        watch(first + args.steps),
    )
    if rank():
        return
    write()
    hours = (trunk.elapsed + branch.elapsed) / 3600
    told = {"steps": first + args.steps + args.cooldown, "training_hours_since_init": round(hours, 2)}
    write_figures(args.pretrained, "base", {**errors(HELD_OUT_PICTURES), **told})


def _add_guidance(parser: argparse.ArgumentParser) -> None:
    add_part_arguments(parser, "base", steps=0)
    parser.add_argument("--pictures", type=Path, default=RUNS / "pictures", help="picture shards")
    parser.add_argument(
        "--count", type=int, default=48, help="captions of one person, and half as many of two"
    )
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 2.0, 3.0, 4.0])


def _run_guidance(args: argparse.Namespace) -> None:
    start_part(args)
    figures = guidance_figures(args.pictures, args.pretrained, args.count, args.scales)
    told = {"captions": "held-out people", "one_person": args.count, "two": args.count // 2}
    write_figures(args.pretrained, "guidance", {**told, "asked_number_of_faces_found": figures})


def _add_latent_pictures(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Picture shards, rendered and encoded: what `base --cache` takes up while it trains. Several "
        "processes, each with a --part, share the work."
    )
    add_part_arguments(parser, "base", steps=0)
    parser.add_argument("--pictures", type=Path, default=RUNS / "pictures", help="picture shards")
    parser.add_argument("--cache", type=Path, required=True, help="folder of the encoded pictures")
    parser.add_argument("--split", default="train", choices=["train", "validation"])
    parser.add_argument("--shards", type=int, default=96)
    parser.add_argument("--part", type=part_of, default=(0, 1), help="i/n: every n-th shard from the i-th on")


def _run_latent_pictures(args: argparse.Namespace) -> None:
    start_part(args)
    cv2.setNumThreads(1)  # of several processes, each has a core
    models, vae = _load(args.pretrained, "cpu")
    face_models = FaceModels.from_pretrained(args.pretrained)
    size = pictures.SHARD_SIZE if args.split == "train" else pictures.VALIDATION_SHARD_SIZE
    index, count = args.part
    for number in range(args.shards)[index::count]:
        path = pictures.render_shard(args.pictures, number, args.split, args.seed, size)
        encode_shard(path, args.cache, vae, models, mirror=args.split == "train")
        encode_faces(path, args.cache, face_models)


COMMANDS = {
    "base": (_add_arguments, _run),
    "guidance": (_add_guidance, _run_guidance),
    "latent-pictures": (_add_latent_pictures, _run_latent_pictures),
}
