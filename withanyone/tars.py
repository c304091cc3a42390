"""Shards written: members to a tar that appears only when it is complete. No pickle: plain arrays."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def jpeg_bytes(image: Image.Image | np.ndarray, quality: int = 95) -> bytes:
    """A picture, or (H, W, 3) uint8 RGB, as JPEG: colours at full resolution, nothing else its file said."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    stream = io.BytesIO()
    image.convert("RGB").save(stream, "JPEG", quality=quality, subsampling=0)
    return stream.getvalue()


def array_bytes(array: np.ndarray) -> bytes:
    """A plain `.npy` of float32."""
    stream = io.BytesIO()
    np.save(stream, np.asarray(array, np.float32), allow_pickle=False)
    return stream.getvalue()


def record_members(
    key: str, image: Image.Image, info: dict[str, Any], embeddings: np.ndarray
) -> dict[str, bytes]:
    """`<key>.jpg`, `<key>.json` and `<key>.npy` (embeddings (N, 512))."""
    return {
        f"{key}.jpg": jpeg_bytes(image),
        f"{key}.json": json.dumps(info).encode(),
        f"{key}.npy": array_bytes(embeddings),
    }


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """A tar whose bytes depend on its members alone; written aside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tar.partial")
    with tarfile.open(aside, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    os.replace(aside, path)
