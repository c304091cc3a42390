"""Seconds from a cold `python app.py` to the first picture that a visitor sees.

    python -m benchmarks.first_picture [--repeats 3] [--steps 25] [--json benchmarks/first_picture.json]

Each time a new process is started. The clock stops at the page's first answer, and when a program that asked
as soon as the page answered has its picture of two drawn people, in the miniature's default number of steps.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
from gradio_client import Client

ROOT = Path(__file__).resolve().parent.parent


def start(*arguments: str, patience: float = 300) -> tuple[subprocess.Popen, str]:
    """`python app.py` on a free port of this machine, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "app.py", "--no-browser", "--host", "127.0.0.1", "--port", str(port)]
    command += arguments
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "0"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address, until = f"http://127.0.0.1:{port}", time.monotonic() + patience
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx.get(address, timeout=10).status_code == 200:
                return process, address
        except httpx.TransportError:
            time.sleep(0.05)
    stop(process)
    raise RuntimeError(f"`{' '.join(command)}` did not answer within {patience:g} s.")


def stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()


def cpu_seconds(pid: int) -> float:
    """Processor time that a process and its threads have had (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def once(steps: int | None) -> dict[str, float]:
    """Seconds to the page and to the picture, and the processor time that the app had until then: on a
    machine that is busy with other work, the clock tells of that work too."""
    begun = time.monotonic()
    process, address = start()
    try:
        answered = time.monotonic() - begun
        client = Client(address, verbose=False, download_files=False)
        given = {"prompt": "two people at the beach in daylight", "drawn_people": [1, 2], "seed": 0}
        client.predict(**given, steps=steps, api_name="/generate")
        picture = time.monotonic() - begun
        worked = cpu_seconds(process.pid)
        client.close()
    finally:
        stop(process)
    return {"page": round(answered, 2), "picture": round(picture, 2), "app_cpu": round(worked, 2)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, help="default: the model's own")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args(argv)
    runs = [once(args.steps) for _ in range(args.repeats)]
    load = os.getloadavg()[0]
    figures = {
        "command": f"python -m benchmarks.first_picture --repeats {args.repeats}",
        "runs": runs,
        "median_seconds_to_page": statistics.median(run["page"] for run in runs),
        "median_app_cpu_seconds": statistics.median(run["app_cpu"] for run in runs),
        "median_seconds_to_picture": statistics.median(run["picture"] for run in runs),
        "cores": os.cpu_count(),
        "load_average": round(load, 1),
    }
    text = json.dumps(figures, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
