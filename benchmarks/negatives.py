"""Drawing negatives from a bank of a million embeddings: at once for a batch, and by a straightforward loop.

    python -m benchmarks.negatives --json benchmarks/negatives.json

A batch of 16 pictures of two people, 4,096 negatives of other people for it. The bank is a memory-mapped
file, as `python -m train references` writes it (float32, 2 GB for a million rows). The loop does what a
straightforward loader does: for each face of the batch, draw another person, then one of their photos, 4,096
times, and copy that row. Both read the same warm file; the loop is timed on a share of its draws and scaled.
Times are medians of process time, what else the machine does left out, with wall time beside.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from train.references import ReferenceBank, draw_negatives

DIM = 512


def make_bank(folder: Path, rows: int, people: int) -> ReferenceBank:
    """A bank of random embeddings on disk, opened memory-mapped."""
    path = folder / "embeddings.npy"
    out = np.lib.format.open_memmap(path, "w+", np.float32, (rows, DIM))
    rng = np.random.default_rng(0)
    for begin in range(0, rows, 50_000):
        out[begin : begin + 50_000] = rng.standard_normal((min(50_000, rows - begin), DIM), dtype=np.float32)
    out.flush()
    start = np.linspace(0, rows, people + 1).astype(np.int64)
    return ReferenceBank(
        shards=[], embeddings=np.load(path, mmap_mode="r", allow_pickle=False),
        bbox=np.zeros((0, 4), np.float32), names=np.array([f"{i:06d}" for i in range(people)]),
        start=start, location=np.zeros((0, 3), np.int64),
    )  # fmt: skip


def at_once(bank: ReferenceBank, identities: np.ndarray, count: int, seed: int) -> np.ndarray:
    """What a training step does: (count, 512) float32."""
    rows = draw_negatives(bank, identities, count, np.random.default_rng(seed))
    return np.ascontiguousarray(bank.embeddings[rows])


def straightforward(bank: ReferenceBank, identities: np.ndarray, count: int, seed: int) -> list[np.ndarray]:
    """One set a face, draw by draw."""
    rng = np.random.default_rng(seed)
    people = [bank.photos(i) for i in range(len(bank.names))]
    sets = []
    for identity in identities:
        rows = []
        while len(rows) < count:
            other = int(rng.integers(len(people)))
            if other != identity:
                photos = people[other]
                rows.append(np.array(bank.embeddings[photos[int(rng.integers(len(photos)))]], np.float32))
        sets.append(np.stack(rows))
    return sets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--people", type=int, default=25_000)
    parser.add_argument("--count", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--loop-share", type=float, default=1 / 16, help="of the loop's draws that are timed")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bank = make_bank(Path(folder), args.rows, args.people)
        identities = np.random.default_rng(1).integers(0, args.people, 32)
        ours, loops, walls = [], [], []
        for seed in range(args.repeats):
            begin, wall = time.process_time(), time.perf_counter()
            at_once(bank, identities, args.count, seed)
            ours.append(time.process_time() - begin)
            walls.append(time.perf_counter() - wall)
            if seed % 5 == 0:
                begin = time.process_time()
                straightforward(bank, identities, int(args.count * args.loop_share), seed)
                loops.append((time.process_time() - begin) / args.loop_share)
    result = {
        "command": "python -m benchmarks.negatives --json benchmarks/negatives.json",
        "bank_rows": args.rows, "people": args.people, "faces": 32, "negatives": args.count,
        "at_once_ms": round(1e3 * float(np.median(ours)), 2),
        "at_once_ms_wall": round(1e3 * float(np.median(walls)), 2),
        "at_once_ms_wall_best": round(1e3 * min(walls), 2),
        "loop_ms": round(1e3 * float(np.median(loops)), 1),
        "times_faster": round(float(np.median(loops) / np.median(ours)), 1),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
