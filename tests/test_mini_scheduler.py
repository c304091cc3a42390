"""The miniature's scheduler: noise that the initial latents decide, and nothing else changed."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from withanyone import WithAnyonePipeline
from withanyone.mini import PRETRAINED
from withanyone.mini.scheduler import SeededFlowMatchScheduler


def make(kind=SeededFlowMatchScheduler, stochastic=True, steps=6):
    scheduler = kind(stochastic_sampling=stochastic)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    return scheduler


def run(scheduler, latents, velocity):
    for timestep in scheduler.timesteps:
        latents = scheduler.step(velocity(latents, timestep / 1000), timestep, latents, return_dict=False)[0]
    return latents


def bent(latents, sigma):
    """Any velocity that works on each row alone."""
    return latents.cos() * (1 + sigma) - latents.roll(1, dims=-1)


@pytest.fixture
def latents():
    return torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(0))


def test_a_row_is_the_same_alone_and_in_a_batch(latents):
    together = run(make(), latents, bent)
    for row in range(3):
        assert torch.equal(run(make(), latents[row : row + 1], bent)[0], together[row])


def test_the_latents_alone_decide(latents):
    torch.manual_seed(1)
    first = run(make(), latents, bent)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    scheduler = make()
    assert torch.equal(run(scheduler, latents, bent), first)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 6, 6))  # the same scheduler's next picture
    assert torch.equal(run(scheduler, latents, bent), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn from the global generator
    other = run(make(), latents + 1e-6, bent)
    assert (other - first).abs().mean() > 0.1


def test_a_step_keeps_the_clean_estimate_and_draws_the_rest_anew(latents):
    scheduler = make(steps=4)
    velocity = bent(latents, 1.0)
    after = scheduler.step(velocity, scheduler.timesteps[0], latents, return_dict=False)[0]
    clean = latents - velocity  # sigma is 1
    assert torch.allclose(scheduler.clean_estimate, clean)
    noise = (after - 0.25 * clean) / 0.75
    assert abs(float(noise.mean())) < 0.15 and abs(float(noise.std()) - 1) < 0.1
    assert abs(float((noise * latents).mean())) < 0.15  # fresh: not the noise that was there


def test_given_generator_is_used_as_the_parents(latents):
    ends = []
    for kind in (SeededFlowMatchScheduler, FlowMatchEulerDiscreteScheduler):
        scheduler, generator = make(kind), torch.Generator().manual_seed(5)
        x = latents
        for timestep in scheduler.timesteps:
            x = scheduler.step(bent(x, timestep / 1000), timestep, x, generator=generator).prev_sample
        ends.append(x)
    assert torch.equal(*ends)


def test_exact_velocities_end_at_the_picture(latents):
    picture = torch.linspace(-1, 1, 8).expand_as(latents)
    end = run(make(), latents, lambda x, sigma: (x - picture) / sigma)
    assert torch.allclose(end, picture, atol=1e-5)


def test_without_the_setting_it_is_its_parent(latents):
    ours = run(make(stochastic=False), latents, bent)
    assert torch.equal(ours, run(make(FlowMatchEulerDiscreteScheduler, stochastic=False), latents, bent))


def test_the_folder_keeps_it(tmp_path):
    SeededFlowMatchScheduler(stochastic_sampling=True).save_pretrained(tmp_path)
    loaded = SeededFlowMatchScheduler.from_pretrained(tmp_path)
    assert type(loaded) is SeededFlowMatchScheduler and loaded.config.stochastic_sampling
    pipe = WithAnyonePipeline.from_pretrained(PRETRAINED)
    assert type(pipe.scheduler) is SeededFlowMatchScheduler and pipe.scheduler.config.stochastic_sampling
    euler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, stochastic_sampling=False)
    assert type(euler) is FlowMatchEulerDiscreteScheduler and euler.config.base_image_seq_len == 64


def test_a_seed_gives_its_picture_again_and_in_a_batch():
    pipe = WithAnyonePipeline.from_pretrained(PRETRAINED)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 3, "output_type": "np"}

    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    both = pipe(["a smiling person"] * 2, generator=generators(1, 2), **settings).images
    again = pipe("a smiling person", generator=generators(2), **settings).images[0]
    assert np.abs(both[1] - again).max() < 1e-3
    assert np.abs(both[0] - both[1]).mean() > 0.02
