"""What made a picture, written into its file and read back, and the mark that a model made it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
KEY = "withanyone"  # PNG: the name of the text chunk; elsewhere the settings stand in EXIF's ImageDescription
MARK = "AI-generated picture (WithAnyone)"
VISIBLE_MARK = "AI-generated"
EXIF_DESCRIPTION, EXIF_SOFTWARE = 0x010E, 0x0131
MAX_SETTINGS = 200_000  # characters: what a picture of eight people carries is a hundredth of it


def slider_positions(id_scale: float, siglip_scale: float) -> tuple[float, float]:
    """(similarity, diversity) of two branch scales: what `slider_scales` turns into them.

    similarity = id_scale + siglip_scale,   diversity = id_scale / similarity   (0 where both are 0)
    """
    similarity = id_scale + siglip_scale
    return similarity, id_scale / similarity if similarity else 0.0


def check_picture_path(path: str | os.PathLike, name: str = "out") -> Path:
    """`path`, if a picture can be saved there; said before hours of work rather than after.

    Raises:
        ValueError: an unknown ending, a folder in its place, or a folder above it that does not exist.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"`{name}` is {str(path)!r}: give a file name that ends in {', '.join(SUFFIXES)}.")
    if path.is_dir():
        raise ValueError(f"`{name}` is {str(path)!r}, which is a folder: give a file name.")
    if not path.parent.is_dir():
        raise ValueError(
            f"`{name}` is {str(path)!r}, but there is no folder {str(path.parent)!r}: make it first."
        )
    return path


def mark_picture(image: Image.Image, settings: Mapping[str, Any]) -> Image.Image:
    """A copy that carries its settings (plain JSON values) and the mark that a model made it, in `info`."""
    image = image.copy()
    image.info = {"Software": MARK, KEY: json.dumps(dict(settings), ensure_ascii=True, allow_nan=False)}
    return image


def stamp_picture(image: Image.Image, text: str = VISIBLE_MARK) -> Image.Image:
    """A copy with `text` on a dark patch in its lower right corner, small but readable at any size."""
    image = image.convert("RGB")
    size = max(9, round(min(image.size) / 24))
    font = ImageFont.load_default(size)
    draw = ImageDraw.Draw(image, "RGBA")
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    pad = max(2, size // 4)
    x, y = image.width - (right - left) - 2 * pad, image.height - (bottom - top) - 2 * pad
    draw.rectangle((x, y, image.width, image.height), fill=(0, 0, 0, 150))
    draw.text((x + pad - left, y + pad - top), text, font=font, fill=(255, 255, 255, 255))
    return image


def save_picture(image: Image.Image, path: str | os.PathLike, settings: Mapping[str, Any]) -> Path:
    """Save a picture with its settings and the mark, where its format keeps such things."""
    path = check_picture_path(path, "path")
    info = mark_picture(image, settings).info
    if path.suffix.lower() == ".png":
        chunks = PngImagePlugin.PngInfo()
        for name, text in info.items():
            chunks.add_text(name, text)
        image.save(path, pnginfo=chunks)
    else:
        exif = Image.Exif()
        exif[EXIF_SOFTWARE] = MARK
        exif[EXIF_DESCRIPTION] = info[KEY]
        image.save(path, quality=95, exif=exif.tobytes())
    return path


def read_settings(path: str | os.PathLike) -> dict[str, Any] | None:
    """The settings that `save_picture` wrote into a file; None where there are none."""
    with Image.open(path) as image:
        text = image.info.get(KEY)
        if text is None:
            exif = image.getexif()
            text = exif.get(EXIF_DESCRIPTION) if exif.get(EXIF_SOFTWARE) == MARK else None
    if text is None:
        return None
    if len(text) > MAX_SETTINGS:
        raise ValueError(
            f"`path` ({path}) carries settings of {len(text)} characters; {MAX_SETTINGS} may be."
        )
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`path` ({path}) carries settings that are not JSON ({error}).") from error
    if not isinstance(settings, dict):
        raise ValueError(f"`path` ({path}) carries settings that are not a JSON object.")
    return settings
