"""Folders and repositories: what is saved is what is loaded, from everywhere; what is missing is named."""

from __future__ import annotations

import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file

from tests import tiny, tiny_faces
from tests.hub_store import HubStore
from withanyone import FaceAdapter, FaceAnalyzer, WithAnyonePipeline

REPO = "someone/tiny-withanyone"


@pytest.fixture(scope="module")
def photos() -> list:
    return [tiny_faces.paint_face(tiny_faces.blank(), (20, 16, 90, 104), identity) for identity in (1, 2)]


@pytest.fixture
def hub(tmp_path, monkeypatch) -> HubStore:
    return HubStore(tmp_path / "hub", monkeypatch)


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A copy of the tiny pipeline's folder, to be damaged."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def run(pipe, photos) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("two people", photos, generator=generator, output_type="np").images


@pytest.fixture(scope="module")
def expected(tiny_model, photos) -> np.ndarray:
    return run(WithAnyonePipeline.from_pretrained(tiny_model), photos)


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory):
    """A FLUX.1 folder as diffusers saves it."""
    folder = tmp_path_factory.mktemp("flux")
    FluxPipeline(**tiny.flux_components()).save_pretrained(folder)
    return folder


def face_parts(tiny_model) -> dict:
    pipe = WithAnyonePipeline.from_pretrained(tiny_model)
    names = ("face_adapter", "face_analyzer", "image_encoder", "feature_extractor")
    return {name: getattr(pipe, name) for name in names}


# Folders


def test_saved_and_loaded_is_bit_equal(tmp_path, photos):
    pipe = tiny.pipeline(
        face_analyzer=FaceAnalyzer.from_pretrained(tiny_faces.write_pack(tmp_path / "pack")),
        timestep_shift="flux",
        sampling_defaults={"height": 48, "width": 64, "num_inference_steps": 3, "id_scale": 0.5},
    )
    expected = run(pipe, photos)
    pipe.save_pretrained(tmp_path / "model")
    loaded = WithAnyonePipeline.from_pretrained(tmp_path / "model")
    assert np.array_equal(run(loaded, photos), expected)
    assert loaded.config.timestep_shift == "flux"
    assert dict(loaded.config.sampling_defaults) == dict(pipe.config.sampling_defaults)
    assert loaded.config._name_or_path == str(tmp_path / "model")
    # And once more, from what was loaded; a path is as good as a string.
    loaded.save_pretrained(str(tmp_path / "again"))
    assert np.array_equal(run(WithAnyonePipeline.from_pretrained(str(tmp_path / "again")), photos), expected)
    assert not [file for file in (tmp_path / "model").rglob("*") if file.suffix in (".bin", ".pt", ".pkl")]


def test_settings_may_be_given_at_loading(tiny_model):
    pipe = WithAnyonePipeline.from_pretrained(
        tiny_model, timestep_shift="flux", sampling_defaults={"height": 32, "width": 32}
    )
    assert pipe.config.timestep_shift == "flux" and pipe.config.sampling_defaults["height"] == 32


def test_dtypes(tiny_model):
    half = WithAnyonePipeline.from_pretrained(tiny_model, dtype=torch.bfloat16)
    assert {half.transformer.dtype, half.face_adapter.dtype, half.image_encoder.dtype} == {torch.bfloat16}
    mixed = WithAnyonePipeline.from_pretrained(
        tiny_model, dtype={"default": torch.float16, "face_adapter": torch.float32}
    )
    assert mixed.transformer.dtype == torch.float16 and mixed.face_adapter.dtype == torch.float32


def test_a_flux_folder_with_face_parts(flux_folder, tiny_model, photos, tmp_path):
    parts = face_parts(tiny_model)
    pipe = WithAnyonePipeline.from_pretrained(flux_folder, **parts)
    assert pipe.face_adapter is parts["face_adapter"]
    pipe.register_to_config(
        sampling_defaults={
            **pipe.config.sampling_defaults,
            "height": 64,
            "width": 64,
            "num_inference_steps": 2,
        }
    )
    images = run(pipe, photos)
    pipe.save_pretrained(tmp_path / "whole")
    assert np.array_equal(run(WithAnyonePipeline.from_pretrained(tmp_path / "whole"), photos), images)


def test_a_flux_folder_without_faces(flux_folder, photos):
    with pytest.raises(ValueError, match=r"lacks `face_adapter`, `face_analyzer`.*face_adapter=.*None"):
        WithAnyonePipeline.from_pretrained(flux_folder)
    pipe = WithAnyonePipeline.from_pretrained(flux_folder, face_adapter=None, face_analyzer=None)
    with pytest.raises(ValueError, match=r"`face_adapter`"):
        run(pipe, photos)


def test_released_weights_into_a_flux_folder(flux_folder, tiny_model, photos, tmp_path):
    """The five lines of a user with FLUX.1 [dev] and withanyone.safetensors."""
    parts = face_parts(tiny_model)
    parts["face_adapter"].save_single_file(tmp_path / "withanyone.safetensors")
    adapter = FaceAdapter.from_single_file(tmp_path / "withanyone.safetensors")
    settings = {"sampling_defaults": {"height": 64, "width": 64, "num_inference_steps": 2}}
    pipe = WithAnyonePipeline.from_pretrained(flux_folder, **{**parts, "face_adapter": adapter}, **settings)
    same = WithAnyonePipeline.from_pretrained(flux_folder, **parts, **settings)
    images = run(pipe, photos)
    assert np.array_equal(images, run(same, photos))
    assert not np.array_equal(images, pipe("two people", output_type="np").images)


def test_from_pipe(tiny_model, expected, photos):
    pipe = WithAnyonePipeline.from_pretrained(tiny_model)
    again = WithAnyonePipeline.from_pipe(pipe)
    assert again.transformer is pipe.transformer and again.face_analyzer is pipe.face_analyzer
    assert again.config.sampling_defaults == pipe.config.sampling_defaults
    assert np.array_equal(run(again, photos), expected)
    flux = FluxPipeline.from_pipe(pipe)
    there = WithAnyonePipeline.from_pipe(
        flux,
        face_adapter=pipe.face_adapter,
        face_analyzer=pipe.face_analyzer,
        sampling_defaults=dict(pipe.config.sampling_defaults),
    )
    assert np.array_equal(run(there, photos), expected)


def test_from_pipe_keeps_the_dtype(tiny_model):
    flux = FluxPipeline(**tiny.flux_components()).to(torch.bfloat16)
    assert WithAnyonePipeline.from_pipe(flux).transformer.dtype == torch.bfloat16
    assert WithAnyonePipeline.from_pipe(flux, dtype=torch.float32).transformer.dtype == torch.float32


def test_a_vae_of_this_package_needs_no_import(folder):
    """model_index.json names its module; diffusers alone would refuse to import it."""
    from withanyone.mini.latents import PatchAutoencoder

    torch.manual_seed(0)
    vae = PatchAutoencoder(
        latent_channels=tiny.LATENT_CHANNELS, block_out_channels=(8, 8, 8, 8), layers_per_block=1
    )
    pipe = WithAnyonePipeline.from_pretrained(folder, vae=vae.eval())
    expected = run(pipe, [tiny.face(1)])
    pipe.save_pretrained(folder.parent / "other")
    index = json.loads((folder.parent / "other" / "model_index.json").read_text())
    assert index["vae"] == ["withanyone.mini.latents", "PatchAutoencoder"]
    modules = [name for name in sys.modules if name.startswith("withanyone.mini")]
    kept = {name: sys.modules.pop(name) for name in modules}
    try:
        loaded = WithAnyonePipeline.from_pretrained(folder.parent / "other")
        assert "withanyone.mini.latents" in sys.modules
    finally:
        sys.modules.update(kept)
    assert np.array_equal(run(loaded, [tiny.face(1)]), expected)
    again = WithAnyonePipeline.from_pipe(loaded)
    assert again.vae is loaded.vae


# Folders that lack something


def test_missing_parts_are_named(folder):
    parts = [p.name for p in folder.iterdir() if p.is_dir()]
    assert len(parts) == 11
    for name in parts:
        hidden = folder.parent / "hidden"
        (folder / name).rename(hidden)
        with pytest.raises(ValueError, match=rf"lacks the folder of its `{name}`.*`{name}=...`"):
            WithAnyonePipeline.from_pretrained(folder)
        hidden.rename(folder / name)
    shutil.rmtree(folder / "face_adapter")
    assert WithAnyonePipeline.from_pretrained(folder, face_adapter=None).face_adapter is None


MODELS = ("face_adapter", "image_encoder", "text_encoder", "text_encoder_2", "transformer", "vae")


@pytest.mark.parametrize("name", [*MODELS, "tokenizer", "tokenizer_2"])
def test_a_part_without_its_files_is_named(folder, name):
    """Without a config or a vocabulary some libraries would make one up."""
    wanted = ("config.json", "*.safetensors") if name in MODELS else ("tokenizer.json",)
    for pattern in wanted:
        (file,) = (folder / name).glob(pattern)
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(ValueError, match=rf"has no {re.escape(pattern)}.* in its `{name}`.*`{name}=...`"):
            WithAnyonePipeline.from_pretrained(folder)
        file.write_bytes(content)


@pytest.mark.parametrize("name", MODELS)
def test_weights_that_are_cut_off_or_a_pointer_are_named(folder, name):
    (file,) = (folder / name).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=rf"{name}.*not a whole safetensors file"):
        WithAnyonePipeline.from_pretrained(folder)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match=rf"{name}.*Git LFS pointer"):
        WithAnyonePipeline.from_pretrained(folder)


def test_a_weight_that_a_file_lacks_is_named(folder):
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["norm_out.linear.weight"]
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"`transformer` whose files lack 1 .*norm_out.linear.weight"):
        WithAnyonePipeline.from_pretrained(folder)
    given = WithAnyonePipeline.from_pretrained(folder, transformer=tiny.transformer())
    assert given.transformer.device.type == "cpu"


def test_missing_entries_are_named(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "vae"}))
    with pytest.raises(
        ValueError, match=r"lacks `vae`. Give what is missing: `from_pretrained\(..., vae=...\)`"
    ):
        WithAnyonePipeline.from_pretrained(folder)
    (folder / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken model_index.json"):
        WithAnyonePipeline.from_pretrained(folder)
    (folder / "model_index.json").unlink()
    with pytest.raises(ValueError, match=r"is not a pipeline: it has no model_index.json"):
        WithAnyonePipeline.from_pretrained(folder)


def test_a_folder_in_the_home_directory(tiny_model, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_model.parent))
    pipe = WithAnyonePipeline.from_pretrained(f"~/{tiny_model.name}")
    assert pipe.config._name_or_path == str(tiny_model)


@pytest.mark.parametrize("path", ["no/such/folder", "./folder", "/nowhere", "../here", "name"])
def test_what_is_neither_folder_nor_hub_id(path):
    with pytest.raises(ValueError, match=r"is neither a folder nor a Hub id \(owner/name\)"):
        WithAnyonePipeline.from_pretrained(path)


def test_pickles_are_never_read(folder):
    weights = folder / "face_adapter" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), folder / "face_adapter" / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ValueError, match=r"has no \*.safetensors in its `face_adapter`"):
        WithAnyonePipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"`use_safetensors` is False.*pickle"):
        WithAnyonePipeline.from_pretrained(folder, use_safetensors=False)


# The Hub


def test_pushed_and_loaded_is_bit_equal(hub, tiny_model, expected, photos):
    pipe = WithAnyonePipeline.from_pretrained(tiny_model)
    pipe.push_to_hub(REPO, private=True, token="secret", commit_message="First")
    created, uploaded = hub.calls[:2]
    assert created[:2] == ("create_repo", REPO) and created[2]["private"] and created[2]["token"] == "secret"
    assert uploaded[:2] == ("upload_folder", REPO) and uploaded[2]["commit_message"] == "First"
    assert {"README.md", "model_index.json", "pipeline.py"} <= set(hub.files(REPO))

    loaded = WithAnyonePipeline.from_pretrained(REPO)
    assert np.array_equal(run(loaded, photos), expected)
    assert loaded.config._name_or_path == REPO
    fetched = hub.fetched(REPO)
    assert [file for file in fetched if file.endswith(".onnx")]
    assert [file for file in fetched if file.endswith(".safetensors")]
    assert not [file for file in fetched if file.endswith(".py")]


def test_saving_may_push(hub, tiny_model, expected, photos, tmp_path):
    pipe = WithAnyonePipeline.from_pretrained(tiny_model)
    pipe.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id=REPO, token="secret")
    assert np.array_equal(run(WithAnyonePipeline.from_pretrained(REPO), photos), expected)
    assert np.array_equal(run(WithAnyonePipeline.from_pretrained(tmp_path / "out"), photos), expected)


def test_hub_arguments_are_passed_on(hub, tiny_model, tmp_path):
    WithAnyonePipeline.from_pretrained(tiny_model).push_to_hub(REPO)
    hub.calls.clear()
    arguments = {"revision": "v1", "token": "secret", "cache_dir": str(tmp_path), "local_files_only": True}
    WithAnyonePipeline.from_pretrained(REPO, **arguments)
    downloads = [call for call in hub.calls if call[0] == "snapshot_download"]
    assert len(downloads) == 2 and all(call[1:] == (REPO, arguments) for call in downloads)


def test_only_what_is_needed_is_fetched(hub, tiny_model, expected, photos):
    WithAnyonePipeline.from_pretrained(tiny_model).push_to_hub(REPO)
    extra = ["flux1-dev.safetensors", "transformer/model.bin", "vae/diffusion_pytorch_model.fp16.safetensors"]
    for file in [*extra, "dev_grid.jpg", "transformer/evil.pkl", "vae.sft"]:
        (hub.repo(REPO) / file).write_bytes(b"not wanted")
    parts = face_parts(tiny_model)
    given = WithAnyonePipeline.from_pretrained(REPO, face_adapter=parts["face_adapter"], text_encoder_2=None)
    assert given.text_encoder_2 is None
    fetched = hub.fetched(REPO)
    assert not [
        f for f in fetched if f.startswith(("face_adapter", "text_encoder_2")) or f in extra or ".pkl" in f
    ]
    assert np.array_equal(run(WithAnyonePipeline.from_pretrained(REPO), photos), expected)
    assert not set(extra) & set(hub.fetched(REPO))


def test_a_flux_repository_with_face_parts(hub, flux_folder, tiny_model, photos):
    FluxPipeline.from_pretrained(flux_folder).push_to_hub("black-forest-labs/FLUX.1-tiny")
    with pytest.raises(ValueError, match=r"`black-forest-labs/FLUX.1-tiny` lacks `face_adapter`"):
        WithAnyonePipeline.from_pretrained("black-forest-labs/FLUX.1-tiny")
    pipe = WithAnyonePipeline.from_pretrained("black-forest-labs/FLUX.1-tiny", **face_parts(tiny_model))
    out = pipe("two people", photos, height=64, width=64, num_inference_steps=1, output_type="np")
    assert out.images.shape == (1, 64, 64, 3)


def test_a_repository_that_lacks_something(hub, tiny_model):
    WithAnyonePipeline.from_pretrained(tiny_model).push_to_hub(REPO)
    shutil.rmtree(hub.repo(REPO) / "image_encoder")
    with pytest.raises(ValueError, match=rf"`{REPO}` lacks the folder of its `image_encoder`"):
        WithAnyonePipeline.from_pretrained(REPO)
    (hub.repo(REPO) / "model_index.json").unlink()
    shutil.rmtree(hub.root / "cache")
    with pytest.raises(ValueError, match=rf"`{REPO}` is not a pipeline: it has no model_index.json"):
        WithAnyonePipeline.from_pretrained(REPO)


def test_diffusion_pipeline_finds_the_class_with_trust(hub, tiny_model, expected, photos):
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tiny_model)
    pipe = DiffusionPipeline.from_pretrained(tiny_model, trust_remote_code=True)
    assert type(pipe) is WithAnyonePipeline
    assert np.array_equal(run(pipe, photos), expected)
    # diffusers' own download takes no components of other packages, so a repository is fetched by ours.
    pipe.push_to_hub(REPO)
    pipe = DiffusionPipeline.from_pretrained(hub.snapshot_download(REPO), trust_remote_code=True)
    assert type(pipe) is WithAnyonePipeline
    assert np.array_equal(run(pipe, photos), expected)


def test_the_adapter_alone(hub, tiny_model):
    adapter = WithAnyonePipeline.from_pretrained(tiny_model).face_adapter
    adapter.push_to_hub("someone/adapter", private=True, token="secret")
    assert hub.calls[0][2]["private"]
    loaded = FaceAdapter.from_pretrained("someone/adapter")
    assert dict(loaded.config)["hidden_size"] == tiny.HIDDEN_SIZE
    state = loaded.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in adapter.state_dict().items())
    part = FaceAdapter.from_pretrained(tiny_model, subfolder="face_adapter")
    assert part.state_dict().keys() == state.keys()
    with pytest.raises((OSError, EntryNotFoundError)):
        FaceAdapter.from_pretrained("someone/nothing")
