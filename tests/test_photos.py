"""Photos of every kind are read right, upright and in RGB, or refused with the reason and the remedy."""

from __future__ import annotations

import io
import logging
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.pictures import assert_same, encoded, noise
from withanyone.photos import MAX_PHOTO_PIXELS, load_image


def test_every_kind_of_source_gives_the_same_picture(tmp_path):
    pixels = noise()
    data = encoded(Image.fromarray(pixels), "PNG")
    path = tmp_path / "photo.png"
    path.write_bytes(data)
    for source in (path, str(path), data, bytearray(data), memoryview(data), Image.fromarray(pixels), pixels):
        assert_same(load_image(source), pixels)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "JPEG2000"])
def test_lossless_formats_are_read_exactly(format):
    options = {"lossless": True} if format == "WEBP" else {}
    assert_same(load_image(encoded(Image.fromarray(noise()), format, **options)), noise())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    upright = noise()
    stored = {  # how a camera stores the upright picture under each orientation
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    assert_same(load_image(data), upright)
    with Image.open(io.BytesIO(data)) as lazy:  # a PIL image brings its EXIF along
        assert_same(load_image(lazy), upright)


def test_damaged_exif_is_reported_and_the_photo_still_read(caplog):
    data = encoded(Image.fromarray(noise()), "PNG", exif=b"Exif\0\0not what it should be")
    with caplog.at_level(logging.WARNING):
        assert_same(load_image(data, "faces[0]"), noise())
    assert "`faces[0]`" in caplog.text and "EXIF" in caplog.text


def test_alpha_is_laid_on_white():
    rgba = noise(channels=4)
    alpha = rgba[..., 3:].astype(float) / 255
    expected = np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha))
    assert_same(load_image(encoded(Image.fromarray(rgba), "PNG")), expected, atol=1)
    grey_alpha = Image.fromarray(rgba).convert("LA")
    grey = np.asarray(grey_alpha)[..., :1].astype(float)
    expected = np.rint(grey * alpha + 255 * (1 - alpha)).repeat(3, axis=2)
    assert_same(load_image(encoded(grey_alpha, "PNG")), expected, atol=1)


def test_transparent_palette_and_colour_keys_are_laid_on_white():
    indices = noise(channels=1) % 4
    palette = Image.fromarray(indices, "L").convert("P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 10, 20, 30])
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 20, 30]], np.uint8)
    assert_same(load_image(encoded(palette, "PNG")), colours[indices])
    colours[1] = 255
    assert_same(load_image(encoded(palette, "PNG", transparency=1)), colours[indices])
    pixels = noise()
    pixels[:20] = (1, 2, 3)
    keyed = encoded(Image.fromarray(pixels), "PNG", transparency=(1, 2, 3))
    pixels[:20] = 255
    assert_same(load_image(keyed), pixels)


def test_greyscale_of_1_8_and_16_bits_keeps_its_tones():
    wide = np.linspace(0, 65535, 40 * 56).reshape(40, 56).round().astype(np.uint16)
    expected = np.rint(wide / 257).astype(np.uint8)[..., None].repeat(3, axis=2)
    assert expected.min() == 0 and expected.max() == 255
    assert_same(load_image(encoded(Image.fromarray(wide), "PNG")), expected)
    assert_same(load_image(encoded(Image.fromarray(wide), "TIFF")), expected)
    big_endian = Image.frombytes("I;16B", (56, 40), wide.astype(">u2").tobytes())
    assert_same(load_image(encoded(big_endian, "TIFF")), expected)
    assert_same(load_image(Image.fromarray(wide.astype(np.int32))), expected)  # how older readers open them
    assert_same(load_image(wide), expected)
    narrow = expected[..., 0]
    assert_same(load_image(encoded(Image.fromarray(narrow), "PNG")), expected)
    bits = Image.fromarray(noise(channels=1)).convert("1")
    black_white = np.asarray(bits)[..., None].repeat(3, axis=2) * np.uint8(255)
    assert_same(load_image(encoded(bits, "PNG")), black_white)


def test_sixteen_bit_photo_is_turned_upright_too():
    wide = np.arange(40 * 56, dtype=np.uint16).reshape(40, 56) * 29
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(np.ascontiguousarray(np.rot90(wide))), "PNG", exif=exif)
    assert_same(load_image(data), np.rint(wide / 257).astype(np.uint8)[..., None].repeat(3, axis=2))


def test_cmyk_jpeg_keeps_its_colours(caplog):
    for color in ((200, 30, 40), (20, 160, 60), (30, 50, 190), (240, 240, 240), (0, 0, 0)):
        photo = Image.new("RGB", (48, 32), color).convert("CMYK")
        assert_same(load_image(encoded(photo, "JPEG", quality=98)), np.full((32, 48, 3), color), atol=4)
    with caplog.at_level(logging.WARNING):
        data = encoded(photo, "JPEG", quality=98, icc_profile=b"not a colour profile")
        assert_same(load_image(data, "faces[2]"), np.zeros((32, 48, 3)), atol=4)
    assert "faces[2]" in caplog.text and "profile" in caplog.text


def test_arrays_of_floats_and_greys():
    pixels = noise()
    assert_same(load_image(pixels / np.float32(255)), pixels)
    assert_same(load_image(pixels.astype(np.float64) / 255), pixels)
    assert_same(load_image(pixels.astype(np.uint16) * 257), pixels)
    assert_same(load_image(pixels[:, ::-1]), pixels[:, ::-1])  # a view of negative strides
    grey = pixels[..., 0]
    assert_same(load_image(grey), grey[..., None].repeat(3, axis=2))
    assert_same(load_image(grey[..., None]), grey[..., None].repeat(3, axis=2))


def test_result_is_apart_from_its_source():
    source = Image.fromarray(noise())
    load_image(source).paste((0, 0, 0), (0, 0, 56, 40))
    assert_same(source, noise())


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be of this size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def cut(format: str) -> bytes:
    data = encoded(Image.fromarray(noise(200, 200)), format)
    return data[: len(data) // 2]


BAD_FILES = {
    "empty": (b"", "empty", "again"),
    "text": (b"hello, this is no photo", "could not be read as a picture", "JPEG"),
    "pdf": (b"%PDF-1.7\n1 0 obj", "a PDF document", "JPEG"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC", "JPEG"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG", "JPEG"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript", "JPEG"),
    "video": (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2", "a video", "JPEG"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull", "JPEG"),
    "cut jpeg": (cut("JPEG"), "cut off", "again"),
    "cut png": (cut("PNG"), "cut off", "again"),
    "cut webp": (cut("WEBP"), "damaged", "JPEG"),
    "cut gif": (cut("GIF"), "cut off", "again"),
    "one pixel": (encoded(Image.new("RGB", (1, 1)), "PNG"), "1 x 1", "at least"),
    "one line": (encoded(Image.new("RGB", (400, 3)), "PNG"), "400 x 3", "at least"),
    "bomb": (png_header(60000, 60000), "megapixels", "smaller copy"),
    "large": (png_header(9100, 9000), "9100 x 9000", "smaller copy"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_named_with_the_reason_and_the_remedy(case, tmp_path):
    data, reason, remedy = BAD_FILES[case]
    path = tmp_path / "portrait.jpg"
    path.write_bytes(data)
    for source in (data, path):
        with pytest.raises(ValueError) as error:
            load_image(source, "faces[1]")
        message = str(error.value)
        assert "`faces[1]`" in message
        assert reason in message
        assert remedy in message
    assert "portrait.jpg" in message


def test_size_limit_is_checked_before_decoding():
    assert MAX_PHOTO_PIXELS < 9100 * 9000
    lazy = Image.open(io.BytesIO(png_header(9100, 9000)))
    with pytest.raises(ValueError, match="megapixels"):
        load_image(lazy)
    assert lazy._im is None  # nothing was decoded
    with pytest.raises(ValueError, match="megapixels"):  # no memory is touched for this array
        load_image(np.broadcast_to(np.zeros(3, np.uint8), (9000, 9100, 3)))


@pytest.mark.parametrize(
    "source, reason",
    [
        (None, "NoneType"),
        (3, "int"),
        ([1, 2], "list"),
        ("https://example.org/a.jpg", "download"),
        ("/no/such/file.jpg", "does not exist"),
        (np.zeros((40, 40, 2), np.uint8), "(40, 40, 2)"),
        (np.zeros((1, 40, 40, 3), np.uint8), "(1, 40, 40, 3)"),
        (np.zeros((0, 40, 3), np.uint8), "40 x 0"),
        (np.zeros((40, 40, 3), np.int64), "int64"),
        (np.zeros((40, 40), bool), "bool"),
        (np.full((40, 40, 3), np.nan), "outside [0, 1]"),
        (np.full((40, 40, 3), 200.0), "outside [0, 1]"),
        (Image.new("La", (40, 40)), "La"),
        (Image.new("I", (40, 40), -5), "-5"),
        (Image.new("RGB", (1, 1)), "1 x 1"),
    ],
)
def test_bad_source_is_named_with_the_reason(source, reason):
    with pytest.raises(ValueError) as error:
        load_image(source, "faces[0]")
    assert "`faces[0]`" in str(error.value)
    assert reason in str(error.value)


def test_folder_and_closed_image_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        load_image(tmp_path)
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(noise()), "PNG"))
    with Image.open(tmp_path / "a.png") as image:
        pass
    with pytest.raises(ValueError, match="`photo`"):
        load_image(image)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "JPEG2000", "PPM"])
def test_damage_anywhere_gives_a_picture_or_a_value_error(format):
    rng = np.random.default_rng(0)
    whole = encoded(Image.fromarray(noise()).convert("P" if format == "GIF" else "RGB"), format)
    refused = 0
    for trial in range(60):
        data = bytearray(whole)
        reach = len(data) if trial % 2 else min(len(data), 100)  # half of the hits go to the header
        for _ in range(rng.integers(1, 8)):
            data[rng.integers(reach)] = rng.integers(256)
        try:
            assert load_image(bytes(data)).mode == "RGB"
        except ValueError as error:
            assert "`photo`" in str(error)
            refused += 1
    assert refused > 0
