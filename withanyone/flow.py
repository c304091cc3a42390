"""Flow matching as FLUX.1 uses it. The one place that says which end is noise.

`sigma` is the share of noise, the paper's t: sigma 1 is pure noise, sigma 0 is the clean latent. The model
predicts the velocity that leads from clean to noise (rectified flow: arXiv 2209.03003, 2403.03206).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

TIMESTEP_SHIFTS = ("released", "flux")


# The three equations


def noisy_latents(latents: torch.Tensor, noise: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
    """x_t = (1 - t) x_1 + t x_0: `latents` (clean) and `noise` mixed; `sigma` a number or (B,)."""
    sigma = _per_sample(sigma, latents)
    return (1 - sigma) * latents + sigma * noise


def velocity(latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """v = x_0 - x_1: what the model predicts, from clean `latents` towards `noise`."""
    return noise - latents


def denoised(
    noisy_latents: torch.Tensor, velocity: torch.Tensor, sigma: float | torch.Tensor
) -> torch.Tensor:
    """x_1 = x_t - t v: the clean estimate; `sigma` a number or (B,)."""
    return noisy_latents - _per_sample(sigma, noisy_latents) * velocity


class CleanEstimates:
    """The clean estimates of a sampler's steps, for a callback that sees only what each step leads to.

    Euler's step is x' = x + (t' - t) v, so v = (x' - x) / (t' - t), and the clean estimate is x' - t' v: from
    the second step on. A scheduler that draws noise anew has it in `clean_estimate`, from the first on.
    """

    def __init__(self) -> None:
        self.before: torch.Tensor | None = None  # what the next step starts from

    def after_step(self, scheduler, step: int, latents: torch.Tensor) -> torch.Tensor | None:
        """The estimate (B, ...) in float32 that led to `latents` in step `step` (0: the first), if known."""
        before, self.before = self.before, latents
        told = getattr(scheduler, "clean_estimate", None)
        if told is not None or before is None:
            return told
        here, there = float(scheduler.sigmas[step]), float(scheduler.sigmas[step + 1])
        return denoised(latents.float(), (latents.float() - before.float()) / (there - here), there)

    @staticmethod
    def replace(scheduler, clean: torch.Tensor) -> None:
        """Says to who looks next what the latents now hold."""
        if getattr(scheduler, "clean_estimate", None) is not None:
            scheduler.clean_estimate = clean


# The schedule


def shift_mu(
    height: int,
    width: int,
    timestep_shift: str = "flux",
    *,
    pixels_per_token: int = 16,
    base_seq_len: int = 256,
    max_seq_len: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """mu of the timestep shift for a picture of `height` x `width` pixels.

    FLUX.1 draws a line through (256 tokens, 0.5) and (4096 tokens, 1.15). `"flux"` reads it at the picture's
    count of image tokens; `"released"` at (w / 8)(h / 8) / 256, as WithAnyone's released sampler does, under
    which its pictures were tuned: mu 0.47 instead of 1.15 at 1024 px. The line's ends are those of the
    scheduler's config (`base_image_seq_len`, `max_image_seq_len`, `base_shift`, `max_shift`).
    """
    if timestep_shift == "flux":
        num_tokens = (height // pixels_per_token) * (width // pixels_per_token)
    elif timestep_shift == "released":
        num_tokens = (width / 8) * (height / 8) / 256
    else:
        raise ValueError(
            f"`timestep_shift` is {timestep_shift!r}; use one of {', '.join(map(repr, TIMESTEP_SHIFTS))}."
        )
    slope = (max_shift - base_shift) / (max_seq_len - base_seq_len)
    return base_shift + slope * (num_tokens - base_seq_len)


def shift_sigmas(sigmas: torch.Tensor, mu: float) -> torch.Tensor:
    """sigma' = e^mu / (e^mu + (1/sigma - 1)): the odds sigma / (1 - sigma) multiplied by e^mu."""
    return sigmas / (sigmas + (1 - sigmas) * math.exp(-mu))


def schedule_sigmas(num_inference_steps: int, mu: float = 0.0) -> torch.Tensor:
    """The sigmas that n sampling steps visit, from 1 downwards: linspace(1, 1/n, n), shifted; float64."""
    if num_inference_steps < 1:
        raise ValueError(f"`num_inference_steps` is {num_inference_steps}; give at least 1.")
    n = num_inference_steps
    return shift_sigmas(torch.linspace(1.0, 1.0 / n, n, dtype=torch.float64), mu)


def pipeline_sigmas(num_inference_steps: int, mu: float, pipeline_mu: float) -> list[float]:
    """`sigmas` for `FluxPipeline.__call__` that end up as the schedule of `mu`.

    FluxPipeline shifts whatever it is given by its own `pipeline_mu`. Shifts multiply odds, so sigmas whose
    odds were multiplied by exp(mu - pipeline_mu) arrive at mu. With equal mus this is FluxPipeline's default.
    """
    return schedule_sigmas(num_inference_steps, mu - pipeline_mu).tolist()


def sample_sigmas(
    batch_size: int,
    mu: float | torch.Tensor = 0.0,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Random sigmas (batch_size,) in (0, 1) for training: uniform over the schedule shifted by `mu`.

    `mu` is one number for all, or (batch_size,) where pictures differ in size.
    """
    uniform = torch.rand(batch_size, generator=generator, device=device).clamp(1e-4, 1 - 1e-4)
    shrink = torch.exp(-torch.as_tensor(mu, dtype=uniform.dtype, device=uniform.device))
    return uniform / (uniform + (1 - uniform) * shrink)


def _per_sample(sigma: float | torch.Tensor | Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """`sigma` (a number or (B,)) shaped to multiply `like` (B, ...)."""
    sigma = torch.as_tensor(sigma, dtype=like.dtype, device=like.device)
    return sigma.reshape(sigma.shape + (1,) * (like.ndim - sigma.ndim)) if sigma.ndim else sigma
