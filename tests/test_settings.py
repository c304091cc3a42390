"""Settings in a picture's file: there and back, the mark, and files that a stranger wrote."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from withanyone import slider_scales
from withanyone.settings import KEY, MARK, read_settings, save_picture, slider_positions, stamp_picture

SETTINGS = {"prompt": "zwei Leute, \u4e8c, <b>", "seed": 0, "bboxes": [[1.5, 2, 3, 4]], "people": 1}


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_settings_come_back_from_the_file_and_the_mark_is_in_it(tmp_path, suffix: str) -> None:
    path = save_picture(Image.new("RGB", (32, 32), "teal"), tmp_path / f"a{suffix}", SETTINGS)
    assert read_settings(path) == SETTINGS
    with Image.open(path) as image:
        mark = image.info.get("Software") or image.getexif().get(0x0131)
    assert mark == MARK


def test_other_pictures_carry_none_and_wrong_ones_are_named(tmp_path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    assert read_settings(tmp_path / "plain.png") is None
    for name, text in (("list", "[1]"), ("cut", '{"a": '), ("deep", "[" * 100_000), ("long", " " * 300_000)):
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text(KEY, text)
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png", pnginfo=chunks)
        with pytest.raises(ValueError, match="settings"):
            read_settings(tmp_path / f"{name}.png")


@pytest.mark.parametrize("size", [(64, 64), (128, 192), (1024, 1024)])
def test_the_visible_mark_is_in_the_corner_only_and_readable(size: tuple[int, int]) -> None:
    plain = Image.new("RGB", size, (90, 130, 100))
    stamped = np.asarray(stamp_picture(plain)).astype(int)
    changed = np.abs(stamped - np.asarray(plain)).sum(axis=2) > 0
    rows, columns = np.nonzero(changed)
    assert rows.max() == size[1] - 1 and columns.max() == size[0] - 1
    assert changed.mean() < 0.2 and not changed[: size[1] // 2].any()
    assert stamped[changed].max() > 230 and stamped[changed].min() < 60  # light letters on dark
    assert plain.getpixel((size[0] - 1, size[1] - 1)) == (90, 130, 100)


def test_sliders_are_the_inverse_of_scales() -> None:
    for similarity, diversity in ((1.0, 0.25), (1.5, 1.0), (0.5, 0.0)):
        assert slider_positions(*slider_scales(similarity, diversity)) == pytest.approx(
            (similarity, diversity)
        )
    assert slider_positions(0, 0) == (0.0, 0.0)
