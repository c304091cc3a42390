"""How long the bench takes: python -m benchmarks.bench [--count 400] [--workers 2] [--json FILE]

Scores drawn cases from pictures, cold, with two workers; kills a second run on the way and lets it go on;
scores with one worker; and sees to it that all three say the same. The pictures are the cases' own targets
and, as another method on the same cases, their references. Cases are drawn once into --work and used again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

BENCH = [sys.executable, "-m", "withanyone.bench", "--quiet"]


def run(*words: object) -> tuple[float, float]:
    """Seconds of one command of the bench: by the clock, and of the processors, which other work on a
    machine disturbs less."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [*BENCH, *map(str, words)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    worked = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return round(time.monotonic() - start, 1), round(worked, 1)


def score(args: argparse.Namespace, method: str, out: str, workers: int, cache: str) -> tuple:
    return (
        "score", "--cases", args.work / "cases", "--pictures", args.work / method, "--method", method,
        "--judges", "mini", "--out", args.work / out, "--workers", workers, "--cache", args.work / cache,
    )  # fmt: skip


def killed_on_the_way(command: tuple, rows: Path, after: int) -> int:
    """Starts the command, kills it and its workers once `after` rows are there; rows that were kept."""
    process = subprocess.Popen(
        [*BENCH, *map(str, command)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while process.poll() is None and len(list(rows.glob("*.npz"))) < after:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return len(list(rows.glob("*.npz")))


def figures(path: Path) -> dict:
    results = json.loads(path.read_text())
    return {name: value for name, value in results.items() if name not in ("run", "environment")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/bench"))
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    cases = args.work / "cases"
    if len(list(cases.glob("*/meta.json"))) < args.count:
        command = [
            sys.executable,
            "-m",
            "withanyone.mini",
            "cases",
            "--out",
            str(cases),
            "--count",
            str(args.count),
        ]
        subprocess.run([*command, "--seed", "1", "--split", "validation"], check=True)
    for model in ("target", "reference"):
        run("generate", "--cases", cases, "--model", model, "--out", args.work / model)
    for path in (*args.work.glob("*.rows"), *args.work.glob("seen*")):
        shutil.rmtree(path)

    print("cold ...", flush=True)
    cold = run(*score(args, "target", "cold.json", args.workers, "seen"))
    another = run(*score(args, "reference", "another.json", args.workers, "seen"))
    again = run(*score(args, "target", "cold.json", args.workers, "seen"))
    print("killed and going on ...", flush=True)
    command = score(args, "target", "killed.json", args.workers, "seen_killed")
    kept = killed_on_the_way(command, args.work / "killed.rows", args.count // 2)
    rest = run(*command)
    print("one worker ...", flush=True)
    alone = run(*score(args, "target", "alone.json", 1, "seen_alone"))

    resumed = json.loads((args.work / "killed.json").read_text())["run"]["rows_kept"]
    found = {
        "command": " ".join(["python -m benchmarks.bench", *sys.argv[1:]]),
        "cases": args.count,
        "workers": args.workers,
        "cores": os.cpu_count(),
        "load_average_at_the_end": round(os.getloadavg()[0], 1),
        "seconds": "by the clock, of the processors",
        "seconds_cold": cold,
        "seconds_another_method_on_the_same_cases": another,
        "seconds_again": again,
        "rows_when_killed": kept,
        "rows_not_done_again": resumed,
        "seconds_after_kill": rest,
        "seconds_one_worker": alone,
        "same_figures": figures(args.work / "cold.json")
        == figures(args.work / "alone.json")
        == figures(args.work / "killed.json"),
    }
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
