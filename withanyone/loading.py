"""Loading and saving of WithAnyonePipeline: folders, Hub repositories, other pipelines.

diffusers' own loading knows the components of diffusers and transformers. What is added here makes our
components work from everywhere, says clearly what a folder lacks, and never reads a pickle.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from .checkpoint import open_safetensors, refuse_pickles

FACE_COMPONENTS = ("face_adapter", "face_analyzer", "image_encoder", "feature_extractor")
# What a part's folder has to hold, one file of each group. Without it some libraries make a part up.
_MODEL_FILES = (("config.json",), ("*.safetensors",))
_TOKENIZER_FILES = (("tokenizer.json", "vocab.json", "spiece.model"),)
PART_FILES: dict[str, tuple[tuple[str, ...], ...]] = {
    "face_adapter": _MODEL_FILES,
    "image_encoder": _MODEL_FILES,
    "text_encoder": _MODEL_FILES,
    "text_encoder_2": _MODEL_FILES,
    "tokenizer": _TOKENIZER_FILES,
    "tokenizer_2": _TOKENIZER_FILES,
    "transformer": _MODEL_FILES,
    "vae": _MODEL_FILES,
}
# Never fetched: pickles and other frameworks' weights, and half-precision doubles that nobody asked for.
FOREIGN_WEIGHTS = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5"]
VARIANTS = ["*.fp16.*", "*.bf16.*", "*.fp16-*", "*.bf16-*"]


class LoadingMixin(DiffusionPipeline):
    """Loading and saving for a pipeline that has components of this package."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """Load a pipeline folder or Hub id; arguments as in `DiffusionPipeline.from_pretrained`.

        Any FLUX.1 folder will do where the parts that it lacks are given: `face_adapter=`, `face_analyzer=`,
        `image_encoder=`, `feature_extractor=` (None for a pipeline that goes without).

        Raises:
            ValueError: no pipeline there, or a part is missing or damaged; the message names it.
        """
        refuse_pickles(kwargs)
        source = os.path.expanduser(os.fspath(pretrained_model_name_or_path))
        if os.path.isdir(source):
            folder = source
        elif source.count("/") != 1 or source.startswith((".", "/")):
            raise ValueError(f"`{source}` is neither a folder nor a Hub id (owner/name); check the path.")
        else:
            folder = cls.download(source, **kwargs)
        index = read_index(folder, cls.config_name, source)
        parts = check_parts(
            index, folder, source, given=kwargs.keys(), needed=cls._get_signature_keys(cls)[0]
        )
        for library in own_modules(index):
            # diffusers looks only in modules that are imported already.
            importlib.import_module(library)
        pipeline = super().from_pretrained(folder, **kwargs)
        if kwargs.get("device_map") is None:
            check_weights({name: getattr(pipeline, name) for name in parts}, source)
        pipeline.register_to_config(_name_or_path=source)
        return pipeline

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs) -> str:
        """Fetch the pipeline in a Hub repository and return its local folder.

        Parts given in `kwargs` are left out. diffusers' own `download` refuses components of other
        libraries, and takes a repository with `*.onnx` files for one without safetensors.
        """
        hub = ("cache_dir", "force_download", "local_files_only", "token", "revision")
        hub_kwargs = {name: kwargs[name] for name in hub if kwargs.get(name) is not None}
        try:
            folder = snapshot_download(pretrained_model_name, allow_patterns=[cls.config_name], **hub_kwargs)
            index = read_index(folder, cls.config_name, pretrained_model_name)
            folders = [f"{name}/*" for name in sorted(parts_of(index).keys() - kwargs.keys())]
            return snapshot_download(
                pretrained_model_name,
                allow_patterns=[cls.config_name, *folders],
                ignore_patterns=FOREIGN_WEIGHTS + ([] if kwargs.get("variant") else VARIANTS),
                **hub_kwargs,
            )
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            raise ValueError(
                f"`{pretrained_model_name}` is no folder here, and could not be had from the Hub ({error}). "
                "Check the name, and for a gated model that you are logged in (`hf auth login`)."
            ) from error

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> Any:
        """As `ConfigMixin.load_config`; a class recorded with its file (`save_config`) is this one."""
        loaded = super().load_config(pretrained_model_name_or_path, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if isinstance(config.get("_class_name"), list):
            config["_class_name"] = config["_class_name"][1]
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """As `DiffusionPipeline.save_pretrained`, which with `push_to_hub=True` takes no path objects."""
        super().save_pretrained(os.fspath(save_directory), *args, **kwargs)

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Write model_index.json, and a pipeline.py of a few lines.

        By the latter `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` finds this class in
        a folder on the disk; given a Hub id, diffusers' own `download` takes no components of ours.
        """
        super().save_config(save_directory)
        file = os.path.join(save_directory, self.config_name)
        index = read_index(save_directory, self.config_name, str(save_directory))
        index["_class_name"] = ["pipeline", type(self).__name__]
        with open(file, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(index, indent=2, sort_keys=True) + "\n")
        with open(os.path.join(save_directory, "pipeline.py"), "w", encoding="utf-8") as stream:
            for library in own_modules(index):
                stream.write(f"import {library}  # noqa: F401\n")
            stream.write(f"from {type(self).__module__} import {type(self).__name__}  # noqa: F401\n")
        if push_to_hub:
            raise ValueError(
                "`push_to_hub` of a config alone is of no use; call `pipeline.push_to_hub(repo_id)`."
            )

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs):
        """A pipeline on another's components, without copies: `from_pipe(flux_pipeline, face_adapter=...)`.

        Unlike diffusers' own, it takes every component as it is and keeps the transformer's dtype, unless
        `dtype` says otherwise.
        """
        names, _ = cls._get_signature_keys(cls)
        components = {name: part for name, part in pipeline.components.items() if name in names}
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", pipeline.transformer.dtype)
        return super().from_pipe(pipeline, **{**components, **kwargs})


def read_index(folder: str | os.PathLike, name: str, source: str) -> dict[str, Any]:
    """The index of a pipeline folder; `source` is what the caller calls the folder."""
    file = os.path.join(folder, name)
    if not os.path.isfile(file):
        raise ValueError(
            f"`{source}` is not a pipeline: it has no {name}. Give a folder that `save_pretrained` wrote, or "
            "the Hub id of a pipeline."
        )
    with open(file, encoding="utf-8") as stream:
        try:
            return json.load(stream)
        except ValueError as error:
            raise ValueError(f"`{source}` has a broken {name} ({error}); get or save it again.") from error


def parts_of(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The components that an index says are there: name -> (library, class)."""
    lists = {name: value for name, value in index.items() if isinstance(value, list) and name[0] != "_"}
    return {name: tuple(value) for name, value in lists.items() if len(value) == 2 and value[0] is not None}


def own_modules(index: Mapping[str, Any]) -> list[str]:
    """Modules of this package that hold components of an index."""
    package = __name__.partition(".")[0]
    return sorted(
        {library for library, _ in parts_of(index).values() if library.partition(".")[0] == package}
    )


def check_parts(
    index: Mapping[str, Any], folder: str, source: str, given: Collection[str], needed: Collection[str]
) -> list[str]:
    """Names of the parts to be loaded from `folder`.

    Raises:
        ValueError: a needed part is neither in the index nor given, or its folder is not there, lacks a
            file, or has weights that are cut off.
    """
    missing = [name for name in needed if name not in index and name not in given]
    if missing:
        for_faces = all(name in FACE_COMPONENTS for name in missing)
        raise ValueError(
            f"`{source}` lacks {', '.join(f'`{name}`' for name in missing)}. Give what is missing: "
            f"`from_pretrained(..., {', '.join(f'{name}=...' for name in missing)})`"
            + ("; None for what shall be left out." if for_faces else ".")
        )
    parts = [name for name in parts_of(index) if name in needed and name not in given]
    for name in parts:
        part = Path(folder) / name
        remedy = f"Get or save the pipeline again, or give `{name}=...`."
        if not part.is_dir():
            raise ValueError(f"`{source}` lacks the folder of its `{name}`. {remedy}")
        for files in PART_FILES.get(name, ()):
            if not any(any(part.glob(file)) for file in files):
                raise ValueError(f"`{source}` has no {' or '.join(files)} in its `{name}`. {remedy}")
        for file in part.glob("*.safetensors"):
            with open_safetensors(file):
                pass
    return parts


def check_weights(parts: Mapping[str, Any], source: str) -> None:
    """ValueError where a model's files held no values for some of its weights."""
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            absent = [key for key, weight in part.state_dict().items() if weight.device.type == "meta"]
            if absent:
                raise ValueError(
                    f"`{source}` has a `{name}` whose files lack {len(absent)} of its weights, such as "
                    f"{absent[0]}. Get or save the pipeline again, or give `{name}=...`."
                )
