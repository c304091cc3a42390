"""The command line: what it writes and says, and one clear line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from tests import tiny_faces
from withanyone import WithAnyonePipeline
from withanyone.cli import main
from withanyone.mini import gallery
from withanyone.settings import MARK, read_settings, save_picture, slider_positions


@pytest.fixture
def generate(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Run `withanyone generate` on the tiny model; gives the exit code, stdout and stderr."""

    def run(*arguments: object, out: str = "out.png") -> tuple[int, str, str]:
        command = [
            "generate",
            "--model",
            tiny_model,
            "--device",
            "cpu",
            "--quiet",
            "--out",
            tmp_path / out,
            *arguments,
        ]
        code = main([str(part) for part in command])
        return code, *capsys.readouterr()

    return run


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_two_people_in_boxes_and_the_settings_in_the_file(generate, painted_photos, tmp_path) -> None:
    a, b, c, _ = painted_photos
    boxes = ["--bbox", "0,8,30,50", "--bbox", "34,8,64,50"]
    code, said, _ = generate(
        "--face", a, b, "--face", c, *boxes, "--prompt", "ab", "--seed", 0, "--similarity", 1.2
    )
    assert code == 0
    assert said == f"{tmp_path / 'out.png'}  (seed 0)\n"
    settings = read_settings(tmp_path / "out.png")
    assert settings["seed"] == 0 and settings["prompt"] == "ab" and settings["people"] == 2
    assert settings["bboxes"] == [[0, 8, 30, 50], [34, 8, 64, 50]]
    assert (settings["width"], settings["height"], settings["num_inference_steps"]) == (64, 64, 2)
    assert slider_positions(settings["id_scale"], settings["siglip_scale"]) == pytest.approx((1.2, 0.0))
    with Image.open(tmp_path / "out.png") as image:
        assert image.info["Software"] == MARK


def test_the_same_seed_gives_the_same_picture_and_each_of_several_can_be_made_alone(
    generate, painted_photos, tmp_path
) -> None:
    common = ["--face", painted_photos[0], "--prompt", "ab"]
    generate(*common, "--seed", 7, "--num-images", 2, out="two.png")
    generate(*common, "--seed", 7, out="first.png")
    code, said, _ = generate(*common, "--seed", 8, out="second.png")
    assert said.endswith("(seed 8)\n") and code == 0
    first, second = pixels(tmp_path / "two_1.png"), pixels(tmp_path / "two_2.png")
    # A batch of two and a picture alone differ by rounding only.
    assert np.abs(first.astype(int) - pixels(tmp_path / "first.png")).max() <= 1
    assert np.abs(second.astype(int) - pixels(tmp_path / "second.png")).max() <= 1
    assert np.abs(first.astype(int) - second).max() > 8


def test_without_a_seed_a_new_one_is_taken_and_said(generate, tmp_path) -> None:
    seeds = set()
    for name in ("a.png", "b.png"):
        code, said, _ = generate("--prompt", "ab", out=name)
        seeds.add(int(said.rsplit("seed ", 1)[1].rstrip(")\n")))
        assert code == 0 and read_settings(tmp_path / name)["seed"] in seeds
    assert len(seeds) == 2


def test_the_sliders_reach_the_adapter(generate, painted_photos, tmp_path) -> None:
    common = ["--face", painted_photos[0], "--prompt", "ab", "--seed", 3]
    generate(*common, "--similarity", 0, out="nobody.png")
    generate("--prompt", "ab", "--seed", 3, out="base.png")
    generate(*common, "--similarity", 1, "--diversity", 0, out="form.png")
    generate(*common, "--similarity", 1, "--diversity", 1, out="spirit.png")
    pictures = {name: pixels(tmp_path / f"{name}.png") for name in ("nobody", "base", "form", "spirit")}
    assert np.array_equal(pictures["nobody"], pictures["base"])
    assert not np.array_equal(pictures["form"], pictures["base"])
    assert not np.array_equal(pictures["form"], pictures["spirit"])


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_settings_survive_in_every_format(tmp_path, suffix) -> None:
    settings = {
        "prompt": "zwei Freunde, 두 친구",
        "seed": 0,
        "bboxes": [[1.5, 2, 3, 4]],
        "negative_prompt": None,
    }
    path = save_picture(Image.new("RGB", (32, 32), "teal"), tmp_path / f"picture.{suffix}", settings)
    assert read_settings(path) == settings


def test_a_picture_of_another_origin_has_no_settings(tmp_path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    assert read_settings(tmp_path / "other.png") is None


def _bad_cases() -> list[tuple[list[str], list[str]]]:
    """Arguments, and what the one line on stderr has to name."""
    return [
        (["--face", "{missing}"], ["faces[0]", "does not exist"]),
        (["--face", "{blank}"], ["faces[0]", "no face found"]),
        (["--face", "{text}"], ["faces[0]", "photo"]),
        (["--face", "{face}", "--bbox", "0,0,90,30"], ["bboxes[0]", "64"]),
        (["--face", "{face}", "--bbox", "0,0,30,30", "--bbox", "30,0,60,30"], ["bboxes", "2 boxes"]),
        (["--bbox", "0,0,30,30"], ["bboxes", "faces"]),
        (["--face", "{face}", "--similarity", "2"], ["similarity", "1.5"]),
        (["--face", "{face}", "--diversity", "nan"], ["diversity", "nan"]),
        (["--width", "65"], ["width", "64", "80"]),
        (["--steps", "0"], ["num_inference_steps"]),
        (["--candidates", "0"], ["num_candidates"]),
        (["--seed", "-1"], ["seed", "-1"]),
        (["--num-images", "0"], ["num_images"]),
        (["--out", "{folder}"], ["out"]),
        (["--out", "picture.gif"], ["out", ".png"]),
        (["--out", "{folder}/none/picture.png"], ["out", "folder"]),
        (["--width", "0"], ["width", "0"]),
        (["--device", "toaster"], ["device", "toaster"]),
        (["--device", "cuda:99"], ["device", "cuda:99"]),
        (["--device", "meta"], ["device", "meta"]),
        (["--offload", "model"], ["offload", "model", "cpu"]),
        (["--model", "{folder}"], ["{folder}"]),
        (["--model", "{folder}/none"], ["none"]),
        (["--face-pack", "{folder}"], ["{folder}", "onnx"]),
        (["--model", "someone/nowhere"], ["someone/nowhere", "Hub"]),
        (["--adapter", "{text}"], ["{text}"]),
        (["--adapter", "nowhere.safetensors"], ["nowhere.safetensors", "not a file"]),
        (["--image-encoder", "someone/nowhere"], ["image_encoder", "someone/nowhere"]),
    ]


@pytest.mark.parametrize("arguments, named", _bad_cases(), ids=lambda value: " ".join(value))
def test_a_mistake_is_one_line_that_names_it(generate, painted_photos, tmp_path, arguments, named) -> None:
    places = {
        "missing": tmp_path / "missing.png",
        "blank": tmp_path / "blank.png",
        "text": tmp_path / "text.png",
        "folder": tmp_path / "folder",
        "face": painted_photos[0],
    }
    tiny_faces.blank().save(places["blank"])
    places["text"].write_text("this is no picture")
    places["folder"].mkdir()
    filled = [part.format(**places) for part in arguments]
    code, said, complaint = generate("--prompt", "ab", *filled)
    last = complaint.strip().splitlines()[-1]
    assert code == 2 and said == ""
    assert last.startswith("withanyone: ") and "Traceback" not in complaint
    for word in named:
        assert word.format(**places) in last
    assert not (tmp_path / "out.png").exists()


def test_a_full_card_is_a_mistake_with_a_remedy(generate, monkeypatch) -> None:
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(WithAnyonePipeline, "__call__", full)
    code, said, complaint = generate("--prompt", "ab")
    assert code == 2 and said == "" and "Traceback" not in complaint
    assert "memory of the `device` is full" in complaint and "--offload model" in complaint


def test_quiet_is_quiet(generate, painted_photos) -> None:
    """No bar of any library; one line a picture."""
    code, said, complaint = generate("--prompt", "ab", "--face", painted_photos[0], "--seed", 1)
    assert code == 0 and len(said.splitlines()) == 1 and complaint == ""


@pytest.mark.parametrize("text", ["1,2,3", "1,2,3,4,5", "a,b,c,d", ""])
def test_a_box_that_is_none_is_refused_while_reading_arguments(generate, text, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        generate("--prompt", "ab", "--bbox", text)
    assert stop.value.code == 2
    assert "four numbers" in capsys.readouterr().err


def test_faces_are_listed_with_their_cosines(tiny_model, painted_photos, capsys) -> None:
    assert main(["faces", *map(str, painted_photos[:3]), "--model", str(tiny_model), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [face["photo"] for face in found["faces"]] == [str(path) for path in painted_photos[:3]]
    assert np.allclose(found["faces"][0]["bbox"], (20, 16, 90, 104), atol=2)
    cosines = np.array(found["cosines"])
    assert np.allclose(np.diag(cosines), 1, atol=1e-5) and np.allclose(cosines, cosines.T)
    assert cosines[0, 1] > 0.9 > cosines[0, 2] + 0.2  # the first two photos show one identity

    assert main(["faces", *map(str, painted_photos[:2]), "--model", str(tiny_model)]) == 0
    table = capsys.readouterr().out
    assert str(painted_photos[0]) in table and "1.000" in table


def test_a_photo_without_faces_is_said(tiny_model, tmp_path, capsys) -> None:
    tiny_faces.blank().save(tmp_path / "blank.png")
    assert main(["faces", str(tmp_path / "blank.png"), "--model", str(tiny_model)]) == 0
    assert "blank.png: no face found" in capsys.readouterr().out


def test_draw_writes_different_pictures_of_one_person(tmp_path, capsys) -> None:
    assert main(["draw", "3", "--photos", "2", "--out", str(tmp_path / "person.png")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "person_1.png"), str(tmp_path / "person_2.png")]
    assert not np.array_equal(pixels(tmp_path / "person_1.png"), pixels(tmp_path / "person_2.png"))
    assert main(["draw", "-1", "--out", str(tmp_path / "person.png")]) == 2
    assert "number" in capsys.readouterr().err


@pytest.fixture
def miniature(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Run `withanyone generate` with no model named: the bundled miniature, two steps."""

    def run(*arguments: object) -> tuple[int, str]:
        out = ["--out", tmp_path / "out.png", "--device", "cpu", "--quiet", "--steps", 2, "--seed", 0]
        return main([str(part) for part in ["generate", *out, *arguments]]), capsys.readouterr().err

    return run


def test_the_miniature_makes_two_drawn_people_and_names_words_it_does_not_know(miniature, tmp_path) -> None:
    main(["draw", "1", "--photos", "2", "--out", str(tmp_path / "a.png")])
    main(["draw", "2", "--out", str(tmp_path / "b.png")])
    faces = ["--face", tmp_path / "a_1.png", tmp_path / "a_2.png", "--face", tmp_path / "b.png"]
    code, complaint = miniature(*faces, "--prompt", "two people on a zeppelin")
    assert (
        code == 0
        and "zeppelin" in complaint
        and "people" not in complaint.split("zeppelin")[0].split(":")[-1]
    )
    assert pixels(tmp_path / "out.png").shape == (192, 192, 3)
    assert read_settings(tmp_path / "out.png")["model"] == "miniature"


def test_the_miniature_answers_the_photo_of_a_real_person_with_what_to_do(miniature, tmp_path) -> None:
    Image.fromarray(skimage.data.astronaut()).save(tmp_path / "real.png")
    code, complaint = miniature("--face", tmp_path / "real.png", "--prompt", "a smiling person")
    assert code == 2 and "no face found" in complaint and gallery.NOTICE in complaint
    assert not (tmp_path / "out.png").exists()


def test_help_needs_no_heavy_package() -> None:
    code = "import sys, withanyone.cli as cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
    code += "heavy = {'torch', 'diffusers', 'transformers', 'insightface'} & set(sys.modules)\n"
    code += "assert not heavy, heavy"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "generate" in done.stdout
