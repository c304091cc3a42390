"""The data loader beside a straightforward one, and its memory over many samples.

    python -m benchmarks.loader --json benchmarks/loader.json
    python -m benchmarks.loader --photo-sides --memory 100000 --json benchmarks/loader_memory.json

Both get the same pictures: group photos of two people, and people with many reference photos. The
straightforward loader does what the released one does: the photos lie unpacked, a folder a person; for each
person of a sample the whole folder is read (every photo and its embedding), one photo is chosen, and 4,033
negatives of other people are drawn and copied for each face. Ours reads the same records and photos from tars
by catalogue and bank, and draws the negatives once a batch. One process, no workers, for both; samples a
second of process time up to the batch, the image encoder's preparation not included. `--memory N` also
streams N samples and takes the process's memory on the way.
"""

from __future__ import annotations

import argparse
import json
import sys
import tarfile
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from train.config import TrainConfig, make_config
from train.data import PlannedBatches, TrainDataset, open_data
from train.entries import Place, lane_entries
from train.examples import ExampleMaker, collate
from train.references import draw_negatives, open_bank
from train.shards import BadRecord, ShardReader, parse_record
from withanyone.tars import array_bytes, jpeg_bytes, record_members, write_tar

RELEASED_NEGATIVES = 4033


def photo(rng: np.random.Generator, side: int) -> Image.Image:
    """A picture with the detail of a photo, so that decoding costs what it does."""
    small = Image.fromarray(rng.integers(0, 255, (side // 8, side // 8, 3), np.uint8))
    return small.resize((side, side), Image.Resampling.BICUBIC)


def make_data(folder: Path, *, people: int, photos: int, records: int, side: int, photo_side: int) -> None:
    """Shards for us, and the same reference photos unpacked for the other one."""
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((people, 512)).astype(np.float32)

    def embedding(person: int) -> np.ndarray:
        return centers[person] + 0.5 * rng.standard_normal(512).astype(np.float32)

    references: dict[str, bytes] = {}
    pictures = [
        jpeg_bytes(photo(rng, photo_side)) for _ in range(photos)
    ]  # the same for all: a decode is one
    box = {"bboxes": [[photo_side // 4, photo_side // 4, photo_side // 4 * 3, photo_side // 4 * 3]]}
    for person in range(people):
        unpacked = folder / "unpacked" / f"{person:05d}"
        unpacked.mkdir(parents=True)
        for k, picture in enumerate(pictures):
            parts = {
                "jpg": picture,
                "json": json.dumps(box).encode(),
                "npy": array_bytes(embedding(person)[None]),
            }
            for suffix, data in parts.items():
                references[f"{person:05d}/{k}.{suffix}"] = data
                (unpacked / f"{k}.{suffix}").write_bytes(data)
    write_tar(folder / "s" / "ref" / "tars" / "0.tar", references.items())
    members: dict[str, bytes] = {}
    for number in range(records):
        who = rng.choice(people, 2, replace=False)
        boxes = [
            [side // 8, side // 4, side // 8 * 3, side // 2],
            [side // 2, side // 4, side // 4 * 3, side // 2],
        ]
        info = {
            "bboxes": boxes, "caption_en": "two people", "names": [f"{p:05d}" for p in who],
            "kps": np.tile(np.array(boxes, float)[:, None, :2], (1, 5, 1)).tolist(),
        }  # fmt: skip
        rows = np.stack([embedding(p) for p in who])
        members.update(record_members(f"{number:06d}", photo(rng, side), info, rows))
    write_tar(folder / "s" / "train_cp" / "0.tar", members.items())


def settings(folder: Path, side: int, **more: object) -> TrainConfig:
    values = {
        "shards": str(folder / "s"), "output_dir": str(folder / "out"), "paired_ratio": 1.0,
        "buckets": [[side, side]], "train_batch_size": 16, "complete_records": False, "text_dropout": 0.0,
    }  # fmt: skip
    return make_config({**values, **more})


def ours(config: TrainConfig, batches: int) -> tuple[int, float]:
    """Samples and seconds, negatives included."""
    catalogues, bank = open_data(config)
    source = PlannedBatches(TrainDataset(catalogues, bank, config, crop_size=512), config)
    stream = source.batches(0)
    next(stream)  # files opened
    begin, samples = time.process_time(), 0
    for number, batch in enumerate(islice(stream, batches)):
        rng = np.random.default_rng([0, number])
        rows = draw_negatives(bank, batch.identities.numpy(), config.num_negatives, rng)
        np.asarray(bank.embeddings[rows], np.float32)
        samples += len(batch.positions)
    return samples, time.process_time() - begin


def straightforward(folder: Path, config: TrainConfig, samples: int) -> tuple[int, float]:
    """Samples and seconds of a loader that reads whole folders and copies negatives for each face."""
    people = sorted((folder / "unpacked").iterdir())
    everyone = {
        path.name: [np.load(p, allow_pickle=False)[0] for p in sorted(path.glob("*.npy"))] for path in people
    }  # the released loader keeps all embeddings in memory, too
    names = list(everyone)
    rng = np.random.default_rng(0)
    records = unpacked_records(folder)
    maker = ExampleMaker(config, open_bank(config.cache_path / "bank"), 512)
    begin = time.process_time()
    for _ in range(samples):
        record = parse_record(*records[int(rng.integers(len(records)))], paired=True)
        maker._fit(record, 0)
        for name in record.names:
            candidates = []
            for path in sorted((folder / "unpacked" / name).glob("*.jpg")):
                image = Image.open(path).convert("RGB")
                candidates.append((image, np.load(path.with_suffix(".npy"), allow_pickle=False)[0]))
            image, _ = candidates[int(rng.integers(len(candidates)))]
            maker._crop(image, np.array([32, 32, 96, 96], np.float32), rng)
            negatives = []
            while len(negatives) < RELEASED_NEGATIVES:
                other = names[int(rng.integers(len(names)))]
                if other != name:
                    rows = everyone[other]
                    negatives.append(rows[int(rng.integers(len(rows)))].copy())
            np.stack(negatives)
    return samples, time.process_time() - begin


def unpacked_records(folder: Path) -> list[tuple[str, dict[str, bytes]]]:
    out: dict[str, dict[str, bytes]] = {}
    with tarfile.open(folder / "s" / "train_cp" / "0.tar") as tar:
        for info in tar:
            key, _, suffix = info.name.rpartition(".")
            part = "image" if suffix == "jpg" else suffix
            out.setdefault(key, {})[part] = tar.extractfile(info).read()
    return list(out.items())


def memory(folder: Path, samples: int, points: int = 10) -> list[dict[str, float]]:
    """MB of this process while `samples` examples are streamed in sequence, at `points` moments.

    Small pictures, so that the number of samples and not their size is what is tried.
    """
    rng = np.random.default_rng(0)
    for shard in range(4):
        members: dict[str, bytes] = {}
        for k in range(64):
            info = {"bboxes": [[4, 4, 28, 28]], "caption_en": "a", "kps": [[[9, 9]] * 5]}
            members.update(
                record_members(f"{shard}{k:04d}", photo(rng, 32), info, rng.standard_normal((1, 512)))
            )
        write_tar(folder / "m" / "train_rec" / f"{shard}.tar", members.items())
    shards = [str(p) for p in sorted((folder / "m" / "train_rec").glob("*.tar"))]
    config = make_config({"shards": str(folder / "m"), "buckets": [[32, 32]], "contrastive_loss_weight": 0.0})
    maker, reader = ExampleMaker(config, None, 32), ShardReader()
    process, said, queue = psutil.Process(), [], []
    entries = lane_entries(shards, Place(), seed=0, subset="rec", lane=0, lanes=1, shuffle=128)
    for number, (entry, _) in enumerate(entries):
        try:
            record = parse_record(entry.key, entry.parts, paired=False)
            queue.append(maker.make(record, position=number, subset="rec", bucket=0, reader=reader, bad=[]))
        except BadRecord as error:
            raise ValueError(f"a good record was refused: {error}") from error
        if len(queue) == 16:
            collate(queue)
            queue = []
        if number % (samples // points) == 0:
            said.append({"samples": number, "MB": round(process.memory_info().rss / 1e6, 1)})
        if number == samples:
            return said
    return said


def rates(args: argparse.Namespace, photo_side: int) -> dict[str, float]:
    """Samples a second of both, with reference photos of one size."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(
            folder, people=args.people, photos=args.photos, records=args.records, side=args.side,
            photo_side=photo_side,
        )  # fmt: skip
        config = settings(folder, args.side)
        open_data(config)  # catalogue and bank, once
        found: dict[str, list[float]] = {"ours": [], "straightforward": []}
        for _ in range(2):  # in turn, so that what else the machine does disturbs both
            count, seconds = straightforward(folder, config, args.others)
            found["straightforward"].append(count / seconds)
            count, seconds = ours(config, args.batches)
            found["ours"].append(count / seconds)
    best = {name: max(values) for name, values in found.items()}
    return {
        "photo_side": photo_side, **{f"{k}_samples_a_second": round(v, 2) for k, v in best.items()},
        "times_faster": round(best["ours"] / best["straightforward"], 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--people", type=int, default=60)
    parser.add_argument(
        "--photos", type=int, default=40, help="a person; MultiID-2M has about 40 at the mean"
    )
    parser.add_argument("--records", type=int, default=48)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--photo-sides", type=int, nargs="*", default=[512, 1024])
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--others", type=int, default=4, help="samples of the straightforward loader")
    parser.add_argument("--memory", type=int, default=0, help="samples streamed; 0: not")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = {
        "command": f"python -m benchmarks.loader {' '.join(sys.argv[1:])}",
        "people": args.people, "photos_a_person": args.photos, "picture": args.side,
        "by_reference_photo": [rates(args, side) for side in args.photo_sides],
    }  # fmt: skip
    if args.memory:
        with tempfile.TemporaryDirectory() as name:
            result["memory"] = memory(Path(name), args.memory)
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
