"""What a run needs on each GPU, computed: parameters and saved tensors are counted on the meta device.

Nothing is loaded and nothing runs. Not in it: CUDA's context and workspaces (about 1 GB), fragmentation, the
recogniser, and data workers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, SiglipVisionConfig, SiglipVisionModel, T5Config
from transformers import T5EncoderModel as T5

from withanyone import FaceAdapter

from .config import TrainConfig, load_config
from .step import AdapterStep

GB = 1e9
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}  # reckoned for GPUs
STATES = {"adamw": 8, "adamw_fused": 8, "adamw8bit": 2, "muon": 4}  # bytes a parameter
STRATEGIES = ("one", "ddp", "fsdp2", "zero2")
FLUX_DEV = "flux.1-dev"


@dataclass
class Parts:
    """The networks on the meta device."""

    transformer: FluxTransformer2DModel
    vae: AutoencoderKL
    encoders: list[nn.Module]
    adapter: FaceAdapter


def flux_dev(config: TrainConfig) -> Parts:
    """FLUX.1 [dev] with the released adapter's sizes, from the sizes that its public configs state."""
    with torch.device("meta"):
        text = T5Config(
            d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, vocab_size=32128,
            feed_forward_proj="gated-gelu",
        )  # fmt: skip
        clip = CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
        )
        siglip = SiglipVisionConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            image_size=256, patch_size=16,
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), latent_channels=16, layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            use_quant_conv=False, use_post_quant_conv=False,
        )  # fmt: skip
        transformer = FluxTransformer2DModel(guidance_embeds=True)
        adapter = FaceAdapter(
            inner_dim=config.adapter_inner_dim, num_id_tokens=config.adapter_num_id_tokens,
            branches=("arc", "sig") if config.branches == "both" else (config.branches,),
        )  # fmt: skip
        return Parts(transformer, vae, [T5(text), CLIPTextModel(clip), SiglipVisionModel(siglip)], adapter)


def from_folder(pretrained: str, config: TrainConfig) -> Parts:
    """The networks of a pipeline folder whose VAE is an AutoencoderKL or says its own class."""
    import importlib

    folder = Path(pretrained)
    index = json.loads((folder / "model_index.json").read_text())
    with torch.device("meta"):
        library, name = index["vae"]
        kind = getattr(importlib.import_module(library), name)
        vae = kind.from_config(kind.load_config(folder / "vae"))
        transformer = FluxTransformer2DModel.from_config(
            FluxTransformer2DModel.load_config(folder / "transformer")
        )
        encoders = [
            model(model.config_class.from_pretrained(folder / part))
            for model, part in ((CLIPTextModel, "text_encoder"), (T5, "text_encoder_2"),
                                (SiglipVisionModel, "image_encoder"))
        ]  # fmt: skip
        base = transformer.config
        adapter = FaceAdapter(
            hidden_size=base.num_attention_heads * base.attention_head_dim,
            num_blocks=base.num_layers + base.num_single_layers,
            inner_dim=config.adapter_inner_dim,
            image_feature_dim=encoders[2].config.hidden_size,
            num_id_tokens=config.adapter_num_id_tokens,
            pixels_per_token=2 * vae_factor(vae),
            branches=("arc", "sig") if config.branches == "both" else (config.branches,),
        )
    return Parts(transformer, vae, encoders, adapter)


def vae_factor(vae: nn.Module) -> int:
    """Pixels of a latent's side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


# --- counting --------------------------------------------------------------------------------------------


def parameters_of(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


@contextlib.contextmanager
def counting_saved(modules: list[nn.Module]) -> Iterator[Callable[[], int]]:
    """Bytes that autograd keeps for the backward pass inside the block, the modules' own weights aside.

    Attention is counted as flash attention keeps it: its inputs, its output and a number a row.
    """
    own = {p.untyped_storage()._cdata for module in modules for p in module.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in own:
            kept[key] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    attention = mock.patch("torch.nn.functional.scaled_dot_product_attention", _FlashLike.of)
    with hooks, attention:
        yield lambda: sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


class _FlashLike(torch.autograd.Function):
    """Keeps what flash attention keeps; the values are of no interest."""

    @staticmethod
    def of(query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: object) -> Tensor:
        return _FlashLike.apply(query, key, value)

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # noqa: ANN001
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN001
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


def saved_by_step(
    parts: Parts, batch: int, width: int, height: int, text: int, faces: int, checkpointing: bool
) -> int:
    """Bytes kept by transformer and adapter for the backward pass of `batch` samples."""
    transformer, adapter = parts.transformer, parts.adapter
    transformer.requires_grad_(False)
    adapter.requires_grad_(True).attach(transformer)
    side = adapter.config.pixels_per_token
    columns, rows = width // side, height // side
    config = transformer.config
    dtype = transformer.dtype
    boxes = [[(i * width / faces, 0, (i + 0.5) * width / faces, height / 2) for i in range(faces)]] * batch

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, device="meta", dtype=dtype)

    encoder = parts.encoders[2].config
    features = ((encoder.image_size // encoder.patch_size) ** 2, adapter.config.image_feature_dim)
    inputs = {
        "hidden_states": meta(batch, columns * rows, config.in_channels),
        "timestep": meta(batch),
        "encoder_hidden_states": meta(batch, text, config.joint_attention_dim),
        "pooled_projections": meta(batch, config.pooled_projection_dim),
        "img_ids": meta(columns * rows, 3),
        "txt_ids": meta(text, 3),
        "guidance": meta(batch) if config.guidance_embeds else None,
    }
    scale = torch.full((batch,), 0.5)
    given = {"id_scale": scale if "arc" in adapter.branches else 0.0,
             "siglip_scale": scale if "sig" in adapter.branches else 0.0}  # fmt: skip
    people = {
        "embeddings": meta(batch, faces, adapter.config.embedding_dim, dtype=adapter.dtype),
        "image_features": meta(batch, faces, *features, dtype=adapter.dtype),
        "bboxes": boxes, "height": height, "width": width, **given,
    }  # fmt: skip
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    else:
        transformer.disable_gradient_checkpointing()
    transformer.train(checkpointing)
    with counting_saved([transformer, adapter]) as total:
        out = AdapterStep(adapter, transformer)(people, inputs)
        bytes_kept = total()
    del out
    return bytes_kept


def saved_by_decoder(vae: nn.Module, pictures: int, width: int, height: int) -> int:
    """Bytes kept by decoding `pictures` for the identity losses."""
    factor = vae_factor(vae)
    channels = vae.config.latent_channels
    latents = torch.empty(
        pictures, channels, height // factor, width // factor, device="meta", dtype=vae.dtype
    )
    vae.requires_grad_(False)
    with counting_saved([vae]) as total:
        out = vae.decode(latents.requires_grad_(True), return_dict=False)[0]
        kept = total()
    del out
    return kept


# --- the table -------------------------------------------------------------------------------------------


def estimate(config: TrainConfig, parts: Parts, strategy: str, processes: int) -> dict[str, float]:
    """Bytes on each GPU, by what they are for."""
    if strategy not in STRATEGIES:
        raise ValueError(f"`strategy` must be one of {', '.join(STRATEGIES)}, got {strategy!r}.")
    trained = parameters_of(parts.adapter)
    spread = {"one": 1, "ddp": 1, "fsdp2": processes, "zero2": processes}[strategy]
    weights = 4 * trained / (processes if strategy == "fsdp2" else 1)
    gathered = 2 * trained if strategy == "fsdp2" else 0  # the whole adapter in bf16 while a step runs
    ema = 0 if config.ema_decay is None else 4 * trained / (processes if strategy == "fsdp2" else 1)
    buckets = [
        (b[0], b[1], (b[2] if len(b) > 2 else config.train_batch_size) / processes) for b in config.buckets
    ]
    width, height, batch = max(buckets, key=lambda b: b[0] * b[1] * b[2])
    batch = max(1, int(batch))
    text = max(config.text_lengths, default=512)
    dtype = torch.bfloat16 if config.mixed_precision != "no" else torch.float32
    parts.transformer.to(dtype), parts.adapter.to(dtype), parts.vae.to(dtype)
    faces = min(2, config.max_faces)
    step = saved_by_step(parts, batch, width, height, text, faces, config.gradient_checkpointing)
    if config.gradient_checkpointing:  # and one block is computed again, with all that it keeps
        whole = saved_by_step(parts, batch, width, height, text, faces, False)
        blocks = parts.transformer.config.num_layers + parts.transformer.config.num_single_layers
        step += 2 * whole / blocks
    decoded = min(config.id_faces_per_step, batch) if config.uses_identity_losses else 0
    return {
        "frozen transformer": parameters_of(parts.transformer) * BYTES[config.frozen_dtype],
        "frozen encoders": parameters_of(*parts.encoders) * BYTES[config.frozen_dtype],
        "VAE": parameters_of(parts.vae) * 4,
        "adapter": weights + gathered,
        "gradients": 4 * trained / spread,
        "optimiser": STATES[config.optimizer] * trained / spread,
        "moving average": ema,
        "kept for backward": step,
        "decoding for identity": saved_by_decoder(parts.vae, decoded, width, height) if decoded else 0,
    }


def table(rows: dict[str, dict[str, float]]) -> str:
    """Estimates as Markdown, in GB."""
    names = list(next(iter(rows.values())))
    lines = ["| GB on each GPU | " + " | ".join(rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for name in names:
        lines.append(f"| {name} | " + " | ".join(f"{row[name] / GB:.1f}" for row in rows.values()) + " |")
    lines.append("| **sum** | " + " | ".join(f"**{sum(r.values()) / GB:.1f}**" for r in rows.values()) + " |")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a phase file")
    parser.add_argument(
        "--pretrained", default=FLUX_DEV, help=f"pipeline folder (default: {FLUX_DEV}'s sizes)"
    )
    parser.add_argument("--processes", type=int, default=8, help="GPUs (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", help="key=value")


def run(args: argparse.Namespace) -> str:
    """What a run needs on each GPU, computed on the meta device."""
    config = load_config(args.config, args.overrides)
    rows = {}
    for strategy in STRATEGIES:
        processes = 1 if strategy == "one" else args.processes
        parts = flux_dev(config) if args.pretrained == FLUX_DEV else from_folder(args.pretrained, config)
        label = "one GPU" if strategy == "one" else f"{strategy} x {processes}"
        rows[label] = estimate(config, parts, strategy, processes)
    return table(rows)
