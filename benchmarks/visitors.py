"""Eight visitors at once on one page: no mixed picture, no error, memory flat, files gone, none reachable.

    python -m benchmarks.visitors --minutes 5 [--visitors 8] [--json benchmarks/visitors.json]

Starts `python app.py` with the miniature. Each visitor is a program with a photo of a drawn person of its
own, under the same file name as all others'. What a seed gives is asked before the others come; every later
picture of that visitor and seed must equal it, pixel by pixel. Between pictures each visitor guesses at the
others' files, and makes a mistake now and then.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import numpy as np
from gradio_client import Client, handle_file
from PIL import Image

from benchmarks.first_picture import start, stop
from withanyone.mini import gallery

PROMPT = "a smiling person at the beach"
SEEDS = (0, 1)


def memory_mb(pid: int) -> float:
    """Resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"process {pid} has no VmRSS")


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


class Visitor:
    """One program, with a person of its own."""

    def __init__(self, address: str, number: int, folder: Path, steps: int):
        self.address, self.number, self.steps = address, number, steps
        self.client = Client(address, verbose=False, download_files=False)
        self.photo = folder / "photo.png"  # the same name for all: paths must not meet
        folder.mkdir()
        gallery.draw_photo(number).save(self.photo)
        self.alone: dict[int, np.ndarray] = {}
        self.seconds: list[float] = []
        self.errors: list[str] = []
        self.mixed = self.refused = self.reached = 0
        self.paths: list[str] = []

    def picture(self, seed: int) -> np.ndarray:
        started = time.monotonic()
        file, settings, _ = self.client.predict(
            prompt=PROMPT, photo_1=handle_file(self.photo), steps=self.steps, candidates=1, seed=seed,
            consent=True, api_name="/generate",
        )  # fmt: skip
        self.seconds.append(time.monotonic() - started)
        self.paths.append(file["path"])
        if settings["seed"] != seed:
            self.mixed += 1
        return pixels(file["path"])

    def stay(self, until: float, others: Sequence[Visitor]) -> None:
        chance = random.Random(self.number)
        while time.monotonic() < until:
            seed = chance.choice(SEEDS)
            try:
                if not np.array_equal(self.picture(seed), self.alone[seed]):
                    self.mixed += 1
            except (ValueError, OSError, httpx.HTTPError, RuntimeError) as error:
                self.errors.append(str(error))
            if chance.random() < 0.3:
                self.mistake()
            neighbour = chance.choice(others)
            if neighbour.paths:
                folder = Path(neighbour.paths[-1]).parent
                for guess in (
                    folder,
                    folder.parent,
                    folder.parent / f"{chance.getrandbits(192):048x}" / "a.png",
                ):
                    answer = httpx.get(f"{self.address}/gradio_api/file={guess}")
                    self.reached += answer.status_code != 403

    def mistake(self) -> None:
        """A wrong request is answered in words and disturbs nobody."""
        try:
            self.client.predict(prompt="", api_name="/generate")
        except Exception as error:  # noqa: BLE001 (gradio_client has one class for all the server says)
            self.refused += "empty" in str(error)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--visitors", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args(argv)
    process, address = start("--requests-per-minute", "100000")
    try:
        figures = run(process.pid, address, args.minutes, args.visitors, args.steps)
    finally:
        stop(process)
    text = json.dumps(figures, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


def run(pid: int, address: str, minutes: float, count: int, steps: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        visitors = [Visitor(address, 10 + i, Path(folder) / str(i), steps) for i in range(count)]
        for visitor in visitors:
            visitor.alone = {seed: visitor.picture(seed) for seed in SEEDS}
        distinct = len({image.tobytes() for visitor in visitors for image in visitor.alone.values()})
        warm_up = len([visitor.seconds.clear() for visitor in visitors])
        until = time.monotonic() + 60 * minutes
        threads = [threading.Thread(target=visitor.stay, args=(until, visitors)) for visitor in visitors]
        memory = []
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            memory.append(memory_mb(pid))
            time.sleep(min(5.0, 6 * minutes))
        paths = [Path(path) for visitor in visitors for path in visitor.paths]
        for visitor in visitors:
            visitor.client.close()
        closed = time.monotonic()
        while any(path.exists() for path in paths) and time.monotonic() - closed < 60:
            time.sleep(0.5)
        seconds = [s for visitor in visitors for s in visitor.seconds]
        third = max(1, len(memory) // 3)
        return {
            "command": f"python -m benchmarks.visitors --minutes {minutes:g} --steps {steps}",
            "visitors": warm_up,
            "minutes": minutes,
            "pictures": len(seconds),
            "different_pictures": distinct,
            "mixed": sum(visitor.mixed for visitor in visitors),
            "load_average": round(os.getloadavg()[0], 1),
            "errors": [error for visitor in visitors for error in visitor.errors],
            "mistakes_answered": sum(visitor.refused for visitor in visitors),
            "others_files_reached": sum(visitor.reached for visitor in visitors),
            "median_seconds": round(statistics.median(seconds), 2) if seconds else None,
            "longest_seconds": round(max(seconds), 2) if seconds else None,
            "memory_mb_first_third": round(statistics.mean(memory[:third])),
            "memory_mb_last_third": round(statistics.mean(memory[-third:])),
            "memory_mb_most": round(max(memory)),
            "files_left": sum(path.exists() for path in paths),
            "seconds_until_files_were_gone": round(time.monotonic() - closed, 1),
        }


if __name__ == "__main__":
    main()
