"""The miniature's scheduler: FLUX's, with fresh noise in every step that the seed alone decides.

A small base errs a little in every step, and Euler's steps carry each error to the end: hair, glasses and
eyes come out torn. Stochastic sampling throws a step's error away with its noise: the clean estimate is kept,
the rest drawn anew. Where little noise is left, though, it throws away with it what had been made out of fine
detail, and faces blur; Euler's steps do better there. FluxPipeline gives its scheduler no generator, so
diffusers' own `stochastic_sampling` draws from the global state, and a seed would not give its picture again.
"""

from __future__ import annotations

import hashlib

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,  # noqa: F401 (diffusers loads a class only where its base is a name of the same module)
)
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor

from withanyone import flow


class SeededFlowMatchScheduler(FlowMatchEulerDiscreteScheduler):
    """FlowMatchEulerDiscreteScheduler whose stochastic sampling follows from the initial latents:

        x' = (1 - sigma') (x - sigma v) + sigma' noise

    Each row's noise is drawn by a generator of its own, seeded by that row's first latents: a picture is the
    same alone and in a batch, on any device. Without `stochastic_sampling` it is its parent.

    Args:
        stochastic_min_sigma: steps that start from less noise than this are Euler's.
        others: the parent's.

    Attributes:
        clean_estimate: x - sigma v of the last step, which its result no longer tells; None before the first.
    """

    clean_estimate: Tensor | None = None
    _generators: list[torch.Generator] | None = None

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: str = "exponential",
        stochastic_sampling: bool = False,
        stochastic_min_sigma: float = 0.0,
    ) -> None:
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            shift=shift,
            use_dynamic_shifting=use_dynamic_shifting,
            base_shift=base_shift,
            max_shift=max_shift,
            base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len,
            invert_sigmas=invert_sigmas,
            shift_terminal=shift_terminal,
            use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas,
            time_shift_type=time_shift_type,
            stochastic_sampling=stochastic_sampling,
        )

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        *args,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        **kwargs,
    ):
        """As the parent's; `generator` takes the place of the rows' own."""
        if self.config.stochastic_sampling:
            if self.step_index is None:  # a picture's first step
                self._generators = [_generator_of(row) for row in sample]
                self._init_step_index(timestep)
            generator = generator or self._generators
            sigma = self.sigmas[self.step_index]
            self.clean_estimate = flow.denoised(sample.float(), model_output.float(), sigma)
            if sigma < self.config.stochastic_min_sigma:
                down = self.sigmas[self.step_index + 1] - sigma
                previous = (sample.float() + down * model_output.float()).to(model_output.dtype)
                self._step_index += 1
                if not return_dict:
                    return (previous,)
                return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=previous)
        return super().step(
            model_output, timestep, sample, *args, generator=generator, return_dict=return_dict, **kwargs
        )


def _generator_of(latents: Tensor) -> torch.Generator:
    """A generator that these latents seed, to the bit."""
    digest = hashlib.blake2b(latents.detach().float().cpu().numpy().tobytes(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
