"""Several candidates of one picture: whose tokens go on, with which noise, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import apply_first_block_cache

from tests import tiny
from withanyone import flow
from withanyone.adapter import CONDITIONING_KEY
from withanyone.candidates import (
    ABSENT,
    MAX_LOOKS,
    MAX_SIGMA,
    CandidateSearch,
    compose,
    num_run,
    steps_to_look_at,
    token_owners,
)
from withanyone.mini.scheduler import SeededFlowMatchScheduler

BOXES = [(4, 8, 30, 40), (34, 6, 60, 44)]


class Analyzer:
    """Says of every picture it sees which faces are there, by a list told beforehand, over and over."""

    def __init__(self, *looks) -> None:
        self.looks, self.seen = looks, 0

    def detect(self, image):
        look = self.looks[self.seen % len(self.looks)]
        self.seen += 1
        assert image.size == (64, 64)
        return look


def face_in(box, embedding):
    return replace(tiny.face(1), bbox=np.array(box, np.float32), embedding=embedding)


def pipe_with(analyzer, **parts):
    pipe = tiny.pipeline(face_analyzer=None, **parts)
    pipe.register_modules(face_analyzer=analyzer)
    return pipe


def run(pipe, **kwargs):
    given = {
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
        "height": 64,
        "width": 64,
    }
    given |= {"faces": [tiny.face(1), tiny.face(2)], "bboxes": BOXES, "num_inference_steps": 6}
    return pipe("two people", **{**given, **kwargs}).images


def test_tokens_near_a_box_are_its_persons():
    owners = token_owners([(16, 16, 32, 32), (48, 16, 64, 32)], 48, 80, 16).reshape(3, 5)
    # half a box is half a token: 1.45 of them reach no neighbour's middle
    assert owners.tolist() == [[-1] * 5, [-1, 0, -1, 1, -1], [-1] * 5]
    owners = token_owners([(0, 0, 64, 64), (64, 0, 128, 64)], 64, 128, 16).reshape(4, 8)
    assert owners[:, :4].eq(0).all() and owners[:, 4:].eq(1).all()  # the nearer box has a token of both


def test_each_person_goes_on_from_the_candidate_where_they_are_likest():
    clean = torch.arange(3.0)[:, None, None].expand(3, 4, 2)  # candidate n is n everywhere
    scores = np.array([[0.9, 0.1], [0.3, 0.8], [0.55, 0.6]])
    out = compose(clean, scores, torch.tensor([0, 1, -1, 0]))
    assert out[:, 0].tolist() == [0, 1, 2, 0]  # elsewhere the best on the whole


def test_few_steps_are_all_looked_at_and_many_evenly():
    assert steps_to_look_at([1.0, 0.86, 0.85, 0.5, 0.1, 0.09, 0.0]) == [2, 3, 4]
    assert steps_to_look_at([0.5, 0.3, 0.0]) == [0]  # after the last step there is nothing left to choose
    assert steps_to_look_at([1.0, 0.9, 0.0]) == []
    sigmas = np.linspace(1, 0, 51)
    looks = steps_to_look_at(sigmas)
    assert len(looks) == MAX_LOOKS and sigmas[looks[0] - 1] > MAX_SIGMA >= sigmas[looks[0]]
    assert np.diff(looks).min() >= 3 and np.diff(looks).max() <= 5


@pytest.mark.parametrize("stochastic", [False, True])
def test_candidates_share_the_estimate_and_keep_their_noise(stochastic):
    """x_t = (1 - t) x_1 + t x_0 with one x_1 for all, and each candidate's own x_0."""
    generator = torch.Generator().manual_seed(0)
    scheduler = SeededFlowMatchScheduler(stochastic_sampling=stochastic)
    scheduler.set_timesteps(sigmas=[0.8, 0.6, 0.35])
    person = np.eye(512, dtype=np.float32)[0]
    analyzer = Analyzer([], [face_in((0, 0, 64, 64), person)])  # of each two candidates the second shows it
    pipe = pipe_with(analyzer, scheduler=scheduler)
    search = CandidateSearch(pipe, person[None], [(0, 0, 64, 64)], 64, 64, 2)
    x = torch.randn(2, 16, 16, generator=generator)
    before, clean = None, None
    for step, t in enumerate(scheduler.timesteps):
        velocity = torch.randn(2, 16, 16, generator=generator)
        clean = flow.denoised(x, velocity, scheduler.sigmas[step])
        before, x = x, scheduler.step(velocity, t, x, return_dict=False)[0]
        after = search.after_step(step, x)
        search.estimates.before = after
        left = scheduler.sigmas[step + 1]
        # the last step's result is what it is; Euler's first step tells nothing
        if left == 0 or (step == 0 and not stochastic):
            assert torch.equal(after, x)
        else:
            noise = (x - (1 - left) * clean) / left
            torch.testing.assert_close(after, flow.noisy_latents(clean[[1, 1]], noise, left))
        x = after
    assert before is not None


@pytest.mark.parametrize("stochastic", [False, True])
def test_candidates_that_wait_share_the_estimate_of_the_first_and_keep_their_noise(stochastic):
    """One is run until there is something to see, then all."""
    scheduler = SeededFlowMatchScheduler(stochastic_sampling=stochastic)
    pipe = pipe_with(Analyzer([]), scheduler=scheduler)
    sizes, states, inner = [], [], pipe.transformer.forward

    def forward(hidden_states, **kwargs):
        sizes.append(len(hidden_states))
        assert len(kwargs["timestep"]) == len(kwargs["pooled_projections"]) == len(hidden_states)
        return inner(hidden_states=hidden_states, **kwargs)

    pipe.transformer.forward = forward
    sigmas = [1.0, 0.95, 0.9, 0.84, 0.3]
    given = {"num_candidates": 3, "num_images_per_prompt": 2, "sigmas": sigmas, "true_cfg_scale": 2.0}

    def watch(pipe, step, timestep, tensors):
        states.append(tensors["latents"].unflatten(0, (2, 3)))
        return {}

    few = run(pipe, **given, callback_on_step_end=watch)
    assert sizes == [2] * 6 + [6] * 4  # guidance doubles the passes
    # Candidates differ by their noise alone, times the share of it that is left.
    apart = [(x[:, 1:] - x[:, :1]) / left for x, left in zip(states[:3], sigmas[1:4], strict=True)]
    assert [each.std().item() for each in apart] == pytest.approx([2**0.5] * 3, rel=0.1)
    if not stochastic:  # the noise that they began with
        torch.testing.assert_close(apart[1], apart[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(apart[2], apart[0], rtol=1e-3, atol=1e-3)

    # A transformer that knows one batch size runs all rows; they share the estimate all the same.
    apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=0.0))
    sizes.clear()
    every = run(pipe, **given)
    assert sizes == [6] * 10
    if stochastic:
        torch.testing.assert_close(every, few, rtol=1e-3, atol=1e-3)
    assert len(run(pipe_with(Analyzer([])), num_candidates=3, sigmas=[1.0])) == 1


def test_how_many_are_run():
    assert [num_run(sigma, 4) for sigma in (1.0, 0.86, 0.85, 0.1)] == [1, 1, 4, 4]
    pipe = pipe_with(Analyzer([]), scheduler=SeededFlowMatchScheduler())
    search = CandidateSearch(pipe, np.eye(2, 512), BOXES, 64, 64, 4)
    pipe.scheduler.set_timesteps(sigmas=[1.0, 0.9])
    assert [search.num_run(step) for step in (0, 1)] == [1, 4]  # the best of all is the picture


def test_the_picture_is_the_best_of_its_candidates():
    wanted = [tiny.face(1).embedding, tiny.face(2).embedding]
    both = [face_in(box, e) for box, e in zip(BOXES, wanted, strict=True)]
    one, swapped = both[:1], [face_in(box, e) for box, e in zip(BOXES, wanted[::-1], strict=True)]
    pipe = pipe_with(Analyzer(one, swapped, both), scheduler=tiny.scheduler())
    search = CandidateSearch(pipe, np.stack(wanted), BOXES, 64, 64, 3)
    latents = torch.randn(6, 16, 16)
    scores = search.scores(search.decode(latents))
    assert scores[0, 1] == scores[3, 1] == ABSENT
    assert scores[2] == pytest.approx([1, 1]) and (scores[1] < 0.9).all()
    best, pictures = search.best(latents)
    assert torch.equal(best, latents[[2, 5]])
    torch.testing.assert_close(pictures, pipe.decode_latents(latents[[2, 5]], 64, 64), rtol=1e-4, atol=1e-5)


def test_candidates_without_a_choice_are_pictures_of_their_own():
    """Where no face is ever found, the first candidate of each picture goes on undisturbed."""
    pipe = pipe_with(Analyzer([]))
    alone = run(pipe, num_images_per_prompt=1)
    found = run(pipe, num_candidates=3, generator=[torch.Generator().manual_seed(0)])
    torch.testing.assert_close(found, alone, rtol=1e-3, atol=1e-4)


def test_every_picture_has_candidates_of_its_own():
    pipe = pipe_with(Analyzer([face_in(BOXES[0], tiny.face(1).embedding)], []))
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    out = pipe(
        ["ab", "cd"], faces=[tiny.face(1)], bboxes=BOXES[:1], num_candidates=2, num_images_per_prompt=2,
        generator=generators, height=64, width=64, num_inference_steps=3, output_type="pil",
    ).images  # fmt: skip
    assert [image.size for image in out] == [(64, 64)] * 4
    assert len({image.tobytes() for image in out}) == 4


def test_the_users_callback_sees_what_goes_on():
    pipe = pipe_with(Analyzer([], [face_in(BOXES[0], tiny.face(1).embedding)]))
    seen = []

    def watch(pipe, step, timestep, tensors):
        seen.append((sorted(tensors), tensors["latents"].clone()))
        return {}

    out = run(pipe, num_candidates=2, callback_on_step_end=watch)
    assert [names for names, _ in seen] == [["latents"]] * 6
    assert torch.equal(out[0], seen[-1][1][1])
    inputs = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    run(
        pipe,
        num_candidates=2,
        callback_on_step_end=lambda p, i, t, tensors: seen.append(tensors) or {},
        **inputs,
    )
    assert list(seen[-1]) == ["prompt_embeds"]


def test_one_candidate_or_nobody_is_the_plain_call():
    pipe = pipe_with(Analyzer())  # is not asked
    plain = run(tiny.pipeline())
    assert torch.equal(run(pipe, num_candidates=1), plain)
    base = run(tiny.pipeline(), faces=None, bboxes=None)
    embeddings, features = pipe.encode_faces([tiny.face(1), tiny.face(2)])
    scales = {"id_scale": 0.0, "siglip_scale": 1.0}
    ready = pipe.face_adapter.encode(embeddings, features, [BOXES], 64, 64, **scales)
    given = {"faces": None, "bboxes": None, "joint_attention_kwargs": {CONDITIONING_KEY: ready}}
    assert torch.equal(run(pipe, num_candidates=4, **given), run(tiny.pipeline(), **given))
    assert torch.equal(run(pipe, num_candidates=4, faces=None, bboxes=None), base)
    assert torch.equal(run(pipe, num_candidates=4, id_scale=0.0, siglip_scale=0.0), base)


@pytest.mark.parametrize("value", [0, 1.5, True, "two"])
def test_a_wrong_number_of_candidates_is_named(value):
    with pytest.raises(ValueError, match="`num_candidates`"):
        run(tiny.pipeline(), num_candidates=value)


def test_what_candidates_need_is_said():
    with pytest.raises(ValueError, match="`face_analyzer`.*`num_candidates=1`"):
        run(tiny.pipeline(face_analyzer=None), num_candidates=2)
    with pytest.raises(ValueError, match="`latents` say where.*`num_candidates=1`"):
        run(pipe_with(Analyzer([])), num_candidates=2, latents=torch.zeros(2, 16, 16))
