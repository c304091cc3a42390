"""The miniature's VAE: a linear code of 8 x 8 patches, and a small network that draws the detail it lost.

Encoding is one strided convolution whose rows are the principal components of patches (closed form, nothing
to train). Decoding is the transposed convolution back, plus a residual network that takes away patch edges
(trained in decoder.py).
The class has AutoencoderKL's interface, so FluxPipeline uses it unchanged.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn

from . import PRETRAINED, pictures


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


def to_tensor(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


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
    parser.add_argument("--pretrained", type=Path, default=PRETRAINED, help="pipeline folder to export into")
    parser.add_argument("--seed", type=int, default=0)


def _run(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    vae = PatchAutoencoder()
    vae.set_linear_code(fit_code(training_pictures(192, args.seed)))
    export(vae.eval(), args.pretrained)


COMMANDS = {"latents": (_add_arguments, _run)}
