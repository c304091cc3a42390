"""Hand-made shards in MultiID-2M's layout and a tiny pipeline, for the tests of training.

People are painted (tests/tiny_faces.py); the shards hold everything that the released ones do.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from tests import tiny, tiny_faces
from train.shards import MAX_PEOPLE, REASONS, load_npy
from withanyone import FaceAnalyzer, WithAnyonePipeline


def embedding(identity: int, photo: int = 0) -> np.ndarray:
    """(512,) raw, norm about 22: photos of one person are alike, people are not."""
    person = np.random.default_rng(identity).standard_normal(512)
    return (person + 0.5 * np.random.default_rng([identity, photo]).standard_normal(512)).astype(np.float32)


def jpeg(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=95)
    return stream.getvalue()


def npy(value) -> bytes:
    """As released: a dict inside a pickled object array."""
    stream = io.BytesIO()
    np.save(stream, value, allow_pickle=True)
    return stream.getvalue()


def record(
    identities: list[int], seed: int, size=(64, 64), *, named: bool, kps: bool = True
) -> dict[str, bytes]:
    """The members of one good record: painted faces side by side."""
    rng = np.random.default_rng(seed)
    width, height = size
    column = width // len(identities)
    image, boxes = tiny_faces.blank(width, height, tuple(rng.integers(0, 60, 3).tolist())), []
    for i, identity in enumerate(identities):
        side = int(min(column, height) * rng.uniform(0.5, 0.7))
        x, y = i * column + rng.integers(0, column - side + 1), rng.integers(0, height - side + 1)
        boxes.append([int(x), int(y), int(x) + side, int(y) + side])
        image = tiny_faces.paint_face(image, boxes[-1], identity)
    info = {
        "caption_en": f"{'abc'[len(identities) - 1]} face",
        "bboxes": boxes,
        "url": "",
        "aesthetics_score": 5.0,
    }
    if named:
        info["names"] = [f"person_{i:03d}" for i in identities]
    if kps:
        info["kps"] = [tiny_faces.kps_of(b).tolist() for b in boxes]
    rows = np.stack([embedding(i, seed) for i in identities])
    arrays = {"bboxes": np.array(boxes, np.float32), "embeddings": rows}
    return {"jpg": jpeg(image), "json": json.dumps(info).encode(), "npy": npy(arrays)}


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def flat(records: dict[str, dict[str, bytes]]) -> dict[str, bytes]:
    return {f"{key}.{suffix}": data for key, parts in records.items() for suffix, data in parts.items()}


def write_shards(
    folder: Path, *, people: int = 6, photos: int = 4, records: int = 12, sizes=((64, 64),), kps: bool = True
) -> Path:
    """train_rec (two shards), train_cp (one), ref/tars (two): `records` of one or two people in each
    subset."""
    rng = np.random.default_rng(0)
    for subset, count in (("train_rec", 2), ("train_cp", 1)):
        for shard in range(count):
            made = {}
            for i in range(shard, records, count):
                who = rng.choice(people, 1 + i % 2, replace=False).tolist()
                size = sizes[i // 2 % len(sizes)]
                made[f"{i:05d}"] = record(who, 100 + i, size, named=subset == "train_cp", kps=kps)
            write_tar(folder / subset / f"{shard:04d}.tar", flat(made))
    for shard in range(2):
        members = {}
        for identity in range(shard, people, 2):
            for photo in range(photos):
                image = tiny_faces.paint_face(tiny_faces.blank(48, 48), (8, 8, 40, 40), identity)
                key = f"person_{identity:03d}/{photo}"
                members[f"{key}.jpg"] = jpeg(image)
                members[f"{key}.npy"] = npy(
                    {"bboxes": [[8, 8, 40, 40]], "embedding": embedding(identity, 1000 + photo)[None]}
                )
        write_tar(folder / "ref" / "tars" / f"{shard:04d}.tar", members)
    return folder


def tiny_pipeline(folder: Path) -> WithAnyonePipeline:
    """Random tiny components with the painted faces' pack (written to `folder`)."""
    analyzer = FaceAnalyzer.from_pretrained(tiny_faces.write_pack(folder))
    return WithAnyonePipeline(
        **tiny.flux_components(),
        image_encoder=tiny.image_encoder(),
        feature_extractor=tiny.feature_extractor(),
        face_analyzer=analyzer,
        face_adapter=None,
    )


def settings(shards: Path, out: Path, **overrides) -> dict:
    """Settings of a tiny run on the CPU in full precision."""
    values = {
        "shards": str(shards), "output_dir": str(out), "cache_dir": str(shards / "cache"),
        "adapter_inner_dim": 64,
        "buckets": [[64, 64]], "train_batch_size": 4, "max_train_steps": 4, "max_faces": 4,
        "num_negatives": 8,
        "mixed_precision": "no", "frozen_dtype": "float32", "gradient_checkpointing": False, "cpu": True,
        "lr_warmup_steps": 1, "learning_rate": 1e-3, "export_dtype": "float32", "id_loss_max_sigma": 0.9,
    }  # fmt: skip
    return {**values, **overrides}


class Creates:
    """A pickle that makes a file when it is run."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def edited(parts: dict[str, bytes], **changes) -> dict[str, bytes]:
    info = json.loads(parts["json"])
    for key, value in changes.items():
        if value is None:
            info.pop(key)
        else:
            info[key] = value
    return {**parts, "json": json.dumps(info).encode()}


def damaged(kind: str, seed: int, evil) -> dict[str, bytes]:
    """A record of one kind of damage, made of a good one."""
    good = record([seed % 5], seed, named=True)
    arrays = load_npy(good["npy"])
    rows = arrays["embeddings"]
    match kind:
        case "missing_image":
            return {k: v for k, v in good.items() if k != "jpg"}
        case "missing_json":
            return {k: v for k, v in good.items() if k != "json"}
        case "missing_embeddings":
            return {k: v for k, v in good.items() if k != "npy"}
        case "bad_image":
            return {**good, "jpg": good["jpg"][: len(good["jpg"]) // 2]}
        case "bad_json":
            return {**good, "json": b'{"bboxes": [[1, 2'}
        case "bad_npy":
            return {**good, "npy": good["npy"][:200]}
        case "unsafe_pickle":
            return {**good, "npy": npy({"embeddings": rows, "evil": Creates(evil)})}
        case "missing_key":
            return edited(good, caption_en=None)
        case "length_mismatch":
            return {**good, "npy": npy({"embeddings": np.concatenate([rows, rows])})}
        case "bad_box":
            return edited(good, bboxes=[[1, 2, float("nan"), 4]])
        case "zero_area_box":
            return edited(good, bboxes=[[10, 10, 10, 30]])
        case "nan_embedding":
            return {**good, "npy": npy({"embeddings": np.where(np.arange(512) == 3, np.nan, rows)})}
        case "no_people":
            return {**edited(good, bboxes=[], names=[]), "npy": npy({"embeddings": np.zeros((0, 512))})}
        case "too_many_people":
            many = MAX_PEOPLE + 1
            parts = edited(good, bboxes=[[1, 1, 9, 9]] * many, names=["person_000"] * many)
            return {**parts, "npy": npy({"embeddings": np.repeat(rows, many, 0)})}
        case "name_without_references":
            return edited(good, names=["stranger"])
    raise AssertionError(kind)


KINDS = sorted(set(REASONS) - {"broken_shard", "path_escape", "not_a_file", "reference_dropped"})


def damaged_shard(folder: Path):
    """Thirty good records among 200 bad ones of every kind, in one tar: (path, count of each kind, good keys,
    what the pickles would create)."""
    evil = folder / "made_by_a_pickle"
    rng = np.random.default_rng(0)
    kinds = (
        [KINDS[i % len(KINDS)] for i in range(190)] + ["good"] * 30 + ["path_escape"] * 5 + ["not_a_file"] * 5
    )
    order = rng.permutation(len(kinds))
    path = folder / "0000.tar"
    with tarfile.open(path, "w") as tar:
        for place in order:
            kind, key = kinds[place], f"{place:05d}"
            if kind == "not_a_file":
                link = tarfile.TarInfo(f"{key}.jpg")
                link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(link)
                continue
            parts = (
                record([place % 5], int(place), named=True)
                if kind in ("good", "path_escape")
                else damaged(kind, int(place), evil)
            )
            names = {f"../{key}.jpg": b"x"} if kind == "path_escape" else flat({key: parts})
            for name, data in names.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path, Counter(kinds), {f"{p:05d}" for p in order if kinds[p] == "good"}, evil
