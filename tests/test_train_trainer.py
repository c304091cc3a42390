"""The trainer: exact resume, gradients where they belong, only the adapter trained and kept."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests import tiny_faces
from tests import train_world as tw
from train import step as step_module
from train.config import make_config
from train.optim import learning_rate_factor
from train.references import cache_features
from train.step import sigmas_of
from train.trainer import Trainer
from train.validation import face_in_box, score_case, validate
from withanyone import FaceAdapter, flow
from withanyone.faces import crop_face


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(shards, pipeline)."""
    folder = tmp_path_factory.mktemp("world")
    return tw.write_shards(folder / "shards"), tw.tiny_pipeline(folder / "pack")


def _trainer(world, out, **overrides) -> Trainer:
    shards, pipeline = world
    return Trainer(make_config(tw.settings(shards, out, **overrides)), pipeline)


def _log(out) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def _first_batch(trainer):
    return next(trainer._batches())


def _wake(adapter: FaceAdapter) -> None:
    """An untrained adapter adds nothing: give its output projections weights."""
    with torch.no_grad():
        for branch in adapter.branches:
            for attention in adapter.attentions(branch):
                attention.to_out.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))


def test_the_identity_losses_see_the_target_as_it_is(world, tmp_path, monkeypatch):
    """The recogniser is given the batch's own pictures in [-1, 1], beside the decoded estimates."""
    from train import step as step_module

    trainer = _trainer(world, tmp_path, paired_ratio=0.5, id_loss_weight=0.1)
    batch, seen = _first_batch(trainer), []
    real = step_module.align_face
    monkeypatch.setattr(
        step_module, "align_face", lambda images, kps: seen.append(images) or real(images, kps)
    )
    trainer.train_step(batch)
    _, targets = seen  # of each face looked at, its whole picture
    pictures = batch.pixels.numpy().astype(np.float32) / 127.5 - 1  # (B, 3, H, W)
    assert -1 <= targets.min() < -0.2 and 0.2 < targets.max() <= 1
    for target in targets.numpy():
        assert np.abs(pictures - target).max(axis=(1, 2, 3)).min() < 1e-6


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_that_was_interrupted_ends_as_if_it_had_not_been(world, tmp_path, optimizer, monkeypatch):
    settings = {"paired_ratio": 0.5, "optimizer": optimizer, "max_train_steps": 5, "checkpointing_steps": 2,
                "lr_scheduler": "cosine"}  # fmt: skip
    _trainer(world, tmp_path / "whole", **settings).train()
    broken = _trainer(world, tmp_path / "parts", **settings)
    step = broken._optimizer_step
    calls = iter(range(100))

    def stop_in_the_fourth(batches):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return step(batches)

    monkeypatch.setattr(broken, "_optimizer_step", stop_in_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    assert [row["step"] for row in _log(tmp_path / "parts")] == [1, 2, 3]
    resumed = _trainer(world, tmp_path / "parts", **settings)
    assert resumed.step == 2
    resumed.train()
    assert _log(tmp_path / "parts") == _log(tmp_path / "whole")
    for name in ("adapter", "ema", "optimizer_0"):
        files = [tmp_path / d / f"checkpoints/step_00000005/{name}.safetensors" for d in ("whole", "parts")]
        whole, parts = map(load_file, files)
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_only_the_adapter_is_trained_and_kept(world, tmp_path):
    pipeline = world[1]
    parts = ("transformer", "vae", "text_encoder", "text_encoder_2", "image_encoder")
    before = {n: {k: v.clone() for k, v in getattr(pipeline, n).state_dict().items()} for n in parts}
    trainer = _trainer(world, tmp_path, max_train_steps=2, optimizer="muon", checkpoints_total_limit=1,
                       checkpointing_steps=1)  # fmt: skip
    start = {k: v.clone() for k, v in trainer.adapter.state_dict().items()}
    trainer.train()
    for name in parts:
        after = getattr(pipeline, name).state_dict()
        assert all(torch.equal(after[k], v) for k, v in before[name].items())
        assert all(p.grad is None for p in getattr(pipeline, name).parameters())
    assert any(not torch.equal(v, start[k]) for k, v in trainer.adapter.state_dict().items())
    (folder,) = (tmp_path / "checkpoints").iterdir()  # older ones pruned
    assert folder.name == "step_00000002"
    assert set(load_file(folder / "adapter.safetensors")) == set(start)


def test_the_finished_adapter_is_the_moving_average_in_both_layouts(world, tmp_path):
    trainer = _trainer(world, tmp_path, max_train_steps=3)
    folder = trainer.train()
    loaded = FaceAdapter.from_pretrained(folder)
    released = FaceAdapter.from_single_file(tmp_path / "withanyone.safetensors")
    for name, value in trainer.ema.items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0)
        torch.testing.assert_close(released.state_dict()[name], value, rtol=0, atol=0)
    assert any(not torch.equal(p, trainer.ema[n]) for n, p in trainer.adapter.named_parameters())
    onwards = _trainer(world, tmp_path / "next", init_from=str(folder))
    assert all(torch.equal(p, trainer.ema[n]) for n, p in onwards.adapter.named_parameters())


def test_the_losses_add_up_with_their_weights(world, tmp_path):
    trainer = _trainer(world, tmp_path, id_loss_weight=0.3, contrastive_loss_weight=0.7, paired_ratio=0.5)
    loss, logs = trainer.train_step(_first_batch(trainer))
    expected = logs["diffusion_loss"] + 0.3 * logs["id_loss"] + 0.7 * logs["id_contrastive_loss"]
    assert logs["id_faces"] > 0
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_a_batch_is_that_of_the_written_out_formulas(world, tmp_path):
    """An adapter that adds nothing: the loss is the base's, computed here from method section 4."""
    trainer = _trainer(world, tmp_path, id_loss_weight=0, contrastive_loss_weight=0, text_dropout=0)
    batch = _first_batch(trainer)
    loss, _ = trainer.train_step(batch)
    pipe = trainer.pipeline
    with torch.no_grad():
        x1 = pipe.vae.encode(batch.pixels.float() / 127.5 - 1).latent_dist.mean
        x1 = (x1 - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
        b, c, h, w = x1.shape
        x1 = x1.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)
        x0 = torch.stack(
            [torch.randn(x1.shape[1:], generator=torch.Generator().manual_seed(s)) for s in batch.noise_seeds]
        )
        t = flow.shift_sigmas(batch.uniform, flow.shift_mu(64, 64, "flux"))
        xt = (1 - t)[:, None, None] * x1 + t[:, None, None] * x0
        embeds, pooled, text_ids = pipe.encode_prompt(batch.prompts, None, max_sequence_length=512)
        ids = torch.stack(
            torch.meshgrid(torch.zeros(1), torch.arange(4.0), torch.arange(4.0), indexing="ij"), -1
        )
        v = pipe.transformer(
            hidden_states=xt, timestep=t, guidance=torch.ones(b), pooled_projections=pooled,
            encoder_hidden_states=embeds, txt_ids=text_ids, img_ids=ids.reshape(-1, 3), return_dict=False,
        )[0]  # fmt: skip
    assert loss.item() == pytest.approx((v - (x0 - x1)).square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_steps_on_one_batch_lower_each_of_its_losses(world, tmp_path, optimizer):
    trainer = _trainer(world, tmp_path, optimizer=optimizer, id_loss_weight=1.0, max_train_steps=100,
                       learning_rate=3e-3)  # fmt: skip
    batch = _first_batch(trainer)
    batch.uniform = torch.full((4,), 0.3)
    logs = [trainer._optimizer_step(iter([batch])) for _ in range(12)]
    for name in ("diffusion_loss", "id_loss", "id_contrastive_loss"):
        assert logs[-1][name] < logs[0][name]


def test_identity_gradients_reach_the_adapter_and_not_the_people_the_loss_does_not_see(
    world, tmp_path, monkeypatch
):
    monkeypatch.setattr(step_module, "diffusion_loss", lambda p, t: (p * 0).flatten(1).mean(1))
    trainer = _trainer(world, tmp_path, id_loss_max_sigma=0.6, contrastive_positive="target")
    _wake(trainer.adapter)
    batch = _first_batch(trainer)
    batch.uniform = torch.tensor([0.2, 0.99, 0.2, 0.99])  # above the limit: not looked at
    batch.kps[2] = float("nan")  # no landmarks: not looked at
    batch.id_scale, batch.siglip_scale = torch.full((4,), 0.5), torch.full((4,), 0.5)
    batch.embeddings.requires_grad_(True)
    trainer.train_step(batch)[0].backward()
    gradient = batch.embeddings.grad.abs().amax((1, 2))
    assert gradient[0] > 0
    assert (gradient[1:] == 0).all()
    silent = [
        n for n, p in trainer.adapter.named_parameters() if p.grad is None or not p.grad.abs().max() > 0
    ]
    # a key's norm shift is the same for all of a face's tokens only in value: every weight has a part
    assert not silent
    assert trainer.faces["without_landmarks"] == batch.face_mask[2].sum()


def test_identity_gradients_equal_finite_differences(world, tmp_path, monkeypatch):
    """Through VAE decode, warp and recogniser, for one weight of the adapter."""
    monkeypatch.setattr(step_module, "diffusion_loss", lambda p, t: (p * 0).flatten(1).mean(1))
    trainer = _trainer(world, tmp_path, id_loss_weight=1.0, contrastive_loss_weight=1.0)
    _wake(trainer.adapter)
    batch = _first_batch(trainer)
    batch.uniform = torch.full((4,), 0.5)
    weight = trainer.adapter.attentions("sig")[1].to_out.weight
    loss, _ = trainer.train_step(batch)
    (gradient,) = torch.autograd.grad(loss, weight)
    direction = gradient / gradient.norm()
    losses = []
    step = 0.002  # the recogniser is far from linear
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * step * direction)
            losses.append(trainer.train_step(batch)[0].item())
            weight.sub_(sign * step * direction)
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(gradient.norm().item(), rel=0.05)


def test_at_most_so_many_faces_are_decoded(world, tmp_path):
    trainer = _trainer(world, tmp_path, id_faces_per_step=2, id_loss_max_sigma=1.0)
    batch = _first_batch(trainer)
    assert trainer.train_step(batch)[1]["id_faces"] == 2
    sample, face = trainer.train_step.pick_faces(batch, torch.zeros(4))
    order = batch.priority.flatten().sort().values[:2]
    torch.testing.assert_close(batch.priority[sample, face], order)


def test_landmarks_of_the_estimate_are_used_only_where_found(world, tmp_path):
    trainer = _trainer(world, tmp_path, id_landmarks="estimate", id_loss_max_sigma=1.0)
    _, logs = trainer.train_step(_first_batch(trainer))
    assert logs["id_faces"] == 0 and logs["id_loss"] == 0  # a random model paints no face
    assert trainer.faces["not_found_on_estimate"] > 0
    pictures = torch.zeros(1, 3, 64, 64)
    box = (12, 10, 52, 50)
    painted = tiny_faces.paint_face(tiny_faces.blank(64, 64), box, 1)
    pictures[0] = torch.from_numpy(np.array(painted)).permute(2, 0, 1) / 127.5 - 1
    batch = _first_batch(trainer)
    batch.bboxes[0] = [box]
    zero = torch.zeros(1, dtype=torch.long)
    *_, kps = trainer.train_step.detect_on(pictures, batch, zero, zero, zero)
    np.testing.assert_allclose(kps[0], tiny_faces.kps_of(box), atol=3)


def test_negatives_are_nobody_of_the_batch(world, tmp_path):
    trainer = _trainer(world, tmp_path, paired_ratio=1.0, num_negatives=200)
    batch = _first_batch(trainer)
    rows = trainer.train_step.negatives(batch, 0)[0].cpu().numpy()
    people = np.array([[tw.embedding(i, 1000 + k) for k in range(4)] for i in range(6)])  # (6, 4, 512)
    drawn = {int(np.argwhere((people == row).all(-1))[0, 0]) for row in rows}
    present = set(batch.identities[batch.identities >= 0].tolist())
    assert drawn == set(range(6)) - present


def test_a_bank_without_anybody_else_gives_each_face_the_others(world, tmp_path):
    """A small data set: everybody is in the batch, and no face is its own negative."""
    trainer = _trainer(world, tmp_path, paired_ratio=1.0, num_negatives=300)
    batch = _first_batch(trainer)
    batch.identities = torch.tensor([[0, 1], [2, 3], [4, 5], [-1, -1]])
    batch.face_mask = batch.identities >= 0
    negatives, owners = trainer.train_step.negatives(batch, 0)
    assert set(owners.tolist()) == set(range(6))
    people = np.stack([[tw.embedding(i, 1000 + k) for k in range(4)] for i in range(6)])  # (6, 4, 512)
    for row, owner in zip(negatives.numpy(), owners.tolist(), strict=True):
        assert (people[owner] == row).all(-1).any()
    seen = []
    loss = step_module.id_contrastive_loss

    def spy(g, r, n, tau, allowed):
        seen.append(allowed)
        return loss(g, r, n, tau, allowed)

    batch = _first_batch(trainer)
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patch:
        patch.setattr(trainer.train_step, "negatives", lambda *a: (negatives, owners))
        patch.setattr(step_module, "id_contrastive_loss", spy)
        trainer.train_step(batch)
    (allowed,) = seen
    sample, face = trainer.train_step.pick_faces(
        batch, sigmas_of(trainer.config, batch.uniform, trainer.frozen.mu(64, 64))
    )
    assert torch.equal(allowed, owners[None] != batch.identities[sample, face][:, None])
    assert not allowed.all()


def test_in_batch_negatives_are_other_people_only(world, tmp_path):
    trainer = _trainer(world, tmp_path, in_batch_negatives=True)
    target = torch.randn(4, 512)
    identities, sample = torch.tensor([3, 3, -1, 5]), torch.tensor([0, 1, 1, 2])
    negatives, allowed = trainer.train_step.with_batch(torch.randn(7, 512), target, identities, sample)
    assert negatives.shape == (11, 512) and allowed[:, :7].all()
    expected = [[0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 0, 0], [1, 1, 0, 0]]
    assert allowed[:, 7:].int().tolist() == expected


def test_kept_image_features_equal_those_made_on_the_way(world, tmp_path):
    trainer = _trainer(world, tmp_path, paired_ratio=0.5, diversity_corner_share=0.0)
    batch = _first_batch(trainer)
    fresh = trainer.frozen.image_features(batch)
    encoder = trainer.pipeline.image_encoder
    bank = cache_features(
        trainer.bank,
        world[0] / "cache" / "bank",
        lambda crops: encoder(trainer.frozen.prepare_crops(crops)).last_hidden_state.detach().numpy(),
        lambda photo, box: crop_face(photo, box, trainer.source.dataset.crop_size),
    )
    try:
        kept = _trainer(world, tmp_path / "kept", paired_ratio=0.5, diversity_corner_share=0.0)
        batch = _first_batch(kept)
        assert kept.bank.features is not None and batch.features is not None
        assert len(batch.crop_pixels) < batch.face_mask.sum()
        torch.testing.assert_close(kept.frozen.image_features(batch), fresh, rtol=2e-3, atol=2e-3)
    finally:
        del bank
        (world[0] / "cache" / "bank" / "features.npy").unlink()


def test_a_branch_trains_alone(world, tmp_path):
    trainer = _trainer(world, tmp_path, branches="arc", max_train_steps=2)
    trainer.train()
    assert trainer.adapter.branches == ("arc",)
    released = FaceAdapter.from_single_file(tmp_path / "ipa.safetensors", branch="arc")
    assert released.branches == ("arc",)


def test_accumulated_batches_equal_one_large_batch(world, tmp_path):
    settings = {"id_loss_weight": 0, "contrastive_loss_weight": 0, "max_train_steps": 3}
    _trainer(world, tmp_path / "one", train_batch_size=4, **settings).train()
    _trainer(world, tmp_path / "two", train_batch_size=2, gradient_accumulation_steps=2, **settings).train()
    for a, b in zip(_log(tmp_path / "one"), _log(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_text_is_padded_to_the_first_length_that_holds_the_batch(world, tmp_path):
    trainer = _trainer(world, tmp_path, text_lengths=[6, 12])
    assert [
        trainer.frozen.encode_text(p)[0].shape[1] for p in (["a"], ["a", "abc abc"], ["abcdef abcdef"])
    ] == [
        6,
        12,
        512,
    ]
    full = trainer.frozen.encode_text(["abcdef abcdef", "a"])[0]
    torch.testing.assert_close(trainer.frozen.encode_text(["abcdef abcdef"])[0], full[:1])


def test_learning_rates_warm_up_and_follow_the_cosine():
    config = make_config(
        {"lr_scheduler": "cosine", "lr_warmup_steps": 10, "max_train_steps": 100, "lr_end_share": 0.1}
    )
    assert learning_rate_factor(config, 0) == pytest.approx(0.1, rel=1e-3)
    assert learning_rate_factor(config, 50) == pytest.approx(0.1 + 0.9 * 0.5)
    assert learning_rate_factor(config, 100) == pytest.approx(0.1)
    constant = make_config({"lr_warmup_steps": 4})
    assert [learning_rate_factor(constant, s) for s in (0, 1, 3, 9999)] == [0.25, 0.5, 1.0, 1.0]


def test_noise_levels_follow_the_shifted_schedule():
    uniform = torch.linspace(0.01, 0.99, 99)
    torch.testing.assert_close(sigmas_of(make_config({}), uniform, 0.0), uniform)
    odds = uniform / (1 - uniform) * math.exp(1.15)
    torch.testing.assert_close(sigmas_of(make_config({}), uniform, 1.15), odds / (1 + odds))
    normal = make_config({"sigma_sampling": "logit_normal", "sigma_logit_mean": 0.3})
    sigmas = sigmas_of(normal, uniform, 0.0)
    assert sigmas[49].item() == pytest.approx(1 / (1 + math.exp(-0.3)), abs=1e-4)
    assert sigmas[83].item() == pytest.approx(1 / (1 + math.exp(-0.3 - 0.9945)), abs=1e-3)


def _write_case(folder):
    folder.mkdir(parents=True)
    box = [10, 10, 50, 50]
    painted = tiny_faces.paint_face(tiny_faces.blank(64, 64), box, 1)
    painted.save(folder / "ori.jpg", quality=95)
    painted.save(folder / "ref_1.jpg", quality=95)
    (folder / "meta.json").write_text(json.dumps({"prompt": "a", "bboxes": [box]}))
    return painted, tuple(box)


def test_validation_makes_pictures_and_scores_a_missing_face_as_zero(world, tmp_path):
    painted, box = _write_case(tmp_path / "cases" / "0")
    trainer = _trainer(
        world,
        tmp_path / "out",
        max_train_steps=1,
        validation_steps=1,
        validation_cases=str(tmp_path / "cases"),
    )
    trainer.pipeline.register_to_config(
        sampling_defaults={**trainer.pipeline.config.sampling_defaults, "num_inference_steps": 1}
    )
    trainer.train()
    (row,) = [json.loads(line) for line in (tmp_path / "out" / "validation.jsonl").read_text().splitlines()]
    assert row == {"step": 1, "found": 0.0, "sim_gt": 0.0, "sim_ref": 0.0}
    assert Image.open(tmp_path / "out" / "samples" / "step_00000001.png").width == 3 * 160
    from train.validation import read_cases

    (case,) = read_cases(tmp_path / "cases", 8)
    (scores,) = score_case(trainer.pipeline, case, painted)
    assert scores["found"] == 1 and scores["sim_gt"] > 0.8 and scores["sim_ref"] > 0.8  # saved as JPEG
    assert face_in_box(trainer.pipeline.face_analyzer.detect(painted), (0, 0, 8, 8)) is None
    with pytest.raises(ValueError, match="`validation_cases`"):
        validate(trainer.pipeline, str(tmp_path / "nowhere"), 1, tmp_path / "x.png")
