"""A base that learns with an adapter beside it: the very picture's faces, sliders, gradients, processes."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from withanyone.layout import token_mask
from withanyone.mini import PRETRAINED, base, given, pictures
from withanyone.mini.latents import PatchAutoencoder
from withanyone.mini.pictures import PAIR, PORTRAIT

SHARD_SIZE = 4


@pytest.fixture(scope="module")
def data(picture_shards, tmp_path_factory):
    vae = PatchAutoencoder.from_pretrained(PRETRAINED / "vae", dtype=torch.float32).eval()
    models = base.TextModels.from_pretrained(PRETRAINED)
    faces = given.FaceModels.from_pretrained(PRETRAINED)
    cache = tmp_path_factory.mktemp("cache")
    return base.LatentPictures(picture_shards, cache, "train", vae, models, faces)


def make_trainer(data):
    return base.Trainer(data, data.models, seed=0, tokens_per_step=128)


def test_faces_are_those_of_the_pictures(data):
    shard = data.pools[PAIR]
    arrays, _ = pictures.read_shard(data.folder / "train_00001.safetensors")
    assert torch.equal(shard["count"], torch.from_numpy((arrays["identities"] >= 0).sum(axis=1)))
    assert torch.equal(shard["bboxes"], torch.from_numpy(arrays["bboxes"][:, : shard["bboxes"].shape[1]]))
    assert shard["embeddings"].shape[2:] == (512,) and shard["features"].shape[2:] == (49, 128)
    # Mirrored pictures follow the others, and have no faces.
    assert len(shard["tokens"]) == 2 * len(shard["count"])
    there = torch.arange(shard["embeddings"].shape[1])[None] < shard["count"][:, None]
    assert (shard["embeddings"].abs().sum(dim=-1) > 0).equal(there)


def test_a_batch_has_each_pictures_own_people(data):
    drawn = data.draw(PAIR, 6, np.random.default_rng(0), with_faces=True)
    tokens, faces = drawn.tokens, drawn.faces
    shard = data.pools[PAIR]
    for row, count in enumerate(faces.count):
        picture = next(i for i, t in enumerate(shard["tokens"]) if torch.equal(t.float(), tokens[row]))
        boxes = shard["bboxes"][picture, : shard["count"][picture]].tolist()
        assert count == len(boxes)
        assert torch.equal(faces.face_mask[row, :, :count], token_mask([boxes], PAIR.height, PAIR.width)[0])
        for place in range(count):
            assert torch.equal(faces.embeddings[row, place], shard["embeddings"][picture, place].float())
            assert torch.equal(faces.kps[row, place], shard["kps"][picture, place])
    assert data.draw(PAIR, 6, np.random.default_rng(0)).faces is None


def test_scales_see_every_place_of_the_sliders():
    id_scale, siglip_scale = given.draw_scales(500, np.random.default_rng(0))
    similarity = id_scale + siglip_scale
    assert given.SIMILARITY[0] <= similarity.min() and similarity.max() <= given.SIMILARITY[1]
    for alone in (id_scale, siglip_scale):
        assert 0.2 < (alone == 0).float().mean() < 0.4
    assert ((id_scale > 0) & (siglip_scale > 0)).float().mean() > 0.3


def test_both_learn_where_faces_are_given_and_the_base_alone_where_not(data):
    trainer = make_trainer(data)
    trainer.face_share = 1.0
    trainer.step(0, 1e-3, 0.9)
    gradients = {name: p.grad for name, p in trainer.adapter.named_parameters()}
    assert gradients["ipa_sig.0.to_out.weight"].abs().sum() > 0
    assert gradients["ipa_arc.5.to_out.weight"].abs().sum() > 0
    assert trainer.model.proj_out.weight.grad.abs().sum() > 0
    trainer.face_share = 0.0
    trainer.step(1, 1e-3, 0.9)
    assert all(p.grad is None for p in trainer.adapter.parameters())
    assert trainer.model.proj_out.weight.grad.abs().sum() > 0


def test_perceptual_loss_is_nothing_on_the_target_and_has_true_gradients(data):
    recognizer = data.face_models.recognizer
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand((2, 3, 64, 64), generator=generator) * 2 - 1
    kps = torch.tensor([[20.0, 25], [44, 25], [32, 38], [23, 48], [41, 48]]).repeat(2, 1, 1)
    assert given.perceptual_loss(recognizer, targets, targets, kps).abs() < 1e-6
    pictures = (targets * 0.7).requires_grad_(True)
    loss = given.perceptual_loss(recognizer, pictures, targets, kps)
    assert loss > 0.01
    (gradient,) = torch.autograd.grad(loss, pictures)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        ahead, behind = (
            given.perceptual_loss(recognizer, pictures + sign * 0.05 * direction, targets, kps)
            for sign in (1, -1)
        )
    assert float((ahead - behind) / 0.1) == pytest.approx(float(gradient.norm()), rel=0.05)


def test_features_of_faces_count_where_noise_is_low(data):
    trainer = make_trainer(data)
    drawn = data.draw(PAIR, 2, np.random.default_rng(0), with_faces=True)
    estimate = (drawn.tokens + 0.3).requires_grad_(True)
    low, high = base.FEATURE_MAX_SIGMA, base.FEATURE_MAX_SIGMA + 0.1
    loss = trainer.feature_loss(estimate, drawn.tokens, torch.tensor([low, high]), drawn.faces, PAIR)
    (gradient,) = torch.autograd.grad(loss, estimate)
    assert gradient[0].abs().sum() > 0 and gradient[1].abs().sum() == 0
    near = torch.nn.functional.max_pool2d(drawn.face_share[0].view(1, 12, 12), 3, 1, 1).view(-1) > 0
    assert not near.all() and gradient[0][near].abs().sum() > 0.99 * gradient[0].abs().sum()
    nothing = trainer.feature_loss(estimate, drawn.tokens, torch.tensor([high, high]), drawn.faces, PAIR)
    assert nothing == 0


def test_a_run_in_two_parts_is_a_run_in_one(data, tmp_path):
    whole, first = make_trainer(data), make_trainer(data)
    for step in whole.loop(tmp_path / "whole", 4, "x"):
        whole.step(step, 1e-3, 0.9)
    for step in first.loop(tmp_path / "parts", 2, "x"):
        first.step(step, 1e-3, 0.9)
    second = make_trainer(data)
    loop = second.loop(tmp_path / "parts", 4, "x")
    assert loop.step == 2
    for step in loop:
        second.step(step, 1e-3, 0.9)
    for name in ("model", "average", "adapter", "adapter_average"):
        states = (getattr(trainer, name).state_dict() for trainer in (whole, second))
        for (key, a), (_, b) in zip(*(state.items() for state in states), strict=True):
            assert torch.equal(a, b), (name, key)


def test_exported_adapter_fits_the_exported_base(data, tmp_path):
    trainer = make_trainer(data)
    base.export(trainer.average, tmp_path)
    base.export_adapter(trainer.adapter_average, tmp_path / "face_adapter")
    model = base.FluxTransformer2DModel.from_pretrained(tmp_path / "transformer")
    given.FaceAdapter.from_pretrained(tmp_path / "face_adapter").attach(model)


def test_a_warm_restart_takes_up_base_and_adapter(data, tmp_path):
    trainer = make_trainer(data)
    for parameter in trainer.adapter_average.parameters():
        torch.nn.init.normal_(parameter)
    base.export(trainer.average, tmp_path)
    base.export_adapter(trainer.adapter_average, tmp_path / "face_adapter")
    warm = base.Trainer(
        data, data.models, seed=1, tokens_per_step=128, init_from=tmp_path / "transformer",
        init_adapter=tmp_path / "face_adapter",
    )  # fmt: skip
    for ours, theirs in ((trainer.average, warm.model), (trainer.adapter_average, warm.adapter)):
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a.bfloat16().float(), b), name
    assert all(p.requires_grad for p in warm.adapter.parameters())


@pytest.mark.slow
def test_compiled_blocks_with_faces_equal_plain_ones(data):
    plain = make_trainer(data)
    compiled = base.Trainer(data, data.models, seed=0, tokens_per_step=128, compiled=True)
    for trainer in (plain, compiled):
        for parameter in trainer.adapter.parameters():
            torch.nn.init.normal_(
                parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel())
            )
    faces = data.draw(PORTRAIT, 2, np.random.default_rng(3), with_faces=True).faces
    inputs = base.position_ids(PORTRAIT, 24)
    outputs = []
    for trainer in (plain, compiled):
        torch.manual_seed(0)
        with torch.no_grad():
            outputs.append(
                trainer.model(
                    hidden_states=torch.randn(2, 64, 96),
                    encoder_hidden_states=torch.randn(2, 24, 128),
                    pooled_projections=torch.randn(2, 128),
                    timestep=torch.tensor([0.3, 0.8]),
                    img_ids=inputs[0],
                    txt_ids=inputs[1],
                    joint_attention_kwargs=base.face_kwargs(faces.encode(trainer.adapter)),
                    return_dict=False,
                )[0]
            )
    assert torch.allclose(*outputs, atol=1e-4)


PROCESSES = """
import torch
from withanyone.mini import base

base.join_processes()
a, b, c = (torch.nn.Parameter(torch.zeros(3)) for _ in range(3))
a.grad = torch.full((3,), float(base.rank() + 1))
if base.rank() == 0:
    b.grad = torch.ones(3)
base.average_gradients([a, b, c])
assert torch.equal(a.grad, torch.full((3,), 1.5)), a.grad
assert torch.equal(b.grad, torch.full((3,), 0.5)), b.grad
assert torch.equal(c.grad, torch.zeros(3)), c.grad
"""


@pytest.mark.slow
def test_two_processes_share_the_mean_gradient(tmp_path):
    script = tmp_path / "average.py"
    script.write_text(PROCESSES)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(script),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
