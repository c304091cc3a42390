"""Every example runs: on a pipeline with random weights, and as it stands on the bundled miniature."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from diffusers import FluxPipeline
from PIL import Image

from examples import (
    draw_people,
    flux_dev_released_weights,
    one_face,
    several_photos,
    two_faces_in_boxes,
    with_lora,
)
from tests import tiny, tiny_faces
from withanyone import FaceAdapter


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def run(example, out: Path, *arguments: object) -> np.ndarray:
    example.main([str(part) for part in (*arguments, "--out", out)])
    return pixels(out)


def test_one_face(tiny_model, painted_photos, tmp_path) -> None:
    common = ["--model", tiny_model, "--face", painted_photos[0], "--prompt", "ab"]
    picture = run(one_face, tmp_path / "face.png", *common)
    base = run(one_face, tmp_path / "base.png", *common, "--similarity", 0)
    assert picture.shape == (64, 64, 3) and not np.array_equal(picture, base)


def test_two_faces_in_boxes(tiny_model, painted_photos, tmp_path) -> None:
    a, _, b, _ = painted_photos
    common = ["--model", tiny_model, "--prompt", "ab"]
    picture = run(two_faces_in_boxes, tmp_path / "ab.png", *common, "--face", a, "--face", b)
    swapped = run(two_faces_in_boxes, tmp_path / "ba.png", *common, "--face", b, "--face", a)
    assert picture.shape == (192, 256, 3) and not np.array_equal(picture, swapped)


def test_several_photos(tiny_model, painted_photos, tmp_path, capsys) -> None:
    picture = run(several_photos, tmp_path / "a.png", "--model", tiny_model, "--photos", *painted_photos[:2])
    assert picture.shape == (64, 64, 3)
    assert "photo 2: cosine 1.00 to photo 1" in capsys.readouterr().out  # one identity, painted twice


def test_with_lora(tiny_model, painted_photos, tmp_path) -> None:
    common = ["--model", tiny_model, "--face", painted_photos[0], "--prompt", "ab"]
    with_it = run(with_lora, tmp_path / "with.png", *common)
    without = run(with_lora, tmp_path / "without.png", *common, "--strength", 0)
    assert not np.array_equal(with_it, without)


def test_drawn_people(tmp_path) -> None:
    draw_people.main(["--numbers", "5", "6", "--photos", "2", "--size", "64", "--out", str(tmp_path)])
    assert pixels(tmp_path / "sheet.png").shape == (128, 128, 3)
    assert np.array_equal(pixels(tmp_path / "sheet.png")[64:, :64], pixels(tmp_path / "6_0.png"))


@pytest.fixture(scope="module")
def flux_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What one has after downloading FLUX.1, the released adapter, SigLIP and a face pack; all tiny."""
    folder = tmp_path_factory.mktemp("downloads")
    FluxPipeline(**tiny.flux_components()).save_pretrained(folder / "flux")
    tiny.face_adapter().save_single_file(folder / "withanyone.safetensors")
    tiny.image_encoder().save_pretrained(folder / "siglip")
    tiny.feature_extractor().save_pretrained(folder / "siglip")
    tiny_faces.write_pack(folder / "antelopev2" / "antelopev2", settings={})  # as its archive unpacks
    return {
        "--model": folder / "flux",
        "--adapter": folder / "withanyone.safetensors",
        "--image-encoder": folder / "siglip",
        "--face-pack": folder / "antelopev2",
    }


@pytest.mark.parametrize("quantize, offload", [("none", "none"), ("int8", "model"), ("none", "group")])
def test_released_weights_on_flux_dev(flux_files, painted_photos, tmp_path, quantize, offload) -> None:
    files = [part for pair in flux_files.items() for part in pair]
    faces = ["--face", painted_photos[0], "--face", painted_photos[2]]
    common = [*files, *faces, "--prompt", "ab", "--size", 64, "--steps", 2, "--device", "cpu"]
    picture = run(
        flux_dev_released_weights, tmp_path / "out.png", *common, "--quantize", quantize, "--offload", offload
    )
    assert picture.shape == (64, 64, 3) and picture.std() > 1


def test_the_released_adapter_is_what_the_example_loads(flux_files) -> None:
    loaded = flux_dev_released_weights.load(
        *(
            str(path)
            for path in (
                flux_files["--model"],
                flux_files["--adapter"],
                flux_files["--face-pack"],
                flux_files["--image-encoder"],
            )
        ),
        quantize="none",
    )
    given = FaceAdapter.from_single_file(flux_files["--adapter"])
    assert loaded.face_adapter.config.inner_dim == given.config.inner_dim == 64
    assert loaded.face_analyzer.crop_size == 512 and loaded.transformer.config.num_layers == tiny.NUM_LAYERS


@pytest.mark.slow
@pytest.mark.parametrize(
    "example, size",
    [
        (one_face, (128, 128)),
        (two_faces_in_boxes, (256, 192)),
        (several_photos, (128, 128)),
        (with_lora, (128, 128)),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_as_it_stands_on_the_miniature(example, size, tmp_path) -> None:
    """Nothing given but where to write: drawn people, the bundled model."""
    picture = run(example, tmp_path / "out.png")
    assert picture.shape == (size[1], size[0], 3)
    assert picture.std() > 15  # a picture, not a grey


@pytest.mark.slow
def test_the_lines_of_the_readme(tmp_path, monkeypatch) -> None:
    """The five lines of Python under "Try it", as they stand."""
    text = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(.*?)```", text, flags=re.S).group(1)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    assert pixels(tmp_path / "beach.png").std() > 15
