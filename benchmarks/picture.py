"""Seconds a picture of two people takes on this machine: from a cold start, and warm.

    python -m benchmarks.picture [--model FOLDER] [--steps 25] [--candidates 1] [--dtype auto] [--json FILE]

Cold is a new process: imports, loading, faces found, first picture. Warm is the median of the next pictures.
Where the model draws several candidates of a picture by default, both are measured: one, and its default; on
a CPU that computes in bfloat16, float32 (the pipeline's default there) and bfloat16 (the page's).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from withanyone.mini import PRETRAINED


def pictures(model: str, steps: int, candidates: int, dtype: str, repeats: int) -> list[float]:
    """Seconds of each of 1 + `repeats` pictures of two people, the first with loading and imports."""
    start = time.perf_counter()
    import torch

    from withanyone import WithAnyonePipeline
    from withanyone.mini import gallery

    photos = [gallery.draw_photo(1), gallery.draw_photo(2)]
    pipe = WithAnyonePipeline.from_pretrained(model, dtype=getattr(torch, dtype))
    pipe.set_progress_bar_config(disable=True)
    seconds = []
    for seed in range(1 + repeats):
        pipe(
            "two people at the beach in daylight",
            faces=photos,
            width=192,
            height=192,
            num_inference_steps=steps,
            num_candidates=candidates,
            generator=torch.Generator().manual_seed(seed),
        )
        now = time.perf_counter()
        seconds.append(now - start)
        start = now
    return seconds


def measure(args: argparse.Namespace, candidates: int, dtype: str) -> dict[str, object]:
    """Cold and warm seconds of pictures with so many candidates, computed in `dtype`."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.picture", "--inside", "--model", args.model]
    command += ["--steps", str(args.steps), "--candidates", str(candidates), "--repeats", str(args.repeats)]
    command += ["--dtype", dtype]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds = json.loads(done.stdout.splitlines()[-1])
    warm = seconds[1:]
    return {
        "people": 2, "size": [192, 192], "steps": args.steps, "candidates": candidates, "dtype": dtype,
        "cold_seconds": round(time.perf_counter() - start - sum(warm), 2),
        "warm_seconds": round(statistics.median(warm), 2),
        "warm_range": [round(min(warm), 2), round(max(warm), 2)],
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(PRETRAINED))
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--candidates", type=int, nargs="+", help="(default: one, and the model's default)")
    parser.add_argument("--dtype", nargs="+", help="float32, bfloat16, auto (default: float32 and auto)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    candidates = args.candidates
    if args.inside:
        print(json.dumps(pictures(args.model, args.steps, candidates[0], args.dtype[0], args.repeats)))
        return
    if not candidates:
        from withanyone import WithAnyonePipeline

        own = WithAnyonePipeline.load_config(args.model)["sampling_defaults"].get("num_candidates", 1)
        candidates = sorted({1, own})
    from withanyone.precision import dtype_name

    dtypes = dict.fromkeys(dtype_name(name) for name in args.dtype or ("float32", "auto"))
    figures = [measure(args, count, dtype) for count in candidates for dtype in dtypes]
    text = json.dumps(figures, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
