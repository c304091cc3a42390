"""FLUX.1 [dev] at full size on a GPU, with random weights: what a step takes, in time and in memory.

    python -m benchmarks.gpu                    # everything; --json FILE keeps the figures
    python -m benchmarks.gpu --only agreement   # a small random FLUX: CUDA's results beside the CPU's

Times are medians of CUDA events after a warm-up. Faces: two people whose boxes lie over about a quarter of
the picture, both branches on. Training: one optimiser step of the adapter alone at 512 px, gradient
checkpointing on, velocity loss, AdamW in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import nn

from benchmarks.adapter import BBOXES, SCALE, SIZE
from withanyone.adapter import CONDITIONING_KEY, FaceAdapter
from withanyone.conditioning import FaceConditioning
from withanyone.layout import scale_bboxes
from withanyone.mini.base import Optimizers
from withanyone.precision import avoid_cudnn_attention

DEV = {"guidance_embeds": True}  # all else of FLUX.1 [dev] is the class's default
SMALL = {
    "num_layers": 2, "num_single_layers": 4, "attention_head_dim": 64, "num_attention_heads": 4,
    "joint_attention_dim": 128, "pooled_projection_dim": 128, "axes_dims_rope": (16, 24, 24),
}  # fmt: skip
TEXT_TOKENS = 512
GIB = 2**30


def random_weights(module: nn.Module, device: str, dtype: torch.dtype) -> nn.Module:
    """`module`, made on the meta device, with normal weights of an untrained network's size."""
    module = module.to(dtype).to_empty(device=device)
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)  # of a norm
    return module.eval()


def build(
    device: str, dtype: torch.dtype, config: dict, **adapter: int
) -> tuple[FluxTransformer2DModel, FaceAdapter]:
    """A random transformer, and a random adapter that fits it."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**config)
        faces = FaceAdapter(**adapter)
    transformer = random_weights(transformer, device, dtype)
    faces = random_weights(faces, device, dtype)
    return transformer, faces


def inputs_of(
    transformer: FluxTransformer2DModel, size: int, batch_size: int = 1, text: int = TEXT_TOKENS
) -> tuple[dict, tuple]:
    """A call's inputs for square pictures of `size` px, and the faces of two people; from a seed."""
    generator = torch.Generator().manual_seed(0)
    config, side = transformer.config, size // 16
    device, dtype = transformer.device, transformer.dtype

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    inputs = {
        "hidden_states": normal(batch_size, side * side, config.in_channels),
        "encoder_hidden_states": normal(batch_size, text, config.joint_attention_dim),
        "pooled_projections": normal(batch_size, config.pooled_projection_dim),
        "timestep": torch.full((batch_size,), 0.7, device=device, dtype=dtype),
        "img_ids": FluxPipeline._prepare_latent_image_ids(1, side, side, device, dtype),
        "txt_ids": torch.zeros(text, 3, device=device, dtype=dtype),
        "return_dict": False,
    }
    if config.guidance_embeds:
        inputs["guidance"] = torch.full_like(inputs["timestep"], 3.5)
    bboxes = [scale_bboxes(BBOXES[0], (SIZE, SIZE), (size, size))] * batch_size
    return inputs, (normal(batch_size, 2, 512), normal(batch_size, 2, 256, 768), bboxes, size, size)


def encode(adapter: FaceAdapter, faces: tuple) -> FaceConditioning:
    return adapter.encode(*faces, id_scale=SCALE, siglip_scale=SCALE)


def call(transformer: FluxTransformer2DModel, inputs: dict, faces: FaceConditioning | None) -> torch.Tensor:
    given = None if faces is None else {CONDITIONING_KEY: faces}
    return transformer(**inputs, joint_attention_kwargs=given)[0]


def milliseconds(run: Callable[[], object], repeats: int = 7) -> float:
    """Median time of `run` on the device."""
    run()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return round(statistics.median(times), 2)


def gib() -> float:
    return round(torch.cuda.memory_allocated() / GIB, 2)


def peak() -> float:
    return round(torch.cuda.max_memory_allocated() / GIB, 2)


@torch.no_grad()
def agreement() -> dict:
    """The largest difference between CUDA and CPU over the transformer's output with faces, relative to the
    output's largest value; fp32 without TF32, and bf16 beside it."""
    torch.manual_seed(0)
    transformer, adapter = build("cpu", torch.float32, SMALL, hidden_size=256, num_blocks=6, inner_dim=256)
    adapter.attach(transformer)
    inputs, faces = inputs_of(transformer, 256, 2, 64)
    expected = call(transformer, inputs, encode(adapter, faces))
    without = call(transformer, inputs, None)
    result = {"what_faces_change": round(float((expected - without).abs().max() / expected.abs().max()), 4)}
    torch.set_float32_matmul_precision("highest")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        transformer.to("cuda", dtype)
        adapter.to("cuda", dtype)
        inputs, faces = inputs_of(transformer, 256, 2, 64)
        found = call(transformer, inputs, encode(adapter, faces)).float().cpu()
        result[name] = float(f"{float((found - expected).abs().max() / expected.abs().max()):.2e}")
    return result


@torch.no_grad()
def inference(transformer: FluxTransformer2DModel, adapter: FaceAdapter, sizes: tuple[int, ...]) -> dict:
    """A denoising step with and without faces, and encoding, at each size."""
    result: dict = {"weights_gib": gib()}
    for size in sizes:
        result[f"{size} px"] = row = _step_at(transformer, adapter, size)
        print(size, row, flush=True)
    return result


def _step_at(transformer: FluxTransformer2DModel, adapter: FaceAdapter, size: int) -> dict:
    inputs, faces = inputs_of(transformer, size)
    torch.cuda.reset_peak_memory_stats()
    given = encode(adapter, faces)
    base = milliseconds(lambda: call(transformer, inputs, None))
    with_faces = milliseconds(lambda: call(transformer, inputs, given))
    return {
        "base_ms": base,
        "with_faces_ms": with_faces,
        "faces_share": round(with_faces / base - 1, 4),
        "encode_ms": milliseconds(lambda: encode(adapter, faces)),
        "peak_gib": peak(),
    }


def training(transformer: FluxTransformer2DModel, adapter: FaceAdapter, batch_size: int) -> dict:
    """A training step of the adapter alone."""
    transformer.requires_grad_(False).train()
    transformer.enable_gradient_checkpointing()
    adapter.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-5, fused=True)
    inputs, faces = inputs_of(transformer, 512, batch_size)
    target = torch.randn_like(inputs["hidden_states"])
    torch.cuda.reset_peak_memory_stats()

    def step() -> None:
        velocity = call(transformer, inputs, encode(adapter, faces))
        loss = (velocity.float() - target.float()).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    row = {"batch_size": batch_size, "step_ms": milliseconds(step, 3), "peak_gib": peak()}
    transformer.disable_gradient_checkpointing()
    transformer.eval()
    adapter.requires_grad_(False).eval()
    print("training", row, flush=True)
    return row


@torch.no_grad()
def compiled(transformer: FluxTransformer2DModel, adapter: FaceAdapter, size: int) -> dict:
    """`compile_repeated_blocks` with faces: the first call, and a step after it."""
    inputs, faces = inputs_of(transformer, size)
    given = encode(adapter, faces)
    plain = call(transformer, inputs, given).float()
    transformer.compile_repeated_blocks()
    started = time.monotonic()
    found = call(transformer, inputs, given).float()
    torch.cuda.synchronize()
    row = {
        "size": size,
        "first_call_s": round(time.monotonic() - started, 1),
        "with_faces_ms": milliseconds(lambda: call(transformer, inputs, given)),
        "base_ms": milliseconds(lambda: call(transformer, inputs, None)),
        "difference": float(f"{float((found - plain).abs().max() / plain.abs().max()):.2e}"),
    }
    print("compiled", row, flush=True)
    return row


@torch.no_grad()
def muon() -> dict:
    """A Muon step of the miniature's base and adapter: torch's, matrix after matrix, and ours, stacked."""
    transformer, adapter = build("cuda", torch.float32, SMALL, hidden_size=256, num_blocks=6, inner_dim=256)
    optimizers = Optimizers(transformer, adapter)
    ours = optimizers.parts[0]
    groups = [{"params": group["params"]} for group in ours.param_groups]
    theirs = torch.optim.Muon(groups, adjust_lr_fn="match_rms_adamw")
    for group in ours.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn_like(parameter)
    row = {"torch_ms": milliseconds(theirs.step), "stacked_ms": milliseconds(ours.step)}
    print("muon", row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--only", nargs="+", choices=["agreement", "muon", "flux", "compiled", "training"])
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This benchmark needs a CUDA GPU; benchmarks.adapter measures an adapter's share on a CPU.")
    avoid_cudnn_attention()
    wanted = args.only or ["agreement", "muon", "flux", "training", "compiled"]
    result: dict = {"command": "python -m benchmarks.gpu", "device": torch.cuda.get_device_name()}
    result["torch"] = torch.__version__

    def keep() -> None:
        if args.json:
            args.json.write_text(json.dumps(result, indent=2) + "\n")

    if "agreement" in wanted:
        result["cuda_beside_cpu"] = agreement()
        print(result["cuda_beside_cpu"], flush=True)
    if "muon" in wanted:
        result["muon"] = muon()
    keep()
    if {"flux", "training", "compiled"} & set(wanted):
        torch.manual_seed(0)
        transformer, adapter = build("cuda", torch.bfloat16, DEV)
        adapter.attach(transformer)
        if "flux" in wanted:
            result["flux_dev"] = inference(transformer, adapter, (512, 1024))
            keep()
        if "training" in wanted:
            result["training"] = [training(transformer, adapter, size) for size in (1, 4)]
            keep()
        if "compiled" in wanted:
            result["compiled"] = compiled(transformer, adapter, 1024)
    keep()
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
