"""Files: the released layout in and out, strictly; single branches and their merging; diffusers' folders."""

from __future__ import annotations

import json
import logging
import pickle
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import reference
from tests.hub_store import HubStore
from withanyone.adapter import FaceAdapter

WIDTH, BLOCKS, HEADS, FEATURES = 48, 3, 2, 20


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    tensors = reference.random_checkpoint(WIDTH, BLOCKS, HEADS, feature_dim=FEATURES, id_tokens=5)
    return {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}


def unused_siglip(suffix: str) -> dict[str, torch.Tensor]:
    """What the arc branch's training code keeps and never uses."""
    hidden, out = 4 * WIDTH, 8 * WIDTH
    shapes = {"0.weight": (hidden, FEATURES), "0.bias": (hidden,), "2.weight": (hidden,), "2.bias": (hidden,)}
    shapes |= {"3.weight": (out, hidden), "3.bias": (out,)}
    return {f"siglip_in{suffix}.{name}": torch.ones(shape).bfloat16() for name, shape in shapes.items()}


def single(state, branch: str) -> dict[str, torch.Tensor]:
    """One branch as its training code writes it: no suffix."""
    return {k.replace(f"_{branch}.", "."): v for k, v in state.items() if f"_{branch}." in k}


def write(folder, tensors, name="file.safetensors"):
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / name)
    return folder / name


def assert_same(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


def encoded(adapter) -> list[torch.Tensor]:
    """All numbers that the adapter gives to the denoising loop for one picture of two people."""
    g = torch.Generator().manual_seed(0)
    embeddings = torch.randn(1, 2, adapter.config.embedding_dim, generator=g)
    features = torch.randn(1, 2, 4, adapter.config.image_feature_dim, generator=g)
    boxes = [[(0, 0, 30, 40), (32, 10, 60, 50)]]
    with torch.no_grad():
        conditioning = adapter.encode(embeddings, features, boxes, 64, 64, id_scale=0.5, siglip_scale=0.5)
    return [t for branch in conditioning.branches.values() for t in (branch.keys, branch.values)]


# The released layout


def test_sizes_are_read_from_the_shapes_and_the_tensors_are_the_files(tmp_path, state):
    adapter = FaceAdapter.from_single_file(write(tmp_path, state))
    assert_same(adapter.state_dict(), state)
    config = adapter.config
    assert (config.hidden_size, config.num_blocks, config.inner_dim, config.head_dim) == (48, 3, 128, 64)
    assert (config.num_id_tokens, config.image_feature_dim, config.embedding_dim) == (5, 20, 512)
    assert adapter.branches == ("arc", "sig") and not adapter.training


def test_released_layout_out_and_in_is_bit_equal(tmp_path, state):
    path = write(tmp_path, state)
    adapter = FaceAdapter.from_single_file(path)
    adapter.save_single_file(tmp_path / "again" / "withanyone.safetensors")
    assert_same(load_file(tmp_path / "again" / "withanyone.safetensors"), state)
    again = FaceAdapter.from_single_file(tmp_path / "again" / "withanyone.safetensors")
    for a, b in zip(encoded(adapter), encoded(again), strict=True):
        assert torch.equal(a, b)
    assert not list((tmp_path / "again").glob("*.partial"))


def test_another_dtype_on_request(tmp_path, state):
    adapter = FaceAdapter.from_single_file(write(tmp_path, state), dtype=torch.float32)
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}


def test_pixels_per_token_come_from_the_caller_or_the_files_own_metadata(tmp_path, state):
    adapter = FaceAdapter.from_single_file(write(tmp_path, state), pixels_per_token=32)
    adapter.save_single_file(tmp_path / "out.safetensors")
    assert FaceAdapter.from_single_file(tmp_path / "out.safetensors").config.pixels_per_token == 32


def test_heads_of_another_width_come_back_from_the_files_own_metadata(tmp_path):
    """A file's shapes do not tell heads of 32 from half as many of 64."""
    torch.manual_seed(0)
    config = {"hidden_size": WIDTH, "num_blocks": 2, "inner_dim": 128, "head_dim": 32}
    adapter = FaceAdapter(**config, image_feature_dim=FEATURES, id_hidden_size=64)
    adapter.save_single_file(tmp_path / "out.safetensors")
    again = FaceAdapter.from_single_file(tmp_path / "out.safetensors")
    assert again.config.head_dim == 32
    for a, b in zip(encoded(adapter), encoded(again), strict=True):
        assert torch.equal(a, b)


def test_metadata_of_other_tools_is_passed_over_and_sizes_that_are_none_are_refused(tmp_path, state):
    path = tmp_path / "file.safetensors"
    for config in ("[1, 2]", '"words"', '{"model": "other"}'):
        save_file(state, path, metadata={"config": config})
        assert FaceAdapter.from_single_file(path).config.pixels_per_token == 16
    for config, message in (("{", "not JSON"), ('{"head_dim": "64"}', "`head_dim` '64'.*1 or more")):
        save_file(state, path, metadata={"config": config})
        with pytest.raises(ValueError, match=message):
            FaceAdapter.from_single_file(path)


def test_unused_siglip_of_the_arc_branch_is_kept_logged_and_written_back(tmp_path, state, caplog):
    whole = state | unused_siglip("_arc")
    with caplog.at_level(logging.INFO, logger="withanyone.adapter"):
        adapter = FaceAdapter.from_single_file(write(tmp_path, whole))
    assert "siglip_in_arc.0.weight" in caplog.text
    assert_same(adapter.state_dict(), state)
    adapter.save_single_file(tmp_path / "out.safetensors")
    assert_same(load_file(tmp_path / "out.safetensors"), whole)


# One branch, and two merged


@pytest.mark.parametrize("branch", ["arc", "sig"])
def test_a_single_branch_out_and_in(tmp_path, state, branch):
    expected = single(state, branch)
    adapter = FaceAdapter.from_single_file(write(tmp_path, expected), branch=branch)
    assert adapter.branches == (branch,)
    assert_same(adapter.state_dict(), {k: v for k, v in state.items() if f"_{branch}." in k})
    adapter.save_single_file(tmp_path / "out.safetensors")
    assert_same(load_file(tmp_path / "out.safetensors"), expected)


def test_merging_two_branches_is_the_whole(tmp_path, state):
    arc = write(tmp_path, single(state, "arc") | unused_siglip(""), "arc.safetensors")
    sig = write(tmp_path, single(state, "sig"), "sig.safetensors")
    merged = FaceAdapter.merge_branches(arc, sig)
    assert_same(merged.state_dict(), state)
    merged.save_single_file(tmp_path / "out.safetensors")
    assert_same(load_file(tmp_path / "out.safetensors"), state | unused_siglip("_arc"))


def test_branches_of_two_bases_do_not_merge(tmp_path, state):
    other = reference.random_checkpoint(WIDTH, BLOCKS + 1, HEADS, feature_dim=FEATURES, id_tokens=5)
    arc = write(tmp_path, single(state, "arc"), "arc.safetensors")
    sig = write(tmp_path, single(other, "sig"), "sig.safetensors")
    with pytest.raises(ValueError, match="do not go together: `num_blocks` is 3 in .*arc.* and 4 in .*sig"):
        FaceAdapter.merge_branches(arc, sig)


def test_branches_whose_files_say_different_patches_do_not_merge(tmp_path, state):
    for branch, pixels in (("arc", 16), ("sig", 32)):
        path = write(tmp_path, single(state, branch))
        adapter = FaceAdapter.from_single_file(path, branch=branch, pixels_per_token=pixels)
        adapter.save_single_file(tmp_path / f"{branch}.safetensors")
    with pytest.raises(ValueError, match="`pixels_per_token` is 16 in .*arc.* and 32 in .*sig"):
        FaceAdapter.merge_branches(tmp_path / "arc.safetensors", tmp_path / "sig.safetensors")
    silent = write(tmp_path, single(state, "arc"))  # a training checkpoint says nothing of it
    merged = FaceAdapter.merge_branches(silent, tmp_path / "sig.safetensors")
    assert merged.config.pixels_per_token == 32


def test_a_file_of_kes_shape_is_the_branch_the_caller_says(tmp_path, state):
    """The same names and shapes may be either branch; as sig, each image feature gives 8 tokens."""
    path = write(tmp_path, single(state, "arc") | unused_siglip(""))
    arc = FaceAdapter.from_single_file(path, branch="arc")
    assert arc.branches == ("arc",) and len(arc.unused_tensors) == 6
    sig = FaceAdapter.from_single_file(path, branch="sig")
    assert sig.config.tokens_per_image_feature == 8 and sig.config.image_hidden_size == 4 * WIDTH
    features = torch.zeros(2, 1, FEATURES).bfloat16()
    assert sig.face_tokens("sig", torch.zeros(2, 512).bfloat16(), features).shape == (2, 8 + 5, WIDTH)


def test_a_single_branch_file_needs_its_name_and_a_whole_one_none(tmp_path, state):
    one, whole = write(tmp_path, single(state, "sig"), "one"), write(tmp_path, state, "whole")
    with pytest.raises(ValueError, match="holds one branch and does not say which.*branch='arc'"):
        FaceAdapter.from_single_file(one)
    with pytest.raises(ValueError, match="holds both branches.*leave `branch` out"):
        FaceAdapter.from_single_file(whole, branch="arc")
    with pytest.raises(ValueError, match="`branch` is 'face'; give 'arc' or 'sig'"):
        FaceAdapter.from_single_file(one, branch="face")


# Bad files


def without(*keys):
    return lambda state: {key: value for key, value in state.items() if key not in keys}


def plus(key, *shape):
    return lambda state: {**state, key: torch.zeros(shape).bfloat16()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("ipa_arc.1.to_q.weight"), r"1 missing: ipa_arc\.1\.to_q\.weight"),
        (
            without("siglip_in_sig.3.bias", "ipa_sig.2.norm1.bias"),
            r"2 missing: ipa_sig\.2\.norm1\.bias, siglip_in",
        ),
        (plus("ipa_arc.1.to_k.weight", 4, 4), r"1 unexpected: ipa_arc\.1\.to_k\.weight"),
        (plus("siglip_in_arm.0.weight", 4, 4), r"1 unexpected: siglip_in_arm\.0\.weight"),
        (plus("ipa_arc.900000000.to_q.weight", 4), r"1 unexpected: ipa_arc\.900000000\.to_q\.weight"),
        (plus("ipa_sig.0.to_out.weight", 48, 64), r"to_out\.weight \(48, 64\) instead of \(48, 128\)"),
        (plus("ipa_arc.0.norm1.weight", 50), r"ipa_arc\.0\.norm1\.weight \(50,\) instead of \(48,\)"),
        (
            plus("arcface_in_arc.3.weight", 200, 192),
            r"arcface_in_arc\.3\.weight \(200, 192\) instead of \(240",
        ),
        (plus("ipa_arc.0.to_q.weight", 128), r"ipa_arc\.0\.to_q\.weight \(128,\) instead of \(128, 48\)"),
    ],
)
def test_a_missing_extra_or_misshapen_key_is_named(tmp_path, state, change, message):
    with pytest.raises(ValueError, match=message):
        FaceAdapter.from_single_file(write(tmp_path, change(state)))


def test_a_branch_that_is_missing_altogether_is_named(tmp_path, state):
    half = {key: value for key, value in state.items() if "_sig." not in key}
    with pytest.raises(ValueError, match=r"missing: arcface_in_sig\.0\.bias, .* and \d+ more"):
        FaceAdapter.from_single_file(write(tmp_path, half))


def test_another_models_weights_are_no_adapter(tmp_path):
    with pytest.raises(ValueError, match=r"no adapter.*double_blocks\.0"):
        FaceAdapter.from_single_file(write(tmp_path, {"double_blocks.0.weight": torch.zeros(3)}))


def test_a_truncated_file_says_so(tmp_path, state):
    path = write(tmp_path, state)
    data = path.read_bytes()
    for length in (len(data) // 2, 100, 4, 0):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="not a whole safetensors file.*cut off"):
            FaceAdapter.from_single_file(path)


def test_a_git_lfs_pointer_says_so(tmp_path):
    path = tmp_path / "withanyone.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="is a Git LFS pointer.*git lfs pull"):
        FaceAdapter.from_single_file(path)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was run",))


@pytest.mark.parametrize("kind", ["torch", "torch_legacy", "pickle"])
def test_a_pickle_is_refused_and_never_run(tmp_path, kind):
    path = tmp_path / "ipa.safetensors"
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"a": Bomb()}))
    else:
        torch.save({"a": Bomb()}, path, _use_new_zipfile_serialization=kind == "torch")
    with pytest.raises(ValueError, match="is a pickle.*never loaded.*safetensors"):
        FaceAdapter.from_single_file(path)


def test_a_file_that_is_not_there_names_where_to_get_it(tmp_path):
    with pytest.raises(ValueError, match="is not a file.*hf_hub_download"):
        FaceAdapter.from_single_file(tmp_path / "none.safetensors")


# diffusers' layout


def test_folder_out_and_in_is_bit_equal_with_its_config(tmp_path, state):
    adapter = FaceAdapter.from_single_file(write(tmp_path, state))
    adapter.save_pretrained(tmp_path / "adapter")
    assert sorted(path.suffix for path in (tmp_path / "adapter").iterdir()) == [".json", ".safetensors"]
    config = json.loads((tmp_path / "adapter" / "config.json").read_text())
    assert config["_class_name"] == "FaceAdapter" and config["hidden_size"] == WIDTH

    again = FaceAdapter.from_pretrained(tmp_path / "adapter", torch_dtype=torch.bfloat16)
    assert_same(again.state_dict(), state)
    for a, b in zip(encoded(adapter), encoded(again), strict=True):
        assert torch.equal(a, b)
    again.save_single_file(tmp_path / "out.safetensors")
    assert_same(load_file(tmp_path / "out.safetensors"), state)
    # where it was read from stays here: nobody's folders are told with a release
    again.save_pretrained(tmp_path / "again")
    assert str(tmp_path) not in (tmp_path / "again" / "config.json").read_text()


@pytest.mark.parametrize(
    ("change", "key", "message"),
    [
        (without("ipa_arc.1.to_q.weight"), "ipa_arc.1.to_q.weight", "1 missing: "),
        (plus("ipa_arc.1.to_k.weight", 4, 4), "ipa_arc.1.to_k.weight", "1 unexpected: "),
        (plus("ipa_sig.0.to_out.weight", 48, 64), "ipa_sig.0.to_out.weight", "1 of another shape: "),
    ],
)
def test_a_folders_weights_are_loaded_strictly(tmp_path, state, monkeypatch, change, key, message):
    """diffusers alone would make up what is missing, and warn."""
    store = HubStore(tmp_path / "hub", monkeypatch)
    adapter = FaceAdapter.from_single_file(write(tmp_path, state))
    adapter.save_pretrained(tmp_path / "adapter", push_to_hub=True, repo_id="someone/adapter")
    for folder in (tmp_path / "adapter", store.repo("someone/adapter")):
        write(folder, change(state), "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=re.escape(message + key)):
        FaceAdapter.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=re.escape(message + key)):
        FaceAdapter.from_pretrained(tmp_path, subfolder="adapter")
    with pytest.raises(ValueError, match=re.escape(key)):
        FaceAdapter.from_pretrained("someone/adapter")


def test_a_folder_cut_off_or_pickled_is_refused(tmp_path, state):
    FaceAdapter.from_single_file(write(tmp_path, state)).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file.*cut off"):
        FaceAdapter.from_pretrained(tmp_path / "adapter")
    path.unlink()
    torch.save({"a": Bomb()}, path.with_suffix(".bin"))
    with pytest.raises(ValueError, match="has no diffusion_pytorch_model.safetensors"):
        FaceAdapter.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="`use_safetensors` is False.*pickle"):
        FaceAdapter.from_pretrained(tmp_path / "adapter", use_safetensors=False)


def test_a_folder_in_several_files_out_and_in(tmp_path, state):
    """As an adapter of more than 10 GB is saved; and under another name, as `variant` has it."""
    adapter = FaceAdapter.from_single_file(write(tmp_path, state))
    adapter.save_pretrained(tmp_path / "adapter", max_shard_size="50KB")
    shards = sorted((tmp_path / "adapter").glob("*.safetensors"))
    assert len(shards) > 2
    again = FaceAdapter.from_pretrained(tmp_path / "adapter", torch_dtype=torch.bfloat16)
    assert_same(again.state_dict(), state)
    shards[1].unlink()
    with pytest.raises(ValueError, match=r"\d+ missing: "):
        FaceAdapter.from_pretrained(tmp_path / "adapter")
    adapter.save_pretrained(tmp_path / "half", variant="bf16")
    again = FaceAdapter.from_pretrained(tmp_path / "half", variant="bf16", torch_dtype=torch.bfloat16)
    assert_same(again.state_dict(), state)


def test_loading_info_is_given_on_request(tmp_path, state):
    FaceAdapter.from_single_file(write(tmp_path, state)).save_pretrained(tmp_path / "adapter")
    adapter, info = FaceAdapter.from_pretrained(tmp_path / "adapter", output_loading_info=True)
    assert isinstance(adapter, FaceAdapter) and not info["missing_keys"]


def test_a_folder_of_one_branch_out_and_in(tmp_path, state):
    adapter = FaceAdapter.from_single_file(write(tmp_path, single(state, "sig")), branch="sig")
    adapter.save_pretrained(tmp_path / "adapter")
    again = FaceAdapter.from_pretrained(tmp_path / "adapter", torch_dtype=torch.bfloat16)
    assert again.branches == ("sig",)
    assert_same(again.state_dict(), adapter.state_dict())


def test_the_hub_and_back_is_bit_equal(tmp_path, state, monkeypatch):
    store = HubStore(tmp_path / "hub", monkeypatch)
    adapter = FaceAdapter.from_single_file(write(tmp_path, state))
    adapter.push_to_hub("someone/adapter")
    assert {"config.json", "diffusion_pytorch_model.safetensors"} <= set(store.files("someone/adapter"))
    again = FaceAdapter.from_pretrained("someone/adapter", torch_dtype=torch.bfloat16)
    assert_same(again.state_dict(), state)
