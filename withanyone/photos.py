"""Photos: a file, its bytes, a picture or an array becomes an upright RGB picture, or a reason why not."""

from __future__ import annotations

import io
import logging
import os
import struct

import numpy as np
from PIL import Image, ImageCms, ImageOps

logger = logging.getLogger(__name__)

ImageSource = str | os.PathLike | bytes | bytearray | memoryview | Image.Image | np.ndarray

MAX_PHOTO_PIXELS = 80_000_000
"""Photos of more pixels are refused before they are decoded: 80 megapixels are 240 MB of memory as RGB."""

MIN_PHOTO_SIDE = 16
"""A photo of fewer pixels to a side holds no face that could be recognised."""

# Raster formats of photos. Not EPS, PDF and the like: Pillow hands those to other programs.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
_READABLE = "JPEG, PNG, WebP, AVIF, BMP, GIF and TIFF"

# What Pillow's readers raise on damaged files.
_DAMAGE = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, RuntimeError, AssertionError)
_DAMAGE += (struct.error,)
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)

# First bytes (offset, bytes) of files that people take for photos.
_LOOKALIKES = (
    (0, b"%PDF", "a PDF document"),
    (0, b"%!PS", "a PostScript document"),
    (0, b"PK\x03\x04", "a ZIP archive or an office document"),
    (0, b"<svg", "an SVG drawing"),
    (0, b"<?xml", "an XML or SVG file"),
    (0, b"<!DOCTYPE", "a web page"),
    (0, b"<html", "a web page"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself (run `git lfs pull`)"),
    (4, b"ftyphe", "a HEIC photo"),
    (4, b"ftypmif1", "a HEIF photo"),
    (4, b"ftyp", "a video"),
    (0, b"\x1aE\xdf\xa3", "a video"),
)


def load_image(source: ImageSource, name: str = "photo") -> Image.Image:
    """Read a photo as an upright 8-bit RGB picture.

    The camera's EXIF rotation is applied, transparent parts are laid on white, palettes, greyscale (8 and
    16 bits) and CMYK (through the embedded colour profile where there is one) are converted.

    Args:
        source: a path, the file's bytes, a PIL image, or an array (H, W), (H, W, 1 | 3 | 4): uint8, uint16,
            or floats in [0, 1].
        name: what the caller calls this photo; errors name it.

    Raises:
        ValueError: if `source` is no photo, is empty, damaged, too small or too large; it says what to do.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, f"`{name}`")
    if isinstance(source, np.ndarray):
        return _array_to_rgb(source, f"`{name}`")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _read(io.BytesIO(source), f"`{name}`")
    if isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        label = f"`{name}` ({path})"
        if str(path).startswith(("http://", "https://")):
            raise ValueError(f"{label} is a web address: download the photo and give its path.")
        if os.path.isdir(path):
            raise ValueError(f"{label} is a folder: give the path of one photo.")
        if not os.path.exists(path):
            raise ValueError(f"{label} does not exist: check the path.")
        try:
            with open(path, "rb") as file:
                return _read(file, label)
        except PermissionError as error:
            raise ValueError(
                f"{label} cannot be opened ({error.strerror}): check its permissions."
            ) from error
    raise ValueError(
        f"`{name}` is of type {type(source).__name__}: give a path, the file's bytes, a PIL image or a "
        "numpy array."
    )


def _read(file: io.BufferedIOBase, label: str) -> Image.Image:
    head = file.read(64)
    file.seek(0)
    if not head:
        raise ValueError(f"{label} is empty (0 bytes): save or upload the photo again.")
    Image.init()
    try:
        image = Image.open(file, formats=[f for f in _FORMATS if f in Image.OPEN])
    except _BOMBS as error:
        raise _too_large(label) from error
    except _DAMAGE as error:
        what = next((text for at, magic, text in _LOOKALIKES if head[at:].startswith(magic)), None)
        found = f"is {what}" if what else "could not be read as a picture (damaged, or of an unknown format)"
        raise ValueError(f"{label} {found}: give a photo saved as one of {_READABLE}.") from error
    with image:
        return _to_rgb(image, label)


def _too_large(label: str, size: tuple[int, int] | None = None) -> ValueError:
    got = f"{size[0]} x {size[1]} pixels" if size else "far too many pixels"
    return ValueError(
        f"{label} has {got}, more than {MAX_PHOTO_PIXELS // 10**6} megapixels: give a smaller copy; "
        "faces need no more than a few hundred pixels."
    )


def _check_size(size: tuple[int, int], label: str) -> None:
    """Before decoding: the header alone says how large the photo would be."""
    if size[0] * size[1] > MAX_PHOTO_PIXELS:
        raise _too_large(label, size)
    if min(size) < MIN_PHOTO_SIDE:
        raise ValueError(
            f"{label} is {size[0]} x {size[1]} pixels: give a photo of at least {MIN_PHOTO_SIDE} pixels to "
            "a side, in which the face can be seen."
        )


def _to_rgb(image: Image.Image, label: str) -> Image.Image:
    _check_size(image.size, label)
    try:
        image.load()
    except _BOMBS as error:
        raise _too_large(label, image.size) from error
    except _DAMAGE as error:
        raise ValueError(
            f"{label} is damaged, cut off or closed ({error}): save or upload it again."
        ) from error
    image = _upright(image, label)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode.startswith("I") or image.mode == "F":
        return _array_to_rgb(_sixteen_bit(image, label), label)
    if image.mode == "CMYK":
        return _from_cmyk(image, label)
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(canvas, image)
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(
            f"{label} has colours of kind {image.mode}, which cannot be read: save it as an RGB JPEG or PNG."
        ) from error


def _upright(image: Image.Image, label: str) -> Image.Image:
    """Apply the camera's EXIF rotation."""
    try:
        return ImageOps.exif_transpose(image)
    except _DAMAGE as error:
        logger.warning("%s has damaged EXIF data (%s): its rotation, if any, is not applied.", label, error)
        return image


def _sixteen_bit(image: Image.Image, label: str) -> np.ndarray:
    """Modes I;16 (16-bit greyscale), I (the same, from older readers) and F (floats in [0, 1])."""
    values = np.asarray(image)
    if image.mode == "F":
        return values
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"{label} has grey values from {values.min()} to {values.max()}: save it with 8 or 16 bits a "
            "channel."
        )
    return values.astype(np.uint16)


def _from_cmyk(image: Image.Image, label: str) -> Image.Image:
    """CMYK has no colours of its own without a profile: use the embedded one, else Pillow's plain formula."""
    profile = image.info.get("icc_profile")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError) as error:
            logger.warning("%s has a colour profile that cannot be used (%s): it is left out.", label, error)
    return image.convert("RGB")


def _array_to_rgb(array: np.ndarray, label: str) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ValueError(
            f"{label} is an array of shape {array.shape}: give (height, width) or (height, width, 1, 3 or 4)."
        )
    _check_size((array.shape[1], array.shape[0]), label)
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ValueError(
                f"{label} is a {array.dtype} array with values outside [0, 1]: scale it, or use uint8."
            )
        array = np.rint(array.astype(np.float32) * 255).astype(np.uint8)
    elif array.dtype == np.uint16:
        array = ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"{label} is an array of {array.dtype}: give uint8, uint16, or floats in [0, 1].")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return _to_rgb(Image.fromarray(np.ascontiguousarray(array)), label)
