"""WithAnyonePipeline's call: what faces do, what None means, and what is refused."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from PIL import Image

from tests import tiny, tiny_faces
from withanyone import FaceAnalyzer, flow, layout, slider_scales
from withanyone.pipeline import RELEASED_SAMPLING, combine_photos

BOXES = [(4, 8, 30, 40), (34, 6, 60, 44)]


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


@pytest.fixture(scope="module")
def analyzer(tmp_path_factory):
    return FaceAnalyzer.from_pretrained(tiny_faces.write_pack(tmp_path_factory.mktemp("pack")))


@pytest.fixture(scope="module")
def photo_pipe(analyzer):
    return tiny.pipeline(face_analyzer=analyzer)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(pipe, **kwargs) -> np.ndarray:
    """Latents of a call from seed 0 (B, N, 16)."""
    kwargs = {"prompt": "two people", "output_type": "latent", "generator": seeded(), **kwargs}
    return pipe(**kwargs).images.numpy()


def flux_run(pipe, sigmas=None, **kwargs) -> np.ndarray:
    """The same by FluxPipeline's own call on the same components."""
    flux = FluxPipeline.from_pipe(pipe)
    flux.set_progress_bar_config(disable=True)
    kwargs = {"num_inference_steps": 2, "guidance_scale": 4.0, "height": 64, "width": 64, **kwargs}
    kwargs = {"prompt": "two people", "output_type": "latent", "generator": seeded(), **kwargs}
    return flux(sigmas=sigmas, **kwargs).images.numpy()


def released_sigmas(num_inference_steps: int = 2, size: int = 64) -> list[float]:
    """What FluxPipeline has to be given to follow the released schedule, from the two formulas for mu."""

    def line(num_tokens):
        return 0.5 + (1.15 - 0.5) / (4096 - 256) * (num_tokens - 256)

    factor = np.exp(line((size / 8) ** 2 / 256) - line((size / 16) ** 2))
    even = np.linspace(1, 1 / num_inference_steps, num_inference_steps)[1:]
    return [1.0] + [float(odds * factor / (1 + odds * factor)) for odds in even / (1 - even)]


def photo_of(identity: int, box=(20, 16, 90, 104), size: int = 128) -> Image.Image:
    return tiny_faces.paint_face(tiny_faces.blank(size, size), box, identity)


# What a call is


def test_without_faces_or_scales_it_is_flux_bit_for_bit(pipe):
    expected = flux_run(pipe, sigmas=released_sigmas())
    assert np.array_equal(run(pipe), expected)
    faces = [tiny.face(1), tiny.face(2)]
    assert np.array_equal(run(pipe, faces=faces, id_scale=0.0, siglip_scale=0.0), expected)
    assert not np.allclose(run(pipe, faces=faces), expected, atol=1e-2)


@pytest.mark.parametrize("scales", [(0.0, 1.0), (1.0, 0.0), (0.3, 0.6)])
def test_faces_are_what_the_adapter_encodes(pipe, scales):
    """The call equals FluxPipeline given the adapter's conditioning by hand, from a Face's numbers."""
    faces = [tiny.face(1), tiny.face(2)]
    embeddings = torch.from_numpy(np.stack([face.embedding for face in faces]))[None]
    pixels = [np.asarray(face.face_crop.resize((32, 32), Image.Resampling.BICUBIC)) for face in faces]
    pixels = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    features = pipe.image_encoder(pixels).last_hidden_state[None]
    conditioning = pipe.face_adapter.encode(
        embeddings, features, [BOXES], 64, 64, id_scale=scales[0], siglip_scale=scales[1]
    )
    expected = flux_run(
        pipe, sigmas=released_sigmas(), joint_attention_kwargs={"ip_hidden_states": conditioning}
    )
    latents = run(pipe, faces=faces, bboxes=BOXES, id_scale=scales[0], siglip_scale=scales[1])
    # SigLIP's processor rounds its resized pixels elsewhere than Pillow does.
    assert np.abs(latents - expected).max() < (1e-6 if scales[1] == 0 else 2e-3)


def test_default_scales_are_the_released_demos(pipe):
    faces = [tiny.face(1), tiny.face(2)]
    assert np.array_equal(run(pipe, faces=faces), run(pipe, faces=faces, id_scale=0.0, siglip_scale=1.0))


def test_people_and_boxes_may_be_swapped_together(pipe):
    a, b = tiny.face(1), tiny.face(2)
    one = run(pipe, faces=[a, b], bboxes=BOXES)
    other = run(pipe, faces=[b, a], bboxes=BOXES[::-1])
    assert np.abs(one - other).max() < 1e-5
    assert np.abs(one - run(pipe, faces=[b, a], bboxes=BOXES)).max() > 1e-2


def test_default_boxes_are_the_layouts_and_are_told(pipe):
    faces = [tiny.face(1), tiny.face(2)]
    out = pipe("two people", faces, height=64, width=96, generator=seeded(), output_type="latent")
    assert out.bboxes == layout.default_bboxes(2, 64, 96)
    given = pipe(
        "two people", faces, out.bboxes, height=64, width=96, generator=seeded(), output_type="latent"
    )
    assert torch.equal(out.images, given.images)
    assert pipe("nobody", generator=seeded(), output_type="latent").bboxes is None


def test_boxes_may_be_floats_arrays_and_tensors(pipe):
    faces, boxes = [tiny.face(1), tiny.face(2)], [[4.5, 8.25, 30, 40], [34, 6, 60, 43.5]]
    expected = run(pipe, faces=faces, bboxes=boxes)
    assert np.array_equal(run(pipe, faces=faces, bboxes=np.array(boxes)), expected)
    assert np.array_equal(run(pipe, faces=faces, bboxes=torch.tensor(boxes)), expected)


@pytest.mark.parametrize("num_people", [1, 3, 8])
def test_one_to_eight_people(pipe, num_people):
    faces = [tiny.face(seed) for seed in range(num_people)]
    out = pipe("people", faces, generator=seeded(), output_type="np")
    assert out.images.shape == (1, 64, 64, 3) and np.isfinite(out.images).all()
    assert len(out.bboxes) == num_people


# Photos


def test_photos_of_all_kinds_are_one_face(photo_pipe, tmp_path):
    photo = photo_of(3)
    photo.save(tmp_path / "photo.png")
    expected = run(photo_pipe, faces=[photo])
    face = photo_pipe.face_analyzer.detect(photo)[0]
    kinds = [np.asarray(photo), tmp_path / "photo.png", str(tmp_path / "photo.png"), face, [photo]]
    kinds.append((tmp_path / "photo.png").read_bytes())
    for kind in kinds:
        assert np.array_equal(run(photo_pipe, faces=[kind]), expected), type(kind)
    assert not np.array_equal(run(photo_pipe, faces=[photo_of(4)]), expected)


def test_of_several_faces_the_largest_is_taken_and_logged(photo_pipe, caplog):
    photo = tiny_faces.paint_face(photo_of(3, size=256), (150, 150, 190, 200), 4)
    with caplog.at_level(logging.WARNING):
        (face,) = photo_pipe.find_faces([photo])[0]
    assert "`faces[0]`" in caplog.text and "2 faces" in caplog.text
    (alone,) = photo_pipe.find_faces([photo_of(3, size=256)])[0]
    assert face.normed_embedding @ alone.normed_embedding > 0.99


def test_faces_are_found_without_an_adapter_too(analyzer):
    pipe = tiny.pipeline(face_analyzer=analyzer, face_adapter=None)
    assert [len(photos) for photos in pipe.find_faces([photo_of(3), [photo_of(3), tiny.face(1)]])] == [1, 2]


def test_several_photos_of_one_person(photo_pipe):
    a, b = photo_of(3), photo_of(3, (30, 20, 106, 116))
    expected = run(photo_pipe, faces=[a])
    assert np.abs(run(photo_pipe, faces=[[a, a]]) - expected).max() < 1e-5
    both = run(photo_pipe, faces=[[a, b]], id_scale=1.0, siglip_scale=0.0)
    assert np.abs(both - run(photo_pipe, faces=[[b, a]], id_scale=1.0, siglip_scale=0.0)).max() < 1e-5
    assert not np.array_equal(both, run(photo_pipe, faces=[a], id_scale=1.0, siglip_scale=0.0))


def test_several_photos_make_one_input(pipe):
    faces = [tiny.face(1), tiny.face(2), tiny.face(3)]
    embeddings, features = pipe.encode_faces([faces, faces[0]])
    combined, typical = combine_photos(np.stack([face.embedding for face in faces]))
    assert embeddings.shape == (1, 2, tiny.EMBEDDING_DIM)
    assert features.shape == (1, 2, tiny.IMAGE_TOKENS, tiny.IMAGE_FEATURE_DIM)
    assert np.array_equal(embeddings[0, 0], combined)
    assert np.array_equal(embeddings[0, 1], faces[0].embedding)
    _, of_typical = pipe.encode_faces([faces[typical]])
    assert torch.allclose(features[0, 0], of_typical[0, 0], atol=1e-6)


def test_combined_embedding_keeps_direction_and_norm():
    rng = np.random.default_rng(0)
    person = rng.standard_normal(512)
    photos = (person + 0.5 * rng.standard_normal((5, 512))).astype(np.float32)
    photos *= np.array([1, 1, 1, 1, 10], np.float32)[:, None]
    combined, typical = combine_photos(photos)

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    assert combined.dtype == np.float32
    assert np.isclose(np.linalg.norm(combined), np.linalg.norm(photos, axis=1).mean(), rtol=1e-5)
    # Nearer to the person than any photo; the sharp photo (ten times the norm) has one vote like the others.
    assert cosine(combined, person) > max(cosine(photo, person) for photo in photos)
    assert np.allclose(
        combined / np.linalg.norm(combined), combine_photos(photos[::-1])[0] / np.linalg.norm(combined)
    )
    assert typical == max(range(5), key=lambda p: cosine(photos[p], combined))
    assert np.ptp([cosine(photo, combined) for photo in photos]) < 0.1


def test_one_photo_is_taken_as_it_is():
    embedding = tiny.embedding(1)
    combined, typical = combine_photos(embedding[None])
    assert np.array_equal(combined, embedding) and typical == 0


# What None means


def test_released_defaults(pipe):
    bare = tiny.pipeline(sampling_defaults=None)
    assert dict(bare.config.sampling_defaults) == RELEASED_SAMPLING
    assert bare.config.timestep_shift == "released"
    assert RELEASED_SAMPLING["num_inference_steps"] == 25 and RELEASED_SAMPLING["guidance_scale"] == 4.0
    # Without a size in the defaults it is FluxPipeline's own.
    bare.default_sample_size = 6
    assert bare("a", num_inference_steps=1, output_type="np").images.shape == (1, 48, 48, 3)


def test_defaults_fill_in_and_arguments_win():
    defaults = {"height": 48, "width": 64, "num_inference_steps": 3, "guidance_scale": 2.0}
    defaults |= {"id_scale": 0.5, "siglip_scale": 0.25, "true_cfg_scale": 2.0, "faces_in_negative": False}
    pipe, plain = tiny.pipeline(sampling_defaults=defaults), tiny.pipeline(sampling_defaults=None)
    faces = [tiny.face(1)]
    assert np.array_equal(run(pipe, faces=faces), run(plain, faces=faces, **defaults))
    other = {"height": 64, "num_inference_steps": 1, "id_scale": 0.0, "true_cfg_scale": 1.0}
    assert np.array_equal(run(pipe, faces=faces, **other), run(plain, faces=faces, **{**defaults, **other}))


def test_text_is_as_long_as_the_tokenizer_says(pipe, monkeypatch):
    monkeypatch.setattr(pipe.tokenizer_2, "model_max_length", 24)
    lengths = []
    monkeypatch.setattr(
        type(pipe),
        "encode_prompt",
        lambda self, **kwargs: (
            lengths.append(kwargs["max_sequence_length"]) or FluxPipeline.encode_prompt(self, **kwargs)
        ),
    )
    run(pipe, num_inference_steps=1)
    run(pipe, num_inference_steps=1, max_sequence_length=7)
    assert lengths == [24, 7]


# The schedule


@pytest.mark.parametrize("size", [(64, 64), (64, 128)])
@pytest.mark.parametrize("shift", flow.TIMESTEP_SHIFTS)
def test_schedule_is_the_one_of_timestep_shift(shift, size):
    pipe = tiny.pipeline(timestep_shift=shift)
    pipe("a", height=size[0], width=size[1], num_inference_steps=5, output_type="latent")
    expected = flow.schedule_sigmas(5, flow.shift_mu(*size, shift))
    assert np.allclose(pipe.scheduler.sigmas[:-1], expected, atol=1e-6)
    pipe(
        "a",
        height=size[0],
        width=size[1],
        sigmas=[1.0, 0.6, 0.2],
        num_inference_steps=3,
        output_type="latent",
    )
    mu = flow.shift_mu(*size, shift)
    assert np.allclose(
        pipe.scheduler.sigmas[:-1], flow.shift_sigmas(torch.tensor([1.0, 0.6, 0.2]), mu), atol=1e-6
    )


def test_schedule_at_1024_px_is_flatter_than_flux():
    """mu 0.47 in place of 1.15, as the released sampler has it."""
    pipe = tiny.pipeline()
    pipe.scheduler.set_timesteps(sigmas=pipe._sigmas(None, 25, 1024, 1024), mu=1.15)
    sigmas = pipe.scheduler.sigmas.numpy()[1:-1]
    mu = np.log(sigmas / (1 - sigmas)) - np.log(
        np.linspace(1, 1 / 25, 25)[1:] / (1 - np.linspace(1, 1 / 25, 25)[1:])
    )
    assert np.allclose(mu, 0.4675, atol=1e-3)


def test_a_scheduler_that_does_not_shift_by_size_is_left_alone():
    schnell = FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)
    pipe = tiny.pipeline(scheduler=schnell, guidance_embeds=False)
    run(pipe, faces=[tiny.face(1)], num_inference_steps=4)
    assert np.allclose(pipe.scheduler.sigmas, [1, 0.75, 0.5, 0.25, 0], atol=1e-6)


# True guidance


def test_true_guidance_takes_an_empty_negative_prompt(pipe):
    faces = [tiny.face(1)]
    guided = run(pipe, faces=faces, true_cfg_scale=3.0)
    assert np.array_equal(guided, run(pipe, faces=faces, true_cfg_scale=3.0, negative_prompt=""))
    assert not np.allclose(
        guided, run(pipe, faces=faces, true_cfg_scale=3.0, negative_prompt="abc"), atol=1e-4
    )
    assert not np.allclose(guided, run(pipe, faces=faces), atol=1e-3)


def velocity_of(pipe, latents, sigma, prompt, conditioning):
    """What the transformer alone makes of `latents` (1, 16, 16) at `sigma`."""
    embeds, pooled, text_ids = pipe.encode_prompt(prompt, max_sequence_length=512)
    return pipe.transformer(
        hidden_states=latents,
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        timestep=torch.full((1,), sigma),
        guidance=torch.full((1,), 4.0),
        img_ids=pipe._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32),
        txt_ids=text_ids,
        joint_attention_kwargs={"ip_hidden_states": conditioning},
    ).sample


@pytest.mark.parametrize("faces_in_negative", [True, False])
def test_guidance_acts_down_to_its_least_sigma(pipe, faces_in_negative):
    """Three steps, guidance in the first: that one is the guided run's, the others have one pass each."""
    faces = [tiny.face(1), tiny.face(2)]
    passes, steps = [], []
    handle = pipe.transformer.x_embedder.register_forward_pre_hook(lambda *_: passes.append(None))

    def record(pipe, step, timestep, tensors):
        steps.append(tensors["latents"].clone())
        return {}

    def make(**settings):
        passes.clear(), steps.clear()
        settings |= {"faces": faces, "bboxes": BOXES, "faces_in_negative": faces_in_negative}
        run(pipe, num_inference_steps=3, callback_on_step_end=record, **settings)
        return len(passes), list(steps), pipe.scheduler.sigmas.tolist()

    try:
        count, guided, sigmas = make(true_cfg_scale=3.0)
        assert count == 6
        between = (sigmas[0] + sigmas[1]) / 2
        count, partly, _ = make(true_cfg_scale=3.0, true_cfg_min_sigma=between)
        assert count == 4
    finally:
        handle.remove()
    assert torch.equal(partly[0], guided[0]) and not torch.allclose(partly[1], guided[1], atol=1e-4)
    conditioning = pipe.face_adapter.encode(*pipe.encode_faces(faces), [BOXES], 64, 64)
    for step in (1, 2):
        velocity = velocity_of(pipe, partly[step - 1], sigmas[step], "two people", conditioning)
        expected = partly[step - 1] + (sigmas[step + 1] - sigmas[step]) * velocity
        assert (partly[step] - expected).abs().max() < 1e-5
    # Nothing stays behind.
    assert np.array_equal(run(pipe), flux_run(pipe, sigmas=released_sigmas()))


@pytest.mark.parametrize("faces_in_negative", [True, False])
def test_faces_act_in_the_passes_they_should(pipe, faces_in_negative):
    """One step by hand: noise + (sigma_end - sigma) * (v_neg + s * (v_pos - v_neg)), sigma from 1 to 0."""
    faces, scale = [tiny.face(1), tiny.face(2)], 3.0
    noise = torch.randn(1, 16, 16, generator=seeded(4))
    latents = run(
        pipe,
        faces=faces,
        bboxes=BOXES,
        latents=noise,
        num_inference_steps=1,
        true_cfg_scale=scale,
        faces_in_negative=faces_in_negative,
        negative_prompt="xyz",
    )
    conditioning = pipe.face_adapter.encode(*pipe.encode_faces(faces), [BOXES], 64, 64)
    positive = velocity_of(pipe, noise, 1.0, "two people", conditioning)
    negative = velocity_of(pipe, noise, 1.0, "xyz", conditioning if faces_in_negative else None)
    expected = noise - (negative + scale * (positive - negative))
    assert np.abs(latents - expected.numpy()).max() < 1e-5
    # Nothing stays behind.
    assert np.array_equal(run(pipe), flux_run(pipe, sigmas=released_sigmas()))


def test_what_has_no_effect_is_said(pipe, caplog):
    with caplog.at_level(logging.WARNING):
        run(pipe, num_inference_steps=1, guidance_scale=2.0, negative_prompt="", true_cfg_scale=2.0)
    assert "no effect" not in caplog.text
    with caplog.at_level(logging.WARNING):
        run(pipe, num_inference_steps=1, negative_prompt="abc")
    assert "`negative_prompt` has no effect unless `true_cfg_scale`" in caplog.text
    with caplog.at_level(logging.WARNING):
        run(tiny.pipeline(guidance_embeds=False), num_inference_steps=1, guidance_scale=2.0)
    assert "`guidance_scale` has no effect" in caplog.text


# Batches and the rest of FluxPipeline


def test_a_batch_is_its_pictures(pipe):
    faces, prompts = [tiny.face(1), tiny.face(2)], ["one", "two"]
    kwargs = {"faces": faces, "bboxes": BOXES, "true_cfg_scale": 2.0}
    generators = [seeded(seed) for seed in range(4)]
    batch = run(pipe, prompt=prompts, num_images_per_prompt=2, generator=generators, **kwargs)
    assert batch.shape == (4, 16, 16)
    for row in range(4):
        alone = run(pipe, prompt=prompts[row // 2], generator=seeded(row), **kwargs)
        assert np.abs(batch[row] - alone[0]).max() < 1e-4


@pytest.mark.parametrize("negative", ["xyz", ["xyz"], ["xyz", "xyz"]])
def test_negative_prompts_for_one_and_for_several(pipe, negative):
    prompts = ["one", "two"] if len(negative) == 2 else ["one"]
    kwargs = {"faces": [tiny.face(1)], "true_cfg_scale": 2.0}
    generators = [seeded(seed) for seed in range(len(prompts))]
    batch = run(pipe, prompt=prompts, negative_prompt=negative, generator=generators, **kwargs)
    for row, prompt in enumerate(prompts):
        alone = run(pipe, prompt=prompt, negative_prompt="xyz", generator=seeded(row), **kwargs)
        assert np.abs(batch[row] - alone[0]).max() < 1e-4


def test_prompt_embeds_in_place_of_a_prompt(pipe):
    embeds, pooled, _ = pipe.encode_prompt("two people", max_sequence_length=512)
    faces = [tiny.face(1)]
    for scale in (1.0, 2.0):
        expected = run(pipe, faces=faces, true_cfg_scale=scale)
        given = run(
            pipe,
            prompt=None,
            prompt_embeds=embeds,
            pooled_prompt_embeds=pooled,
            faces=faces,
            true_cfg_scale=scale,
        )
        assert np.abs(expected - given).max() < 1e-6


def test_output_types(pipe):
    kwargs = {"prompt": "a", "faces": [tiny.face(1)], "height": 48, "width": 64}
    assert pipe(**kwargs, generator=seeded()).images[0].size == (64, 48)
    array = pipe(**kwargs, generator=seeded(), output_type="np").images
    tensor = pipe(**kwargs, generator=seeded(), output_type="pt").images
    assert array.shape == (1, 48, 64, 3) and tensor.shape == (1, 3, 48, 64)
    assert np.allclose(array, tensor.permute(0, 2, 3, 1).numpy())
    (images,) = pipe(**kwargs, generator=seeded(), output_type="np", return_dict=False)
    assert np.array_equal(images, array)


def test_callbacks_see_every_step_and_may_interrupt(pipe):
    steps = []

    def callback(pipeline, step, timestep, tensors):
        steps.append((step, tensors["latents"].clone()))
        pipeline._interrupt = step == 1
        return tensors

    faces = [tiny.face(1)]
    stopped = run(pipe, faces=faces, num_inference_steps=4, callback_on_step_end=callback)
    assert [step for step, _ in steps] == [0, 1]
    assert np.array_equal(stopped, steps[-1][1])
    assert not np.array_equal(stopped, run(pipe, faces=faces, num_inference_steps=4))


def test_other_attention_arguments_pass_through(pipe):
    mine = {"scale": 1.0}
    expected = run(pipe, faces=[tiny.face(1)])
    assert np.array_equal(run(pipe, faces=[tiny.face(1)], joint_attention_kwargs=mine), expected)
    assert mine == {"scale": 1.0}


def test_the_adapter_that_is_in_the_pipeline_acts():
    pipe, other = tiny.pipeline(), tiny.face_adapter(seed=99, to_out_std=0.3)
    expected = run(tiny.pipeline(face_adapter=other), faces=[tiny.face(1)])
    pipe.face_adapter = other
    assert np.array_equal(run(pipe, faces=[tiny.face(1)]), expected)
    pipe.transformer = tiny.transformer()
    assert np.array_equal(run(pipe, faces=[tiny.face(1)]), expected)


# The sliders


@pytest.mark.parametrize(
    "similarity, diversity, expected",
    [(1, 0, (0, 1)), (1, 1, (1, 0)), (1, 0.25, (0.25, 0.75)), (1.5, 0.5, (0.75, 0.75)), (0, 0.5, (0, 0))],
)
def test_slider_scales(similarity, diversity, expected):
    assert slider_scales(similarity, diversity) == pytest.approx(expected)
    assert slider_scales() == (0.0, 1.0)


@pytest.mark.parametrize("value", [-0.1, 1.6, float("nan"), float("inf"), "1", None, True])
def test_slider_ranges(value):
    with pytest.raises(ValueError, match=r"`similarity` is .*from 0 to 1.5"):
        slider_scales(similarity=value)
    with pytest.raises(ValueError, match=r"`diversity` is .*from 0 to 1"):
        slider_scales(diversity=value)


# Bad input: each names the argument and says what to do

BAD = {
    "size": ({"height": 100}, r"`height` is 100; give a multiple of 16, the nearest are 96 and 112"),
    "tiny": ({"width": 8}, r"`width` is 8"),
    "float size": ({"width": 64.0}, r"`width` is 64.0; give whole pixels"),
    "negative size": ({"height": -64}, r"`height` is -64"),
    "negative scale": ({"id_scale": -0.5}, r"`id_scale` is -0.5; give a finite number of at least 0"),
    "NaN scale": ({"siglip_scale": float("nan")}, r"`siglip_scale` is nan"),
    "infinite scale": ({"id_scale": float("inf")}, r"`id_scale` is inf"),
    "text scale": ({"id_scale": "1"}, r"`id_scale` is '1'"),
    "NaN guidance": ({"guidance_scale": float("nan")}, r"`guidance_scale` is nan"),
    "negative guidance": ({"true_cfg_scale": -1.0}, r"`true_cfg_scale` is -1"),
    "no steps": ({"num_inference_steps": 0}, r"`num_inference_steps` is 0"),
    "half a step": ({"num_inference_steps": 2.5}, r"`num_inference_steps` is 2.5"),
    "nobody": ({"faces": []}, r"`faces` is empty; give a photo .* or None"),
    "not a list": ({"faces": tiny_faces.blank()}, r"`faces` is a Image; give a list .*`faces=\[photo\]`"),
    "a path": ({"faces": "photo.jpg"}, r"`faces` is a str; give a list"),
    "a number": ({"faces": 3}, r"`faces` is a int; give a list"),
    "no photos": ({"faces": [photo_of(1), []]}, r"`faces\[1\]` is an empty list"),
    "no face": ({"faces": [photo_of(1), tiny_faces.blank()]}, r"`faces\[1\]`.*no face found.*give a photo"),
    "no face in one of several": (
        {"faces": [[photo_of(1), tiny_faces.blank()]]},
        r"`faces\[0\]\[1\]`.*no face",
    ),
    "no file": ({"faces": ["nowhere.jpg"]}, r"`faces\[0\]` \(nowhere.jpg\) does not exist"),
    "no image": ({"faces": [b"not an image at all"]}, r"`faces\[0\]`.*could not be read"),
    "nothing": ({"faces": [b""]}, r"`faces\[0\]` is empty"),
    "one pixel": ({"faces": [Image.new("RGB", (1, 1))]}, r"`faces\[0\]` is 1 x 1 pixels"),
    "a nested list": ({"faces": [[[photo_of(1)]]]}, r"`faces\[0\]\[0\]` is of type list"),
    "None in place of a photo": ({"faces": [None]}, r"`faces\[0\]` is of type NoneType"),
    "too few boxes": (
        {"faces": [photo_of(1), photo_of(2)], "bboxes": BOXES[:1]},
        r"`bboxes` holds 1 boxes for 2",
    ),
    "too many boxes": ({"faces": [photo_of(1)], "bboxes": BOXES}, r"`bboxes` holds 2 boxes for 1"),
    "box outside": (
        {"faces": [photo_of(1)], "bboxes": [(10, 10, 70, 40)]},
        r"`bboxes\[0\]`.*outside the picture",
    ),
    "box inverted": ({"faces": [photo_of(1)], "bboxes": [(40, 10, 20, 40)]}, r"`bboxes\[0\]`.*no area"),
    "box NaN": ({"faces": [photo_of(1)], "bboxes": [(0, 0, float("nan"), 40)]}, r"`bboxes\[0\]`.*finite"),
    "box of three": ({"faces": [photo_of(1)], "bboxes": [(0, 0, 40)]}, r"`bboxes\[0\]`.*four numbers"),
    "boxes alone": ({"bboxes": BOXES}, r"`bboxes` are given without `faces`"),
    "nine people": ({"faces": [tiny.face(seed) for seed in range(9)]}, r"no default layout for 9.*`bboxes`"),
    "two adapters": (
        {"faces": [photo_of(1)], "ip_adapter_image": tiny_faces.blank()},
        r"`ip_adapter_image` is given together with `faces`.*leave out",
    ),
    "two adapters' embeddings": (
        {"faces": [photo_of(1)], "negative_ip_adapter_image_embeds": [torch.zeros(1)]},
        r"`negative_ip_adapter_image_embeds` is given together with `faces`",
    ),
    "conditioning twice": (
        {"faces": [photo_of(1)], "joint_attention_kwargs": {"ip_hidden_states": 1}},
        r"`joint_attention_kwargs` has `ip_hidden_states`",
    ),
    "prompt": ({"prompt": None}, r"`prompt`"),
    "no prompts": ({"prompt": []}, r"`prompt` is an empty list; give a text"),
    "too many negative prompts": (
        {"prompt": ["a", "b"], "negative_prompt": ["c"] * 3, "true_cfg_scale": 2.0},
        r"`negative_prompt` holds 3 texts for 2 prompts; give one for each, or one text for all",
    ),
    "negative prompts for one": (
        {"negative_prompt": ["c", "d"], "true_cfg_scale": 2.0},
        r"`negative_prompt` holds 2 texts for 1",
    ),
    "no pictures": ({"num_images_per_prompt": 0}, r"`num_images_per_prompt` is 0; give a whole number"),
    "a file type": (
        {"output_type": "jpg"},
        r"`output_type` is 'jpg'; use one of 'pil', 'np', 'pt', 'latent'",
    ),
    "sigma NaN": ({"sigmas": [1.0, float("nan")]}, r"`sigmas` are \[1.0, nan\]; give .* above 0 and up to 1"),
    "no sigmas": ({"sigmas": []}, r"`sigmas` are \[\]"),
    "no share of noise": ({"true_cfg_min_sigma": 1.5}, r"`true_cfg_min_sigma` is 1.5; give .* from 0 to 1"),
    "neither yes nor no": ({"faces_in_negative": "no"}, r"`faces_in_negative` is 'no'; give True or False"),
    "long text": ({"max_sequence_length": 600}, r"`max_sequence_length`"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(photo_pipe, name):
    kwargs, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        photo_pipe(**{"prompt": "a", **kwargs})


def test_more_bad_faces(photo_pipe):
    with pytest.raises(ValueError, match=r"`faces\[0\]` is a photo.*`face_analyzer`"):
        tiny.pipeline()("a", faces=[photo_of(1)])
    with pytest.raises(ValueError, match=r"`face_adapter`"):
        tiny.pipeline(face_adapter=None)("a", faces=[tiny.face(1)])
    with pytest.raises(ValueError, match=r"`image_encoder`.*`siglip_scale=0.0"):
        tiny.pipeline(image_encoder=None)("a", faces=[tiny.face(1)])
    without_encoder = tiny.pipeline(image_encoder=None, feature_extractor=None)
    assert np.isfinite(run(without_encoder, faces=[tiny.face(1)], id_scale=1.0, siglip_scale=0.0)).all()
    for bad in (np.zeros(512), np.full(512, np.nan), np.ones(128)):
        face = tiny.face(1)
        object.__setattr__(face, "embedding", bad.astype(np.float32))
        with pytest.raises(ValueError, match=r"`faces\[0\]` has an embedding .*512"):
            photo_pipe("a", faces=[face])
    face = tiny.face(1)
    object.__setattr__(face, "face_crop", None)
    with pytest.raises(ValueError, match=r"`faces\[1\]` has a `face_crop` of type NoneType.*PIL image"):
        photo_pipe("a", faces=[tiny.face(2), face])
    mirrored = tiny.face(1)
    object.__setattr__(mirrored, "embedding", -mirrored.embedding)
    with pytest.raises(ValueError, match=r"`faces\[0\]`.*different people"):
        photo_pipe("a", faces=[[tiny.face(1), mirrored]])


def test_an_ip_adapter_that_is_loaded_is_refused():
    pipe = tiny.pipeline()
    pipe.transformer.encoder_hid_proj = torch.nn.Identity()  # what `load_ip_adapter` leaves there
    with pytest.raises(ValueError, match=r"`faces` are given.*`pipe.unload_ip_adapter\(\)`"):
        pipe("a", faces=[tiny.face(1)])
    pipe.transformer.encoder_hid_proj = None
    pipe("a", faces=[tiny.face(1)], num_inference_steps=1, output_type="latent")


def test_bad_settings_of_the_pipeline():
    with pytest.raises(ValueError, match=r"`timestep_shift` is 'fast'; use one of 'released', 'flux'"):
        tiny.pipeline(timestep_shift="fast")
    with pytest.raises(
        ValueError, match=r"`sampling_defaults` has \['steps'\]; known are .*num_inference_steps"
    ):
        tiny.pipeline(sampling_defaults={"steps": 4})
    with pytest.raises(ValueError, match=r"`transformer` of width 64"):
        tiny.pipeline(face_adapter=tiny.face_adapter(hidden_size=64))
    with pytest.raises(ValueError, match=r"`face_adapter` expects .* 48 wide.*`image_encoder` gives 24"):
        tiny.pipeline(face_adapter=tiny.face_adapter(image_feature_dim=48))
    tiny.pipeline(face_adapter=tiny.face_adapter(image_feature_dim=48, branches=("arc",)))
    with pytest.raises(ValueError, match=r"`pixels_per_token`"):
        tiny.pipeline(face_adapter=tiny.face_adapter(pixels_per_token=32))
    linear = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear")
    with pytest.raises(ValueError, match=r"`timestep_shift` is 'released'.*`scheduler`"):
        run(tiny.pipeline(scheduler=linear))
