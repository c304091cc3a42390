"""Machines the page runs on, as data: how the model is placed for the memory there is.

WITHANYONE_MODEL          a pipeline folder or Hub id; without it the bundled miniature
WITHANYONE_ADAPTER        withanyone.safetensors, where the model is plain FLUX.1
WITHANYONE_FACE_PACK      the folder of the face models (antelopev2), likewise
WITHANYONE_IMAGE_ENCODER  the SigLIP model, likewise
WITHANYONE_MEMORY         a key of MACHINES, such as 16: gigabytes of the GPU; without it, what the GPU has
WITHANYONE_SAFETY_CHECKER the standard safety checker's folder or Hub id: pictures it flags are withheld
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from withanyone.cli import load_pipeline, pick_device
from withanyone.mini import PRETRAINED

if TYPE_CHECKING:
    import torch

    from withanyone import WithAnyonePipeline


@dataclass(frozen=True)
class Machine:
    """How FLUX.1's parts are held.

    transformer, text_encoder_2: "bfloat16", or weights in 8 bits ("int8", by torchao) or 4 ("nf4", by
        bitsandbytes).
    offload: "none"; "model" (one part at a time on the GPU); "group" (one layer at a time: least memory,
        slowest).
    tiled_vae: decode in tiles. previews: show pictures as they form; decoding a preview on an offloaded model
    would move the transformer out and in again at each step, so those go without.
    gigabytes: what the weights on the GPU weigh at most at one time, reckoned from their sizes (FLUX.1's
    transformer 11.9 billion weights, T5 4.7, the adapter's denoising part 0.54): not a measurement.
    """

    transformer: str
    text_encoder_2: str
    offload: str
    tiled_vae: bool
    previews: bool
    gigabytes: float


MACHINES: dict[str, Machine] = {
    "full": Machine("bfloat16", "bfloat16", "none", False, True, 36.0),
    "24": Machine("int8", "int8", "none", False, True, 18.5),
    "16": Machine("int8", "bfloat16", "model", False, False, 13.1),
    "12": Machine("nf4", "int8", "model", True, False, 8.2),
    "8": Machine("bfloat16", "bfloat16", "group", True, False, 4.0),
}


def machine_for(memory: str | None, total_gigabytes: float | None) -> Machine:
    """The machine named by WITHANYONE_MEMORY, or the largest that fits into the GPU's memory."""
    if memory:
        if memory not in MACHINES:
            raise ValueError(
                f"WITHANYONE_MEMORY is {memory!r}: give one of {', '.join(MACHINES)} (gigabytes)."
            )
        return MACHINES[memory]
    if total_gigabytes is None or total_gigabytes >= 40:
        return MACHINES["full"]
    for name in ("24", "16", "12"):
        if total_gigabytes >= int(name) - 1:  # a 24 GB card reports a little less
            return MACHINES[name]
    return MACHINES["8"]


@dataclass(frozen=True)
class Settings:
    """What the environment says: see this module's docstring."""

    model: str = str(PRETRAINED)
    adapter: str | None = None
    face_pack: str | None = None
    image_encoder: str | None = None
    memory: str | None = None
    safety_checker: str | None = None
    public: bool = False  # a Space: its proxy names the visitor, pictures carry a visible mark by default
    zero_gpu: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        env = os.environ if environment is None else environment
        return cls(
            model=env.get("WITHANYONE_MODEL") or str(PRETRAINED),
            adapter=env.get("WITHANYONE_ADAPTER") or None,
            face_pack=env.get("WITHANYONE_FACE_PACK") or None,
            image_encoder=env.get("WITHANYONE_IMAGE_ENCODER") or None,
            memory=env.get("WITHANYONE_MEMORY") or None,
            safety_checker=env.get("WITHANYONE_SAFETY_CHECKER") or None,
            public=bool(env.get("SPACE_ID")),
            zero_gpu=bool(env.get("SPACES_ZERO_GPU")),
        )


def load(settings: Settings) -> tuple[WithAnyonePipeline, bool]:
    """The pipeline, placed; and whether previews are cheap on it.

    The miniature, and any model on a machine without CUDA, is loaded as it is; on a CPU that computes in
    bfloat16, in bfloat16.
    """
    import torch

    parts = {
        "adapter": settings.adapter,
        "face_pack": settings.face_pack,
        "image_encoder": settings.image_encoder,
    }
    if settings.zero_gpu or not torch.cuda.is_available() or settings.model == str(PRETRAINED):
        device = "cuda" if settings.zero_gpu else None
        return load_pipeline(settings.model, device=device, dtype="auto", **parts), True
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    machine = machine_for(settings.memory, total)
    pipe = load_pipeline(settings.model, device="cpu", dtype="bfloat16", **parts)
    place(pipe, machine, pick_device("cuda"))
    return pipe, machine.previews


def place(pipe: WithAnyonePipeline, machine: Machine, device: torch.device) -> None:
    """Quantise and offload a pipeline that lies in main memory, as the machine says."""
    import torch

    for name in ("transformer", "text_encoder_2"):
        quantise(getattr(pipe, name), getattr(machine, name), device)
    if machine.tiled_vae and hasattr(pipe.vae, "enable_tiling"):
        pipe.vae.enable_tiling()
    if machine.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif machine.offload == "group":
        stream = torch.device(device).type == "cuda"
        pipe.enable_group_offload(
            torch.device(device), offload_type="leaf_level", use_stream=stream, exclude_modules="vae"
        )
    else:
        pipe.to(device)


def quantise(module: torch.nn.Module, weights: str, device: torch.device | str) -> None:
    """Turn the linear layers' weights of `module` into "int8" or "nf4", in place; "bfloat16" leaves them."""
    if weights == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(module, Int8WeightOnlyConfig())
    elif weights == "nf4":
        _to_nf4(module, device)
    elif weights != "bfloat16":
        raise ValueError(f"`weights` is {weights!r}: give bfloat16, int8 or nf4.")


def _to_nf4(module: Any, device: torch.device | str) -> None:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(
            "4-bit weights need the package bitsandbytes (pip install bitsandbytes), or choose another "
            "WITHANYONE_MEMORY."
        ) from error
    import torch

    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is torch.nn.Linear:
                small = bitsandbytes.nn.Linear4bit(
                    layer.in_features,
                    layer.out_features,
                    bias=layer.bias is not None,
                    compute_dtype=torch.bfloat16,
                    quant_type="nf4",
                )
                small.load_state_dict(layer.state_dict())
                setattr(parent, name, small.to(device).to("cpu"))
