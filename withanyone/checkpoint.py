"""Single-file checkpoints: the released layout and single-branch ones, read strictly, and written.

The adapter's own parameter names are those of `withanyone.safetensors`, as released on the Hub in
WithAnyone/WithAnyone:

    ipa_arc.{i}.*  ipa_sig.{i}.*  arcface_in_arc.*  arcface_in_sig.*  siglip_in_sig.*

A training checkpoint of one branch has `ipa.*`, `arcface_in.*`, `siglip_in.*` without the suffix. Tensors
only, safetensors only: a pickle is refused.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

HEAD_DIM = 64  # of all released weights, whose files do not say: they have rows of to_q over 64 heads
# What shapes do not tell, in the metadata of files that `write_single_file` wrote.
_METADATA = ("head_dim", "pixels_per_token")
_PARTS = ("ipa", "arcface_in", "siglip_in")
_MAX_NAMED = 20  # keys listed in an error


@dataclass(frozen=True)
class Loaded:
    """A file's tensors under the adapter's names, those that nothing uses, and what its metadata says."""

    tensors: dict[str, torch.Tensor]
    unused: dict[str, torch.Tensor]
    branches: tuple[str, ...]
    config: dict = field(default_factory=dict)


def refuse_pickles(kwargs: dict[str, Any]) -> None:
    """Let a `from_pretrained` of diffusers read safetensors only; by itself it falls back on pickles."""
    if kwargs.get("use_safetensors") is None:
        kwargs["use_safetensors"] = True
    if not kwargs["use_safetensors"]:
        raise ValueError(
            "`use_safetensors` is False, but pickled weights are never read; convert them first."
        )


def read_single_file(path: str | os.PathLike, branch: str | None = None) -> Loaded:
    """Read `path`, a merged file, or with `branch` (`"arc"` or `"sig"`) a single-branch one.

    Raises:
        ValueError: no such file, a pickle, not safetensors, cut off, or a `branch` that does not go with it.
    """
    if branch not in (None, "arc", "sig"):
        raise ValueError(
            f"`branch` is {branch!r}; give 'arc' or 'sig', or None for a file with both branches."
        )
    tensors, metadata = read_safetensors(path)
    single = any(_split(key)[0] in _PARTS for key in tensors)
    if single and branch is None:
        raise ValueError(
            f"`{path}` holds one branch and does not say which (`ipa.*`); give `branch='arc'` or "
            "`branch='sig'`."
        )
    if branch is not None and any(key.startswith(("ipa_arc.", "ipa_sig.")) for key in tensors):
        raise ValueError(f"`{path}` holds both branches (`ipa_arc.*`, `ipa_sig.*`); leave `branch` out.")
    if branch is not None:
        tensors = {_add_suffix(key, branch): tensor for key, tensor in tensors.items()}
    unused = {key: tensor for key, tensor in tensors.items() if key.startswith("siglip_in_arc.")}
    used = {key: tensor for key, tensor in tensors.items() if key not in unused}
    branches = ("arc", "sig") if branch is None else (branch,)
    return Loaded(used, unused, branches, _metadata_config(metadata, path))


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata; a ValueError says what else the file is."""
    with open_safetensors(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def open_safetensors(path: str | os.PathLike) -> safe_open:
    """A safetensors file, its header read and its length checked; a ValueError says what else it is."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"`{path}` is not a file; give the path of a `.safetensors` file, for the released weights "
            "`huggingface_hub.hf_hub_download('WithAnyone/WithAnyone', 'withanyone.safetensors')`."
        )
    with path.open("rb") as file:
        start = file.read(8)
    if start == b"version ":
        raise ValueError(f"`{path}` is a Git LFS pointer, not the weights themselves; run `git lfs pull`.")
    if start[:4] == b"PK\x03\x04" or (
        start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    ):
        raise ValueError(
            f"`{path}` is a pickle (a torch.save file), which can run code and is never loaded; convert it "
            "to safetensors where you trust it."
        )
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"`{path}` is not a whole safetensors file ({error}); it may be cut off, so get it again."
        ) from error


def infer_config(loaded: Loaded) -> dict:
    """The adapter's config read from tensor shapes: width, blocks, heads, token counts, feature widths.

    Where keys disagree the most common size wins, so that `check_shapes` names the odd ones.
    """
    shapes = shapes_of(loaded.tensors)
    hidden_size = _common(shapes, r"ipa_(arc|sig)\.\d+\.norm[12]\.(weight|bias)", 0)
    if hidden_size is None:
        raise ValueError(
            "The file holds no adapter: no key like `ipa_arc.0.norm1.weight` is there, but "
            f"{_list(sorted(shapes)) or 'none at all'}."
        )
    inner_dim = _common(shapes, r"ipa_(arc|sig)\.\d+\.to_q\.weight", 0) or hidden_size // 2
    blocks = {int(m.group(1)) for key in shapes if (m := re.match(r"ipa_(?:arc|sig)\.(\d+)\.", key))}
    # Up to the last block, so that one in between that is missing is named; unless few of those are there.
    num_blocks = max(blocks) + 1 if max(blocks) < 2 * len(blocks) else len(blocks)
    head_dim = loaded.config.get("head_dim", HEAD_DIM)
    id_out = _common(shapes, r"arcface_in_(arc|sig)\.3\.(weight|bias)", 0) or 8 * hidden_size
    image_out = _common(shapes, r"siglip_in_sig\.3\.(weight|bias)", 0) or hidden_size
    config = {
        "hidden_size": hidden_size,
        "num_blocks": num_blocks,
        "inner_dim": max(1, inner_dim // head_dim) * head_dim,
        "head_dim": head_dim,
        "embedding_dim": _common(shapes, r"arcface_in_(arc|sig)\.0\.weight", 1) or 512,
        "image_feature_dim": _common(shapes, r"siglip_in_sig\.0\.weight", 1) or 768,
        "num_id_tokens": max(1, id_out // hidden_size),
        "id_hidden_size": _common(shapes, r"arcface_in_(arc|sig)\.([02]\.(weight|bias))", 0)
        or 4 * hidden_size,
        "image_hidden_size": _common(shapes, r"siglip_in_sig\.([02]\.(weight|bias))", 0) or hidden_size,
        "tokens_per_image_feature": max(1, image_out // hidden_size),
        "branches": loaded.branches,
    }
    if "pixels_per_token" in loaded.config:
        config["pixels_per_token"] = loaded.config["pixels_per_token"]
    return config


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a folder that diffusers wrote, by the files' headers alone."""
    paths = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    if not paths:
        raise ValueError(
            f"`{folder}` has no diffusion_pytorch_model.safetensors; get or save the adapter again."
        )
    shapes = {}
    for path in paths:
        with open_safetensors(path) as file:
            shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    return shapes


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def check_shapes(
    shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """Raise a ValueError that names every missing, unexpected and misshapen key of `source`."""
    misshapen = [
        f"{key} {shapes[key]} instead of {expected[key]}"
        for key in sorted(shapes.keys() & expected.keys())
        if shapes[key] != expected[key]
    ]
    check_keys(expected.keys() - shapes.keys(), shapes.keys() - expected.keys(), source, misshapen)


def check_keys(
    missing: Collection[str], unexpected: Collection[str], source: str, misshapen: Collection[str] = ()
) -> None:
    """Raise a ValueError that names all keys at fault in `source`, if there are any."""
    found = {"missing": sorted(missing), "unexpected": sorted(unexpected), "of another shape": misshapen}
    problems = [f"{len(keys)} {what}: {_list(list(keys))}" for what, keys in found.items() if keys]
    if problems:
        raise ValueError(
            f"{source} does not hold the weights of a face adapter. Keys {'; '.join(problems)}. Get them "
            "again, or give `branch` where a single file holds one branch."
        )


def merge(arc: Loaded, sig: Loaded, arc_source: str, sig_source: str) -> Loaded:
    """One set of tensors of two single-branch files; a ValueError where they belong to different bases."""
    configs = infer_config(arc), infer_config(sig)
    shared = ("hidden_size", "num_blocks", "inner_dim", "embedding_dim", "num_id_tokens", "id_hidden_size")
    for name in (*shared, *_METADATA):
        values = [config.get(name) for config in configs]
        if values[0] != values[1] and None not in values:  # None: one file's metadata does not say
            raise ValueError(
                f"The branches do not go together: `{name}` is {values[0]} in {arc_source} and {values[1]} "
                f"in {sig_source}; merge two branches trained on the same base."
            )
    return Loaded(
        {**arc.tensors, **sig.tensors}, {**arc.unused, **sig.unused}, ("arc", "sig"), arc.config | sig.config
    )


def write_single_file(
    path: str | os.PathLike,
    tensors: Mapping[str, torch.Tensor],
    unused: Mapping[str, torch.Tensor],
    config: Mapping,
) -> None:
    """Write the released layout, dtypes kept: both branches with suffixes, a single branch without.

    `config` goes into the metadata. The file appears whole or not at all.
    """
    branches = tuple(config["branches"])
    tensors = {**tensors, **{key: tensor for key, tensor in unused.items() if key not in tensors}}
    if len(branches) == 1:
        tensors = {_drop_suffix(key): tensor for key, tensor in tensors.items()}
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(
        {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()},
        partial,
        metadata={"format": "pt", "config": json.dumps(public)},
    )
    os.replace(partial, path)


def _split(key: str) -> tuple[str, str]:
    part, _, rest = key.partition(".")
    return part, rest


def _add_suffix(key: str, branch: str) -> str:
    part, rest = _split(key)
    return f"{part}_{branch}.{rest}" if part in _PARTS else key


def _drop_suffix(key: str) -> str:
    part, rest = _split(key)
    return f"{part.removesuffix('_arc').removesuffix('_sig')}.{rest}"


def _metadata_config(metadata: Mapping[str, str], path: str | os.PathLike) -> dict[str, int]:
    """What the metadata says of sizes that shapes do not tell; other tools' settings are passed over."""
    if "config" not in metadata:
        return {}
    try:
        config = json.loads(metadata["config"])
    except ValueError as error:
        raise ValueError(f"`{path}` has a `config` in its metadata that is not JSON ({error}).") from error
    sizes = {name: config[name] for name in _METADATA if name in config} if isinstance(config, dict) else {}
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ValueError(f"`{path}` has `{name}` {size!r} in its metadata; it has to be 1 or more.")
    return sizes


def _common(shapes: Mapping[str, tuple[int, ...]], pattern: str, axis: int) -> int | None:
    """The most common size along `axis` among tensors whose name matches; None where there is none."""
    sizes = Counter(
        shape[axis] for key, shape in shapes.items() if len(shape) > axis and re.fullmatch(pattern, key)
    )
    return sizes.most_common(1)[0][0] if sizes else None


def _list(keys: list[str]) -> str:
    rest = len(keys) - _MAX_NAMED
    return ", ".join(keys[:_MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")
