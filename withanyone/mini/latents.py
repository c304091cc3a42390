"""The miniature's VAE: a linear code of 8 x 8 patches, and a small network that draws the detail it lost.

Encoding is one strided convolution whose rows are the principal components of patches (closed form, nothing
to train). Decoding is the transposed convolution back, plus a residual network that takes away patch edges.
The class has AutoencoderKL's interface, so FluxPipeline uses it unchanged.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn

from withanyone import arcface
from withanyone.precision import cpu_autocast

from . import pictures
from .loop import TrainingLoop, learning_rate, step_rng
from .muon import MuonAdamW, hidden_matrices
from .parts import RUNS, add_part_arguments, start_part, write_figures

logger = logging.getLogger(__name__)


class ResidualBlock(nn.Module):
    """h + conv(silu(conv(silu(h)))), all of one width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.conv2(F.silu(self.conv1(F.silu(hidden_states))))


class Refiner(nn.Module):
    """What the linear code lost: a correction of the picture, computed at a quarter of its resolution.

    Its last layer starts at zero, so an untrained refiner changes nothing.
    """

    cell = 4  # pixels a side that one position of the network stands for

    def __init__(self, latent_channels: int, patch_size: int, channels: int, num_blocks: int) -> None:
        super().__init__()
        self.upscale = patch_size // self.cell
        self.conv_in = nn.Conv2d(3 * self.cell**2 + latent_channels, channels, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(channels) for _ in range(num_blocks))
        self.conv_out = nn.Conv2d(channels, 3 * self.cell**2, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, picture: Tensor, latents: Tensor) -> Tensor:
        """picture (B, 3, H, W), latents (B, C, H/8, W/8) -> correction (B, 3, H, W)."""
        cells = F.pixel_unshuffle(picture, self.cell)  # (B, 48, H/4, W/4)
        code = F.interpolate(latents, scale_factor=self.upscale, mode="nearest")  # (B, C, H/4, W/4)
        hidden_states = self.conv_in(torch.cat([cells, code], dim=1))
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return F.pixel_shuffle(self.conv_out(F.silu(hidden_states)), self.cell)


class PatchAutoencoder(ModelMixin, ConfigMixin):
    """Pictures (B, 3, H, W) in [-1, 1] <-> latents (B, C, H/8, W/8); H and W are multiples of `patch_size`.

    Latents already have unit mean square over all channels, so `scaling_factor` is 1 and `shift_factor` 0.
    The code is deterministic: `latent_dist` has no variance. `block_out_channels` has four entries, from
    which pipelines read the factor of 8 (their values are the refiner's width).
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 24,
        patch_size: int = 8,
        block_out_channels: tuple[int, ...] = (64, 64, 64, 64),
        layers_per_block: int = 4,
        sample_size: int = 128,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        force_upcast: bool = False,
    ) -> None:
        super().__init__()
        if patch_size != 2 ** (len(block_out_channels) - 1):
            raise ValueError(
                f"`block_out_channels` has {len(block_out_channels)} entries, which pipelines read as a "
                f"factor of {2 ** (len(block_out_channels) - 1)}, but `patch_size` is {patch_size}: give one "
                "entry more than its log2."
            )
        self.encoder = nn.Conv2d(in_channels, latent_channels, patch_size, stride=patch_size)
        self.decoder = nn.ConvTranspose2d(latent_channels, out_channels, patch_size, stride=patch_size)
        self.refiner = Refiner(latent_channels, patch_size, block_out_channels[0], layers_per_block)

    def encode(
        self, x: Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """x (B, 3, H, W) in [-1, 1] -> `latent_dist`, whose mode, mean and samples are all the same latents.

        Raises ValueError where the height or the width is not a multiple of the patch size.
        """
        patch_size = self.config.patch_size
        if x.shape[-2] % patch_size or x.shape[-1] % patch_size:
            raise ValueError(
                f"`x` is {x.shape[-1]} x {x.shape[-2]} pixels; width and height must be multiples of "
                f"{patch_size}: crop or resize the picture first."
            )
        mean = self.encoder(x)
        dist = DiagonalGaussianDistribution(
            torch.cat([mean, torch.zeros_like(mean)], dim=1), deterministic=True
        )
        return AutoencoderKLOutput(latent_dist=dist) if return_dict else (dist,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """z (B, C, h, w) -> `sample` (B, 3, 8h, 8w), about [-1, 1]. Gradients flow through."""
        picture = self.decoder(z)
        picture = picture + self.refiner(picture, z)
        return DecoderOutput(sample=picture) if return_dict else (picture,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Encodes and decodes: the picture as the latents can hold it."""
        return self.decode(self.encode(sample).latent_dist.mode(), return_dict=return_dict)

    @torch.no_grad()
    def set_linear_code(self, code: PatchCode) -> None:
        """Puts a fitted code into the first and the last convolution."""
        latent_channels, patch_size = self.config.latent_channels, self.config.patch_size
        shape = (latent_channels, 3, patch_size, patch_size)
        self.encoder.weight.copy_(code.encode.reshape(shape))
        self.encoder.bias.copy_(-code.encode @ code.mean)
        self.decoder.weight.copy_(code.decode.T.reshape(shape))
        # ConvTranspose2d has one bias a colour, and a patch's mean is flat up to noise: one colour for the
        # patch.
        self.decoder.bias.copy_(code.mean.reshape(3, -1).mean(dim=1))


class PatchCode:
    """Principal components of patches, half-way whitened, for flattened patches p (3 * 8 * 8 numbers).

    z = S^-1 V (p - m),   p' = V^T S z + m,   S_c = k sd_c^w

    V: the first components, orthonormal rows. sd_c: the components' standard deviations, which differ by a
    factor of 40. w = 0 keeps those scales, w = 1 whitens; half-way trained best (miniature facts). k makes
    the mean square of z one, which is what the noise of flow matching has.
    """

    def __init__(
        self, mean: Tensor, covariance: Tensor, latent_channels: int = 24, whitening: float = 0.5
    ) -> None:
        patch_numbers = mean.shape[0]
        # The mean patch replaced by its mean colour, so that a convolution's bias can hold it.
        color = mean.reshape(3, -1).mean(dim=1, keepdim=True)
        self.mean = color.expand(3, patch_numbers // 3).reshape(-1)
        shift = mean - self.mean
        second_moment = covariance + torch.outer(shift, shift)
        values, vectors = torch.linalg.eigh(second_moment.double())
        deviations = values.flip(0)[:latent_channels].clamp(min=1e-12).sqrt().float()  # (C,)
        rows = vectors.flip(1).T[:latent_channels].float()  # (C, P)
        rows = rows * torch.sign(
            rows.sum(dim=1, keepdim=True) + 1e-12
        )  # eigenvectors have no sign of their own
        scale = deviations**whitening
        scale = scale * ((deviations / scale) ** 2).mean().sqrt()  # (C,)
        self.encode = rows / scale[:, None]  # (C, P)
        self.decode = rows.T * scale  # (P, C)


def fit_code(pictures: Iterable[np.ndarray], latent_channels: int = 24, whitening: float = 0.5) -> PatchCode:
    """The code of 8 x 8 patches of pictures (H, W, 3) uint8, from one pass over them (sums only)."""
    total = torch.zeros(192, dtype=torch.float64)
    products = torch.zeros(192, 192, dtype=torch.float64)
    count = 0
    for picture in pictures:
        x = torch.from_numpy(picture).permute(2, 0, 1).float() / 127.5 - 1  # (3, H, W)
        patches = F.unfold(x[None], 8, stride=8)[0].T.double()  # (N, 192), colour first as in a convolution
        total += patches.sum(dim=0)
        products += patches.T @ patches
        count += len(patches)
    if count == 0:
        raise ValueError("`pictures` is empty: give at least one picture to fit the code.")
    mean = total / count
    covariance = products / count - torch.outer(mean, mean)
    return PatchCode(mean.float(), covariance.float(), latent_channels, whitening)


def psnr(pictures: Tensor, others: Tensor) -> Tensor:
    """10 log10(4 / mse) in dB for pictures (B, 3, H, W) in [-1, 1]: (B,)."""
    return 10 * torch.log10(4 / (pictures - others).pow(2).mean(dim=(1, 2, 3)).clamp(min=1e-10))


# Training the refiner


def reconstruction_loss(pictures: Tensor, others: Tensor, squared: float) -> Tensor:
    """Mean absolute error of colours and of their differences between neighbours, plus `squared` times the
    mean square.

    The differences make edges count; the square is what PSNR measures. pictures, others (B, 3, H, W) in [-1,
    1].
    """
    error = others - pictures
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 0.5 * edges + squared * error.pow(2).mean()


@dataclass
class PicturePool:
    """Pictures (N, H, W, 3) uint8 of one size, and their faces' boxes (N, P, 4), zeros where nobody is."""

    pixels: np.ndarray
    bboxes: np.ndarray


FACE_SHARE = 0.7  # of the patches that the refiner is trained on; the rest lie anywhere


def random_patches(pools: Sequence[PicturePool], count: int, size: int, rng: np.random.Generator) -> Tensor:
    """Square cut-outs at multiples of 8 pixels from random pictures, most of them around a face.

    (B, 3, size, size) in [-1, 1].
    """
    patches = np.empty((count, size, size, 3), np.uint8)
    for index in range(count):
        pool = pools[int(rng.integers(len(pools)))]
        row = int(rng.integers(len(pool.pixels)))
        cells = (np.array(pool.pixels.shape[1:3]) - size) // 8  # the last place, in cells down and across
        place = rng.integers(cells + 1)
        people = np.nonzero(pool.bboxes[row, :, 3] > 0)[0]
        if len(people) and rng.random() < FACE_SHARE:
            x1, y1, x2, y2 = pool.bboxes[row, rng.choice(people)]
            middle = (np.array([y1 + y2, x1 + x2]) - size) / 2 + rng.uniform(-16, 16, 2)
            place = np.clip(np.round(middle / 8).astype(int), 0, cells)
        top, left = 8 * place
        patches[index] = pool.pixels[row, top : top + size, left : left + size]
    return to_tensor(patches)


def to_tensor(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_refiner(
    vae: PatchAutoencoder,
    folder: Path,
    pools: Sequence[PicturePool],
    steps: int,
    batch_size: int = 8,
    seed: int = 0,
) -> None:
    """Trains the refiner of `vae` in place, in `folder`, resuming where a checkpoint is found; the code
    stays."""
    vae.encoder.requires_grad_(False)
    vae.decoder.requires_grad_(False)
    vae.to(memory_format=torch.channels_last)
    refiner = vae.refiner
    matrices = hidden_matrices(refiner.blocks)
    others = [p for p in refiner.parameters() if all(p is not matrix for matrix in matrices)]
    optimizer = MuonAdamW(matrices, others, lr=2e-3)
    config = {"part": "latents", "batch_size": batch_size, "seed": seed}
    loop = TrainingLoop(folder, steps, {"refiner": refiner}, optimizer, config)
    for step in loop:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 2e-3)
        rng, _ = step_rng(seed, step)
        patches = random_patches(pools, batch_size, 64, rng)
        with torch.no_grad():
            latents = vae.encode(patches).latent_dist.mode()
        with cpu_autocast():
            decoded = vae.decode(latents).sample
        loss = reconstruction_loss(patches, decoded.float(), squared=4.0 * step / steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(refiner.parameters(), 1.0)
        optimizer.step()
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
            x = to_tensor(images[start : start + 25])
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
    recognizer = arcface.Recognizer.from_onnx(face_pack / "recognition.onnx").eval()
    cosines: dict[str, list[Tensor]] = {"40 to 60 px": [], "60 px and more": []}
    for path in pictures.shard_paths(folder, "validation"):
        shard, _ = pictures.read_shard(path, "pixels", "bboxes", "kps", "identities")
        for row in range(min(50, len(shard["pixels"]))):
            people = np.nonzero(shard["identities"][row] >= 0)[0]
            if len(people) == 0:
                continue
            x = to_tensor(shard["pixels"][row : row + 1])
            y = vae(x).sample.clamp(-1, 1)
            kps = torch.from_numpy(shard["kps"][row, people])
            before, after = (
                recognizer(arcface.align_face(image.expand(len(people), -1, -1, -1), kps)) for image in (x, y)
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


# Command


def training_pictures(count: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Pictures of training people in all sizes, drawn on the spot."""
    for index in range(count):
        bucket = pictures.bucket_of(index)
        yield pictures.draw_picture(bucket, "train", (seed, 0x9CA, index))[0].image


def export(vae: PatchAutoencoder, out: Path) -> None:
    """Writes the autoencoder into a pipeline folder, in half precision."""
    copied = PatchAutoencoder(**{name: vae.config[name] for name in CONFIG_NAMES})
    copied.load_state_dict(vae.state_dict())
    copied.to(torch.float16).save_pretrained(out / "vae")


CONFIG_NAMES = ("latent_channels", "patch_size", "block_out_channels", "layers_per_block")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_part_arguments(parser, "latents", steps=6000)
    parser.add_argument("--pictures", type=Path, default=RUNS / "pictures", help="picture shards")
    parser.add_argument("--shards", type=int, default=12, help="training shards held in memory")
    parser.add_argument(
        "--code-only", action="store_true", help="fit the linear code and export it, no training"
    )


def _run(args: argparse.Namespace) -> None:
    start_part(args)
    code_folder = args.out / "code"
    if (code_folder / "config.json").exists():
        vae = PatchAutoencoder.from_pretrained(code_folder)
    else:
        torch.manual_seed(args.seed)
        vae = PatchAutoencoder()
        vae.set_linear_code(fit_code(training_pictures(192, args.seed)))
        # The code is kept as it will be stored, so that later parts see the very same latents.
        vae.to(torch.float16).float().save_pretrained(code_folder)
    vae = vae.float()
    if args.code_only:
        export(vae.eval(), args.pretrained)
        return
    paths = pictures.shard_paths(args.pictures, "train")[: args.shards]
    shards = [pictures.read_shard(path, "pixels", "bboxes")[0] for path in paths]
    pools = [PicturePool(shard["pixels"], shard["bboxes"]) for shard in shards]
    train_refiner(vae, args.out, pools, args.steps, seed=args.seed)
    export(vae, args.pretrained)
    saved = PatchAutoencoder.from_pretrained(args.pretrained / "vae", dtype=torch.float32).eval()
    held_out = [
        pictures.read_shard(path, "pixels")[0]["pixels"][:50]
        for path in pictures.shard_paths(args.pictures, "validation")
    ]
    figures: dict[str, object] = {**psnr_figures(saved, held_out)}
    face_pack = args.pretrained / "face_analyzer"
    if (face_pack / "recognition.onnx").exists():
        figures["identity_cosine"] = identity_figures(saved, args.pictures, face_pack)
    write_figures(args.pretrained, "latents", figures)


COMMANDS = {"latents": (_add_arguments, _run)}
