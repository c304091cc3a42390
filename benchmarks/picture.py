"""Seconds a picture of two people takes on this machine: from a cold start, and warm.

    python -m benchmarks.picture [--model FOLDER] [--steps 25] [--json FILE]

Cold is a new process: imports, loading, faces found, first picture. Warm is the median of the next pictures.
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


def pictures(model: str, steps: int, repeats: int) -> list[float]:
    """Seconds of each of 1 + `repeats` pictures of two people, the first with loading and imports."""
    start = time.perf_counter()
    import torch

    from withanyone import WithAnyonePipeline
    from withanyone.mini import gallery

    photos = [gallery.draw_photo(1), gallery.draw_photo(2)]
    pipe = WithAnyonePipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    seconds = []
    for seed in range(1 + repeats):
        pipe(
            "two people at the beach in daylight",
            faces=photos,
            width=192,
            height=192,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
        )
        now = time.perf_counter()
        seconds.append(now - start)
        start = now
    return seconds


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(PRETRAINED))
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.inside:
        print(json.dumps(pictures(args.model, args.steps, args.repeats)))
        return
    start = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.picture", "--inside", "--model", args.model]
    command += ["--steps", str(args.steps), "--repeats", str(args.repeats)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds = json.loads(done.stdout.splitlines()[-1])
    warm = seconds[1:]
    cold = time.perf_counter() - start - sum(warm)
    figures = {
        "people": 2, "size": [192, 192], "steps": args.steps,
        "cold_seconds": round(cold, 2), "warm_seconds": round(statistics.median(warm), 2),
        "warm_range": [round(min(warm), 2), round(max(warm), 2)],
    }  # fmt: skip
    text = json.dumps(figures, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
