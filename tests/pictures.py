"""Small pictures for tests: noise, pictures as files, and a comparison."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def noise(height: int = 40, width: int = 56, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def assert_same(image: Image.Image, expected: np.ndarray, atol: float = 0) -> None:
    assert image.mode == "RGB"
    assert image.size == expected.shape[1::-1]
    assert np.abs(np.asarray(image).astype(int) - expected.astype(int)).max() <= atol
