"""The miniature's FLUX: data, packing, schedule and guidance as FluxPipeline's, exact resume, the build."""

import os
import signal
from functools import partial

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from withanyone import WithAnyonePipeline
from withanyone.mini import PRETRAINED, base, build, given, pictures, world
from withanyone.mini.latents import PatchAutoencoder
from withanyone.mini.loop import TrainingLoop
from withanyone.mini.pictures import GROUP, PAIR, PORTRAIT, WIDE

SHARD_SIZE = 4


@pytest.fixture(scope="module")
def models():
    return base.TextModels.from_pretrained(PRETRAINED)


@pytest.fixture(scope="module")
def vae():
    return PatchAutoencoder.from_pretrained(PRETRAINED / "vae", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def data(picture_shards, vae, models, tmp_path_factory):
    return base.LatentPictures(picture_shards, tmp_path_factory.mktemp("cache"), "train", vae, models)


def make_trainer(data, models):
    return base.Trainer(data, models, seed=0, tokens_per_step=128)


# Pictures


def test_shards_hold_the_same_again(picture_shards, tmp_path):
    again = pictures.render_shard(tmp_path, 1, size=4)
    arrays, captions = pictures.read_shard(again)
    before, captions_before = pictures.read_shard(picture_shards / again.name)
    assert captions == captions_before
    assert arrays.keys() == before.keys()
    for name, array in arrays.items():
        assert np.array_equal(array, before[name]), name


def test_shards_tell_what_they_show(picture_shards):
    shard, captions = pictures.read_shard(pictures.shard_paths(picture_shards)[1])
    assert shard["pixels"].shape == (4, PAIR.height, PAIR.width, 3)
    assert [len(several) for several in captions] == [pictures.CAPTIONS_PER_PICTURE] * 4
    for identities, bboxes in zip(shard["identities"], shard["bboxes"], strict=True):
        there = bboxes[identities >= 0]
        assert all(world.split_of(int(identity)) == "train" for identity in identities[identities >= 0])
        assert (there[:, 2:] > there[:, :2]).all()
        assert (np.diff(there[:, 0]) > 0).all()  # left to right


def test_mirrored_captions_swap_sides_and_order():
    values = world.PERSON_ATTRIBUTES
    row = [options.index("left") if name == "pose" else 0 for name, options in values.items()]
    other = [options.index("right") if name == "pose" else 1 for name, options in values.items()]
    shard = {"attributes": np.array([[row, other]]), "setting": np.zeros((1, 2), int)}
    swapped = {"attributes": np.array([[other[:-1] + [values["pose"].index("left")],
                                        row[:-1] + [values["pose"].index("right")]]]),
               "setting": np.zeros((1, 2), int)}  # fmt: skip
    mirrored = pictures.captions_from_attributes(shard, 3, np.random.default_rng(0), mirrored=True)
    assert mirrored == pictures.captions_from_attributes(swapped, 3, np.random.default_rng(0))


def test_moved_boxes_stay_inside():
    rng = np.random.default_rng(0)
    for bucket in base.SHARES:
        for count in (1, 2, 3, 4):
            boxes = pictures.moved_boxes(count, bucket, rng)
            assert (boxes >= 0).all()
            assert (boxes[:, 2:] <= (bucket.width, bucket.height)).all()
            assert (boxes[:, 2:] > boxes[:, :2]).all()


# Data


def test_cached_tokens_are_the_pictures_and_their_mirror_images(data, picture_shards, vae):
    shard, _ = pictures.read_shard(pictures.shard_paths(picture_shards)[0], "pixels")
    tokens = data.pools[PORTRAIT]["tokens"].float()
    assert tokens.shape == (8, 64, 96)
    z = base.FluxPipeline._unpack_latents(tokens[[0, 4]], 128, 128, 8)
    with torch.no_grad():
        decoded = vae.decoder(z)
    assert float((decoded[0] - decoded[1].flip(-1)).abs().mean()) < 0.03
    original = torch.from_numpy(shard["pixels"][0]).permute(2, 0, 1) / 127.5 - 1
    assert float((decoded[0] - original).abs().mean()) < 0.05


def test_face_share_is_the_part_of_a_token_under_a_face():
    # 24 x 20 pixels from (8, 16): half of column 0, all of column 1; all of row 1, a quarter of row 2.
    bboxes = np.array([[[8, 16, 32, 36], [0, 0, 0, 0]], [[0, 0, 0, 0], [0, 0, 0, 0]]], np.float32)
    expected = torch.zeros(8, 8)
    expected[1:3, :2] = torch.tensor([1, 0.25])[:, None] * torch.tensor([0.5, 1])
    share = base.face_share(bboxes, PORTRAIT)
    assert torch.equal(share[0].float().reshape(8, 8), expected)
    assert torch.equal(share[1], torch.zeros(64, dtype=torch.float16))
    mirrored = base.face_share(bboxes, PORTRAIT, mirrored=True)[0].float().reshape(8, 8)
    assert torch.equal(mirrored, expected.flip(1))


def test_a_faces_tokens_count_more(data, models):
    values, weights = torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 7.0]])
    assert float(base.weighted_mean(values, weights)) == pytest.approx(22 / 8)
    losses = [
        base.Trainer(data, models, seed=0, tokens_per_step=128, face_weight=weight).step(0, 0.0, 0.9)
        for weight in (1.0, 8.0)
    ]
    assert losses[0] != losses[1]


def test_refresh_takes_in_new_shards_once(picture_shards, vae, models, tmp_path):
    few = base.LatentPictures(picture_shards, tmp_path, "train", vae, models)
    assert few.count(PORTRAIT) == 8
    few.refresh()
    assert few.count(PORTRAIT) == 8
    assert few.count(PAIR) == 8
    assert few.count(GROUP) == 0


def test_a_run_beside_its_renderers_takes_what_they_encoded(
    picture_shards, vae, models, tmp_path, monkeypatch
):
    """`waits`: a shard counts once its tokens and faces are there, and pools grow without losing rows."""
    faces = given.FaceModels.from_pretrained(PRETRAINED)
    first, second = pictures.shard_paths(picture_shards)[:2]
    base.encode_shard(first, tmp_path, vae, models, mirror=True)
    data = base.LatentPictures(picture_shards, tmp_path, "train", vae, models, faces, waits=True)
    assert not data.pools
    monkeypatch.setattr(base.time, "sleep", lambda seconds: given.encode_faces(first, tmp_path, faces))
    data.wait()
    assert data.count(PORTRAIT) == 8 and data.count(PAIR) == 0
    base.encode_shard(second, tmp_path, vae, models, mirror=True)
    given.encode_faces(second, tmp_path, faces)
    data.refresh()
    assert data.count(PORTRAIT) == 8 and data.count(PAIR) == 8


def test_joined_shards_keep_plain_and_mirrored_rows_apart():
    def shard(mark: int, rows: int, people: int) -> dict[str, torch.Tensor]:
        tokens = torch.cat([torch.full((rows, 2), mark), torch.full((rows, 2), -mark)])  # then mirrored
        return {
            "tokens": tokens,
            "plain": torch.arange(rows),
            "kps": torch.full((rows, people, 5, 2), mark),
            "face_mask": torch.full((rows, 4, people), True),
            "count": torch.full((rows,), people),
        }

    pool = base.joined([base.joined([shard(1, 2, 1), shard(2, 3, 3)]), shard(3, 1, 2)])
    assert pool["tokens"][:, 0].tolist() == [1, 1, 2, 2, 2, 3, -1, -1, -2, -2, -2, -3]
    assert len(pool["plain"]) == 6 and pool["count"].tolist() == [1, 1, 3, 3, 3, 2]
    assert pool["kps"].shape == (6, 3, 5, 2) and pool["face_mask"].shape == (6, 4, 3)
    assert pool["kps"][0, :, 0, 0].tolist() == [1, 0, 0] and pool["kps"][5, :, 0, 0].tolist() == [3, 3, 0]
    assert pool["face_mask"][0, 0].tolist() == [True, False, False]


def test_a_timed_run_warms_up_stays_falls_and_ends():
    now = [0.0]
    rate = base.timed_rate(1.0, 100.0, clock=lambda: now[0])
    assert rate(0) == pytest.approx(0.01) and rate(200) == 1.0
    now[0] = 100 * base.FLAT_SHARE
    assert rate(200) == pytest.approx(1.0)
    now[0] = 80.0
    assert rate(200) == pytest.approx(0.2 / (1 - base.FLAT_SHARE))
    now[0] = 100.0
    assert rate(200) == -1.0


def test_a_timed_run_ends_with_a_checkpoint(data, models, tmp_path):
    trainer = make_trainer(data, models)
    loop = trainer.loop(tmp_path, base.OPEN_END, "x")
    base.run_loop(trainer, loop, lambda step: 1e-3 if step < 2 else -1.0, 0, lambda step: None)
    assert make_trainer(data, models).loop(tmp_path, base.OPEN_END, "x").step == 2


# Agreement with FluxPipeline


def test_mu_is_what_fluxpipeline_computes():
    config = base.scheduler().config
    for bucket in base.SHARES:
        expected = calculate_shift(
            bucket.num_tokens,
            config.base_image_seq_len,
            config.max_image_seq_len,
            config.base_shift,
            config.max_shift,
        )
        assert base.scheduler_mu(bucket.num_tokens) == pytest.approx(expected)


def test_sampling_is_the_pipelines(models, vae):
    torch.manual_seed(0)
    transformer = base.FluxTransformer2DModel(**base.transformer_config()).eval()
    pipe = WithAnyonePipeline(
        scheduler=base.scheduler(), vae=vae, text_encoder=models.clip, tokenizer=models.tokenizer,
        text_encoder_2=models.t5, tokenizer_2=models.tokenizer, transformer=transformer,
        timestep_shift="flux",
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    prompt = "two people at the beach: from left to right a sad person; a bald person"
    theirs = pipe(
        prompt, height=WIDE.height, width=WIDE.width, num_inference_steps=4, true_cfg_scale=2.0,
        generator=torch.Generator().manual_seed(0), output_type="np",
    ).images[0]  # fmt: skip
    ours = base.sample(transformer, vae, models, [prompt], WIDE, steps=4, guidance=2.0, seed=0)[0] / 255
    assert np.abs(ours - theirs).mean() < 0.01  # ours runs in bf16
    assert theirs.std() > 0.05


# Training


def test_steps_are_exact_after_a_stop(data, models, tmp_path, monkeypatch):
    def run(folder, stop_after=None):
        monkeypatch.setattr(base, "TrainingLoop", partial(TrainingLoop, save_seconds=0.0))
        trainer = make_trainer(data, models)
        loop = trainer.loop(folder, 3, "base")

        def every(step):
            if step == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)

        base.run_loop(trainer, loop, lambda step: 1e-3, 0, every)
        return torch.cat(
            [p.detach().flatten() for p in [*trainer.model.parameters(), *trainer.average.parameters()]]
        )

    through = run(tmp_path / "a")
    with pytest.raises(SystemExit, match="the same command goes on"):
        run(tmp_path / "b", stop_after=2)
    assert torch.equal(run(tmp_path / "b"), through)


def test_every_parameter_has_exactly_one_optimizer(data, models):
    trainer = make_trainer(data, models)
    held = [id(p) for group in trainer.optimizers.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in trainer.model.parameters())
    assert all(p.ndim == 2 for p in trainer.optimizers.parts[0].param_groups[0]["params"])


def test_trunk_can_be_continued_to_more_steps(data, models, tmp_path):
    for steps in (1, 2):
        trainer = make_trainer(data, models)
        base.run_loop(trainer, trainer.loop(tmp_path, steps, "base"), lambda step: 1e-3, 0, lambda step: None)
    assert trainer.loop(tmp_path, 2, "base").step == 2


def test_average_is_a_moving_average():
    average, model = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = 0.9 * average.weight + 0.1 * model.weight
    base.update_average(average, model, 0.9)
    assert torch.allclose(average.weight, expected)


def test_larger_pictures_get_more_noise():
    generator = torch.Generator().manual_seed(0)
    means = [
        float(base.training_sigmas(4000, bucket, generator).mean()) for bucket in (PORTRAIT, PAIR, GROUP)
    ]
    assert means == sorted(means)
    assert 0.5 < means[0] < means[-1] < 0.8


def test_steps_have_about_equal_tokens():
    for bucket in base.SHARES:
        assert 1700 <= base.batch_size_of(bucket, 2048) * bucket.num_tokens <= 2048


# The build


def test_build_goes_on_where_it_failed(tmp_path, monkeypatch):
    made = tmp_path / "made"
    script = "import sys; open(sys.argv[1], 'a').write(sys.argv[2]); sys.exit(int(sys.argv[3]))"
    module = tmp_path / "stage_of_a_test.py"
    module.write_text(script)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def stages(status):
        return [
            build.Stage("one", "stage_of_a_test", (str(made), "1", "0"), 1),
            build.Stage("two", "stage_of_a_test", (str(made), "2", status), 1),
            build.Stage("three", "stage_of_a_test", (str(made), "3", "0"), 1),
        ]

    with pytest.raises(RuntimeError, match="two ended with status 7"):
        build.build(tmp_path / "record.txt", stages("7"))
    build.build(tmp_path / "record.txt", stages("0"))
    assert made.read_text() == "1223"


def test_folder_without_a_part_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`folder` .* has no scheduler"):
        build.assemble(tmp_path)


def test_stages_are_commands_that_exist():
    from withanyone.mini.__main__ import MODULES

    assert all(stage.arguments[0] in MODULES for stage in build.STAGES if stage.module == build.MINI)
