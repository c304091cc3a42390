"""Several candidates of one picture, of which the likest faces go on.

The noise that a picture is drawn from decides much of who is seen in it. Trying more of it buys likeness
with time, without training: search over noise (arXiv 2501.09732), and resampling on the way by what the clean
estimates show (arXiv 2501.06848). Here each of a picture's N candidates shows its clean estimate after a
step, and the face recogniser says how like each person comes out in it. The tokens near person i's box go on
from the candidate n where that person is likest, all others from the candidate that is best on the whole:

    s_n,i = cos(e_n,i, r_i)        n_i = argmax_n s_n,i        n_0 = argmax_n mean_i s_n,i
    x*_1[token] = x_1 of n_i near box i, of n_0 elsewhere
    x_t of n <- x_t of n + (1 - t) (x*_1 - x_1 of n)

So all candidates go on from one clean estimate x*_1, each with the noise that it had. After the last step the
best on the whole is the picture.

While there is nothing to choose by, one is run for all: the others share its clean estimate, x_1 of n = x_1
of 0, with noise of their own.

Likeness to the others of the picture is not subtracted from s: half of it did lower swaps (0.092 to 0.055 of
109 validation people, by the recogniser that chooses, within the intervals), and with them likeness to the
target (0.360 to 0.353) and how often the right one of 200 is nearest (0.37 to 0.32).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusers.hooks import ModelHook

from . import flow
from .bench.metrics import match_boxes, similarity_matrix

# Shares of noise where candidates are looked at: above, no face shows yet; below, nothing changes any more.
# On the miniature's validation people (84, four candidates, its own recogniser) likeness was 0.39 with these,
# 0.38 from 0.97 down to 0.3.
#
# Above, one candidate is run, from there on all. All from the start cost the miniature 112 rows of the
# transformer for a picture instead of 90, for likeness 0.366 instead of 0.367 and the right one of 200
# nearest in 0.35 instead of 0.36 (342 validation people, by the recogniser that chooses). Fewer later is
# dearer: two down to 0.35, then eight (81 rows), were as good on 132 of those people, 0.374, but not on 420
# test people, by the judge: 0.373 [0.357, 0.391] instead of 0.406 [0.390, 0.422]. One from 0.5 on: 0.304,
# of the 132.
MAX_SIGMA, MIN_SIGMA = 0.85, 0.1
# A look decodes every candidate. Of the steps between at most so many are looked at, evenly spread: all that
# the miniature's 14 steps have, not all of 28 or 50.
MAX_LOOKS = 10
REACH = 1.45  # how far a person's tokens reach from the middle of the box, in half boxes: hair and chin
ABSENT = -1.0  # the score of a face that is not there


def token_owners(
    bboxes: Sequence[Sequence[float]], height: int, width: int, pixels_per_token: int
) -> torch.Tensor:
    """Which person's box a token is near, or -1: (N,) of row-major image tokens.

    Distance is the larger one of the two axes, in half boxes; the nearest box within `REACH` has the token.
    """
    rows = torch.arange(height // pixels_per_token) + 0.5
    columns = torch.arange(width // pixels_per_token) + 0.5
    boxes = torch.as_tensor(np.asarray(bboxes, np.float32)) / pixels_per_token  # (P, 4)
    middle, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2  # (P, 2)
    dx = (columns[None] - middle[:, :1]).abs() / half[:, :1]  # (P, w)
    dy = (rows[None] - middle[:, 1:]).abs() / half[:, 1:]  # (P, h)
    distance, owner = torch.maximum(dy[:, :, None], dx[:, None, :]).min(dim=0)  # (h, w)
    return torch.where(distance < REACH, owner, -1).flatten()


def compose(clean: torch.Tensor, scores: np.ndarray, owners: torch.Tensor) -> torch.Tensor:
    """x*_1 (N, C) of candidates' clean estimates (K, N, C), their scores (K, P) and `token_owners` (N,)."""
    whole = int(scores.mean(axis=1).argmax())
    likest = torch.as_tensor([*scores.argmax(axis=0), whole], device=clean.device)  # (P + 1,); -1 is the last
    chosen = likest[owners.to(clean.device)]  # (N,)
    return clean[chosen, torch.arange(clean.shape[1], device=clean.device)]


def num_run(sigma: float, num_candidates: int) -> int:
    """How many of a picture's candidates are run in a step that starts from this share of noise."""
    return 1 if sigma > MAX_SIGMA else num_candidates


def steps_to_look_at(sigmas: Sequence[float]) -> list[int]:
    """The steps after which candidates are looked at; `sigmas`: shares of noise before each, then 0."""
    within = [
        step for step, (here, left) in enumerate(pairwise(sigmas))
        if MIN_SIGMA <= here <= MAX_SIGMA and left > 0
    ]  # fmt: skip
    looks = min(MAX_LOOKS, len(within))
    return [within[round(i)] for i in np.linspace(0, len(within) - 1, looks)]


class CandidateSearch:
    """The search of one call of the pipeline; as its callback it acts after each step.

    Args:
        pipe: the WithAnyonePipeline, whose `face_analyzer` and VAE look at the clean estimates.
        embeddings: (P, D) of the people.
        bboxes: where each of them shall be, pixels of the picture.
        num_candidates: of every picture; a picture's candidates stand together in the batch.
    """

    def __init__(
        self,
        pipe: Any,
        embeddings: np.ndarray,
        bboxes: Sequence[Sequence[float]],
        height: int,
        width: int,
        num_candidates: int,
    ) -> None:
        self.pipe, self.embeddings, self.bboxes = pipe, np.asarray(embeddings), np.asarray(bboxes)
        self.height, self.width, self.num_candidates = height, width, num_candidates
        patch = pipe.vae_scale_factor * 2
        self.owners = token_owners(bboxes, height, width, patch)
        self.estimates = flow.CleanEstimates()

    def scores(self, pictures: torch.Tensor) -> np.ndarray:
        """How like each person is in each picture (B, 3, H, W): cosines (B, P), `ABSENT` where no face is in
        the box."""
        images = self.pipe.image_processor.postprocess(pictures, output_type="pil")
        scores = np.full((len(images), len(self.bboxes)), ABSENT)
        for row, image in zip(scores, images, strict=True):
            found = self.pipe.face_analyzer.detect(image)
            at = match_boxes(np.array([face.bbox for face in found]).reshape(-1, 4), self.bboxes)
            for person in np.flatnonzero(at >= 0):
                face = found[at[person]].embedding[None]
                row[person] = similarity_matrix(face, self.embeddings[person, None])[0, 0]
        return scores

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, H, W), one after the other: a look needs no memory for all of them at once."""
        return torch.cat([self.pipe.decode_latents(row, self.height, self.width) for row in latents.split(1)])

    def num_run(self, step: int) -> int:
        """How many candidates of each picture step `step` (0: the first) runs; the last one runs all."""
        sigma, left = self.pipe.scheduler.sigmas[step : step + 2].tolist()
        return num_run(sigma, self.num_candidates) if left > 0 else self.num_candidates

    def after_step(self, step: int, latents: torch.Tensor) -> torch.Tensor:
        """`latents` (B, N, C) after step `step` (0: the first) as they go on."""
        scheduler = self.pipe.scheduler
        clean = self.estimates.after_step(scheduler, step, latents)
        if clean is None:
            return latents
        clean = clean.unflatten(0, (-1, self.num_candidates))  # (pictures, K, N, C)
        goes_on = clean.clone()
        running = self.num_run(step)
        goes_on[:, running:] = clean[:, :1]
        if running > 1 and step in steps_to_look_at(scheduler.sigmas.tolist()):
            seen = clean[:, :running]
            scores = self.scores(self.decode(seen.flatten(0, 1).to(latents.dtype)))
            for picture, group_scores in enumerate(scores.reshape(len(seen), running, -1)):
                if group_scores.max() > ABSENT:  # else nothing to choose by
                    goes_on[picture] = compose(seen[picture], group_scores, self.owners)
        clean, goes_on = clean.flatten(0, 1), goes_on.flatten(0, 1)
        self.estimates.replace(scheduler, goes_on)
        left = float(scheduler.sigmas[step + 1])
        return (latents.float() + (1 - left) * (goes_on - clean)).to(latents.dtype)

    def hook(self) -> ModelHook | None:
        """For the transformer: runs no more candidates of each picture than `num_run` says.

        None where it is compiled as a whole or has a step cache: both know one batch size, so all are run.
        """
        transformer = self.pipe.transformer
        return None if hasattr(transformer, "_orig_mod") or _has_cache(transformer) else _RunFew(self)

    def callback(self, users: Any, users_inputs: Sequence[str]) -> Any:
        """`callback_on_step_end` of FluxPipeline: the search, then the user's own with what it asked for."""

        def on_step_end(pipe: Any, step: int, timestep: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
            changed = {"latents": self.after_step(step, tensors["latents"])}
            if users is not None:
                given = {name: {**tensors, **changed}[name] for name in users_inputs}
                changed |= users(pipe, step, timestep, given)
            self.estimates.before = changed["latents"]
            return changed

        return on_step_end

    def best(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of every picture's finished candidates the best on the whole: its latents (pictures, N, C), and
        what they show (pictures, 3, H, W)."""
        pictures = self.decode(latents)
        scores = self.scores(pictures).mean(axis=1).reshape(-1, self.num_candidates)  # (pictures, K)
        chosen = scores.argmax(axis=1) + np.arange(len(scores)) * self.num_candidates
        chosen = torch.as_tensor(chosen, device=latents.device)
        return latents[chosen], pictures[chosen.to(pictures.device)]


def _has_cache(transformer: torch.nn.Module) -> bool:
    """Whether a hook of diffusers' keeps something of one step for the next, by `enable_cache` or not."""
    registries = (getattr(module, "_diffusers_hook", None) for module in transformer.modules())
    hooks = (item for registry in registries if registry is not None for item in registry.hooks.items())
    return any(hook._is_stateful for name, hook in hooks if not name.startswith("withanyone"))


class _RunFew(ModelHook):
    """Runs the first `num_run` candidates of each picture; the others wait.

    Those share the first one's clean estimate x_1: v = (x_t - x_1) / t, which leaves them their noise x_0.
    """

    ROWS = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance")

    def __init__(self, search: CandidateSearch) -> None:
        super().__init__()
        self.search = search

    def new_forward(self, module: torch.nn.Module, *args, **kwargs):
        scheduler, total = self.search.pipe.scheduler, self.search.num_candidates
        step = scheduler.step_index or 0  # None before the first
        running = self.search.num_run(step)
        if running == total:
            return self.fn_ref.original_forward(*args, **kwargs)

        def first(rows: torch.Tensor) -> torch.Tensor:
            return rows.unflatten(0, (-1, total))[:, :running].flatten(0, 1)

        latents = kwargs["hidden_states"].unflatten(0, (-1, total)).float()  # (pictures, K, N, C)
        kwargs |= {name: first(kwargs[name]) for name in self.ROWS if kwargs[name] is not None}
        (velocity,) = self.fn_ref.original_forward(*args, **kwargs)
        dtype, velocity = velocity.dtype, velocity.unflatten(0, (-1, running)).float()
        sigma = float(scheduler.sigmas[step])
        clean = flow.denoised(latents[:, :1], velocity[:, :1], sigma)
        waiting = (latents[:, running:] - clean) / sigma
        return (torch.cat([velocity, waiting], dim=1).flatten(0, 1).to(dtype),)
