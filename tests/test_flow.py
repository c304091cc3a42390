"""Flow matching: which end is noise, and that both timestep shifts arrive where they should."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from withanyone import flow


def test_sigma_1_is_noise_and_0_is_clean():
    latents, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert torch.equal(flow.noisy_latents(latents, noise, 0.0), latents)
    assert torch.equal(flow.noisy_latents(latents, noise, 1.0), noise)


def test_the_true_velocity_gives_the_clean_latents_back():
    latents, noise = torch.randn(5, 6, 4), torch.randn(5, 6, 4)
    sigma = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
    noisy = flow.noisy_latents(latents, noise, sigma)
    clean = flow.denoised(noisy, flow.velocity(latents, noise), sigma)
    torch.testing.assert_close(clean, latents, atol=1e-6, rtol=0)


def test_velocity_is_the_derivative_of_the_noisy_latents():
    latents, noise = torch.randn(2, 8).double(), torch.randn(2, 8).double()
    step = (flow.noisy_latents(latents, noise, 0.5001) - flow.noisy_latents(latents, noise, 0.4999)) / 0.0002
    torch.testing.assert_close(step, flow.velocity(latents, noise), atol=1e-9, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(256, 256), (512, 768), (1024, 1024), (1360, 768)])
def test_flux_shift_is_the_pipelines_own(height, width):
    expected = calculate_shift((height // 16) * (width // 16))
    assert flow.shift_mu(height, width, "flux") == pytest.approx(expected, abs=1e-12)


def test_released_shift_at_1024_px_is_that_of_64_tokens():
    assert flow.shift_mu(1024, 1024, "released") == pytest.approx(calculate_shift(64), abs=1e-12)
    assert flow.shift_mu(1024, 1024, "released") == pytest.approx(0.4675, abs=1e-4)


def test_unknown_shift_names_the_choices():
    with pytest.raises(ValueError, match="`timestep_shift` is 'fluxx'.*'released', 'flux'"):
        flow.shift_mu(512, 512, "fluxx")


@pytest.mark.parametrize("size", [(1024, 1024), (512, 512), (768, 1360)])
def test_pipeline_sigmas_reach_the_released_schedule_through_diffusers_own_shift(size):
    released, own = flow.shift_mu(*size, "released"), flow.shift_mu(*size, "flux")
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=flow.pipeline_sigmas(25, released, own), mu=own)
    expected = flow.schedule_sigmas(25, released).float()
    torch.testing.assert_close(scheduler.sigmas[:-1], expected, atol=1e-6, rtol=0)
    assert scheduler.sigmas[0] == 1 and scheduler.sigmas[-1] == 0


def test_pipeline_sigmas_without_a_difference_are_fluxs_own():
    assert flow.pipeline_sigmas(25, 0.7, 0.7) == pytest.approx(np.linspace(1, 1 / 25, 25), abs=1e-12)


def test_shift_multiplies_odds():
    sigmas = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    shifted = flow.shift_sigmas(sigmas, 0.6)
    torch.testing.assert_close(shifted / (1 - shifted), math.exp(0.6) * sigmas / (1 - sigmas))


def test_sampled_sigmas_follow_the_shifted_schedule():
    mu = torch.tensor([0.5, 1.15]).repeat_interleave(20_000)
    sigmas = flow.sample_sigmas(40_000, mu, generator=torch.Generator().manual_seed(0))
    assert sigmas.min() > 0 and sigmas.max() < 1
    for part, m in ((sigmas[:20_000], 0.5), (sigmas[20_000:], 1.15)):
        # The median of a uniform draw shifted by mu is 1 / (1 + e^-mu).
        assert part.median().item() == pytest.approx(1 / (1 + math.exp(-m)), abs=0.01)
    again = flow.sample_sigmas(40_000, mu, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sigmas, again)


def test_no_steps_is_an_error():
    with pytest.raises(ValueError, match="`num_inference_steps` is 0"):
        flow.schedule_sigmas(0)
