"""What the face adapter costs: its share of a denoising step, and its parameters and bytes by part.

    python -m benchmarks.adapter            # a step of the base, a straightforward adapter, this one: one run
    python -m benchmarks.adapter --table    # parameters and bytes of FLUX.1 [dev]'s adapter, by shapes

The step: a random FLUX transformer of width 1536 (12 heads of 128, 2 double-stream and 4 single-stream
blocks), 512 px, 128 text tokens, two people whose boxes lie over about a quarter of the picture, both
branches on. Times are medians of process time, the three versions taken in turn. The straightforward version
does what the equations say: keys and values projected at every step, every image token through every branch,
a mask.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel

from withanyone.adapter import FaceAdapter, FaceConditioning, parameter_table, transformer_blocks
from withanyone.layout import token_mask

SIZE = 512
BBOXES = [[(40, 60, 200, 240), (280, 60, 450, 240)]]
SCALE = 0.5
TEXT_TOKENS = 128


def build(threads: int) -> tuple[FluxTransformer2DModel, FaceAdapter, dict, tuple]:
    """A random transformer, a random adapter, a call's inputs and the faces."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=128,
        num_attention_heads=12,
        joint_attention_dim=256,
        pooled_projection_dim=64,
    ).eval()
    adapter = FaceAdapter(hidden_size=1536, num_blocks=6, inner_dim=768).eval()
    for branch in adapter.branches:
        for attention in adapter.attentions(branch):
            torch.nn.init.normal_(attention.to_out.weight, std=768**-0.5)
    side = SIZE // 16
    ids = torch.zeros(side, side, 3)
    ids[..., 1], ids[..., 2] = torch.arange(side)[:, None], torch.arange(side)[None]
    inputs = {
        "hidden_states": torch.randn(1, side * side, 64),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, 256),
        "pooled_projections": torch.randn(1, 64),
        "timestep": torch.tensor([0.7]),
        "img_ids": ids.flatten(0, 1),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
        "return_dict": False,
    }
    return transformer, adapter, inputs, (torch.randn(1, 2, 512), torch.randn(1, 2, 256, 768))


@contextlib.contextmanager
def straightforward(
    transformer: FluxTransformer2DModel, adapter: FaceAdapter, faces: tuple
) -> Iterator[None]:
    """The adapter as the equations say it, as hooks: x + 0.5 CA_arc(x) + 0.5 CA_sig(x) with masks."""
    embeddings, features = (tensor.flatten(0, 1) for tensor in faces)
    face_mask = token_mask(BBOXES, SIZE, SIZE)  # (1, N, F)
    tokens = {name: adapter.face_tokens(name, embeddings, features) for name in adapter.branches}  # (F, L, D)

    def cross_attention(attention, x, tokens):
        q, (k, v) = attention.to_q(attention.norm2(x)), attention.to_kv(attention.norm1(tokens)).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for t in (q, k, v))
        mask = face_mask.repeat_interleave(tokens.shape[1] // face_mask.shape[2], dim=2)  # (1, N, F L)
        covered = mask.any(-1, keepdim=True)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=(mask | ~covered)[:, None])
        return attention.to_out(out.transpose(1, 2).flatten(2)) * covered

    def hook(index):
        def add(module, args, output):
            text, x = output
            residual = [
                SCALE * cross_attention(adapter.attentions(name)[index], x, tokens[name].flatten(0, 1)[None])
                for name in adapter.branches
            ]
            return text, x + sum(residual)

        return add

    blocks = transformer_blocks(transformer)
    handles = [block.register_forward_hook(hook(i)) for i, (block, _) in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


@torch.no_grad()
def measure(repeats: int, threads: int) -> dict:
    """Medians of process time for one step of each version, and how much they agree."""
    transformer, adapter, inputs, faces = build(threads)

    def encode() -> FaceConditioning:
        return adapter.encode(*faces, BBOXES, SIZE, SIZE, id_scale=SCALE, siglip_scale=SCALE)

    conditioning = encode()
    kwargs = {"joint_attention_kwargs": {"ip_hidden_states": conditioning}}

    def base():
        return transformer(**inputs)[0]

    def plain():
        with straightforward(transformer, adapter, faces):
            return transformer(**inputs)[0]

    def ours():
        adapter.attach(transformer)
        try:
            return transformer(**inputs, **kwargs)[0]
        finally:
            adapter.detach(transformer)

    versions = {"base": base, "straightforward": plain, "ours": ours}
    outputs = {name: version() for name, version in versions.items()}  # a warm-up too
    times = {name: [] for name in versions}
    for _ in range(repeats):
        for name, version in versions.items():
            times[name].append(seconds(version))
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "width": 1536,
        "size": SIZE,
        "people": len(BBOXES[0]),
        "tokens_under_boxes": round(token_mask(BBOXES, SIZE, SIZE).any(-1).float().mean().item(), 4),
        "threads": threads,
        "repeats": repeats,
        "seconds": {name: round(value, 4) for name, value in median.items()},
        "share_of_a_step": {
            name: round(median[name] / median["base"] - 1, 4) for name in ("straightforward", "ours")
        },
        "encode_seconds": round(statistics.median(seconds(encode) for _ in range(3)), 4),
        "max_difference": (outputs["ours"] - outputs["straightforward"]).abs().max().item(),
        "max_effect": (outputs["ours"] - outputs["base"]).abs().max().item(),
        "torch": torch.__version__,
    }


def table(dtype: torch.dtype = torch.bfloat16) -> list[dict]:
    """Parameters and bytes of FLUX.1 [dev]'s adapter by part, made on the meta device."""
    with torch.device("meta"):
        adapter = FaceAdapter().to(dtype)
    return [vars(part) for part in parameter_table(adapter)]


def show_table(rows: list[dict]) -> str:
    lines = [f"{'part':<22}{'parameters':>15}{'MB (bf16)':>12}  needed in the denoising loop"]
    totals = {"all": [0, 0], "in the loop": [0, 0]}
    for row in rows:
        needed = "yes" if row["in_loop"] else "no"
        lines.append(f"{row['part']:<22}{row['parameters']:>15,}{row['bytes'] / 1e6:>12,.1f}  {needed}")
        for total in ("all", "in the loop") if row["in_loop"] else ("all",):
            totals[total][0] += row["parameters"]
            totals[total][1] += row["bytes"]
    lines += [f"{name:<22}{count:>15,}{size / 1e6:>12,.1f}" for name, (count, size) in totals.items()]
    return "\n".join(lines)


def show_measure(result: dict) -> str:
    under = f"{result['tokens_under_boxes']:.0%} of the tokens under boxes"
    lines = [f"width {result['width']}, {result['size']} px, {result['people']} people, {under}"]
    for name, value in result["seconds"].items():
        share = result["share_of_a_step"].get(name)
        lines.append(f"{name:<16}{value:8.3f} s a step" + ("" if share is None else f"  {share:+.1%}"))
    lines.append(f"{'encode, once':<16}{result['encode_seconds']:8.3f} s a picture")
    lines.append(
        f"largest difference {result['max_difference']:.1e} on effects of {result['max_effect']:.2f}"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapter", description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="parameters and bytes by part, nothing timed")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    if arguments.table:
        result = table()
        text = show_table(result)
    else:
        result = measure(arguments.repeats, arguments.threads)
        text = show_measure(result)
    sys.stdout.write(text + "\n")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
