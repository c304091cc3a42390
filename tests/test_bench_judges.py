"""Judges by name: each loads from small random weights in its real format, or is absent and says so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests import bench_world, tiny_faces
from withanyone.bench import judges
from withanyone.bench.judges import Spec, expand, load_panel


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A face pack, recognisers as ONNX, a CLIP and a SigLIP with an aesthetic head; random weights."""
    folder = tmp_path_factory.mktemp("models")
    tiny_faces.write_pack(folder / "buffalo_l")
    tiny_faces.export_recognizer(tiny_faces.recognizer(1), folder / "adaface.onnx")
    write_facenet(folder / "facenet.onnx")
    write_clip(folder / "clip-vit-base-patch16")
    write_aesthetic(folder / "aesthetic-predictor-v2-5")
    return folder


def write_facenet(path: Path, channels_last: bool = False) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(3, 8, 7, 8), nn.ReLU(), nn.Conv2d(8, 8, 5, 4), nn.Flatten(), nn.Linear(128, 32)
            )

        def forward(self, x):
            return self.body(x.permute(0, 3, 1, 2) if channels_last else x)

    torch.manual_seed(3)
    shape = (1, 160, 160, 3) if channels_last else (1, 3, 160, 160)
    tiny_faces._export(Net(), torch.zeros(shape), path, ["embedding"], {})


def write_clip(folder: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

    folder.mkdir()
    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        *(f"{a}</w>" for a in "abcdefghijklmnopqrstuvwxyz0123456789"),
    ]
    vocabulary = {word: number for number, word in enumerate([*words, *"abcdefghijklmnopqrstuvwxyz"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"vocab_size": len(vocabulary), "max_position_embeddings": 24, "eos_token_id": 1}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=text, vision_config=small | {"image_size": 32, "patch_size": 8}, projection_dim=12
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder
    )


def write_aesthetic(folder: Path) -> None:
    from safetensors.torch import save_file
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(1)
    config = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32,
        patch_size=8,
    )  # fmt: skip
    SiglipVisionModel(config).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    shapes = {0: (8, 16), 2: (4, 8), 4: (1, 4)}
    head = {f"scoring_head.{n}.weight": torch.randn(shape) for n, shape in shapes.items()}
    head |= {f"scoring_head.{n}.bias": torch.randn(shape[0]) for n, shape in shapes.items()}
    save_file(head, folder / "head.safetensors")


def faces_of(panel: judges.Panel, identities: tuple[int, ...]) -> tuple[np.ndarray, list]:
    image = np.asarray(bench_world.target(identities))
    return image, panel.finder.analyzer.detect(image)


def test_the_papers_set_loads_from_one_folder(models: Path) -> None:
    panel = load_panel(["paper"], folder=models)
    assert panel.absent == {}
    assert panel.scoring == ["arcface", "facenet", "adaface"]
    assert [judge.name for judge in panel.pictures] == ["clip", "aesthetic"]
    image, faces = faces_of(panel, (2, 3))
    assert [judge.embed(image, faces).shape for judge in panel.recognizers] == [(2, 512), (2, 32), (2, 512)]
    versions = panel.versions()
    assert all("sha256" in versions[name] for name in ("finder", "arcface", "facenet", "adaface"))
    assert panel.fingerprint("clip") != panel.fingerprint("aesthetic")


def test_who_is_absent_is_named_and_nothing_stands_in(models: Path, tmp_path: Path) -> None:
    (tmp_path / "buffalo_l").symlink_to(models / "buffalo_l")
    (tmp_path / "adaface.onnx").write_bytes(b"no model")
    panel = load_panel(["paper"], folder=tmp_path)
    assert set(panel.absent) == {"facenet", "adaface", "clip", "aesthetic"}
    assert panel.scoring == ["arcface"]
    assert "is not a file" in panel.absent["facenet"]
    assert "not a readable ONNX" in panel.absent["adaface"]
    assert "head.safetensors" in panel.absent["aesthetic"]
    assert panel.versions()["clip"] == {"absent": panel.absent["clip"]}
    with pytest.raises(ValueError, match="facenet is absent"):
        load_panel(["paper"], folder=tmp_path, strict=True)
    with pytest.raises(ValueError, match="no face pack.*pack:FOLDER"):
        load_panel(["onnx:x.onnx"])


def test_the_pack_that_finds_the_faces_embeds_as_its_file_alone_does(models: Path) -> None:
    """One recogniser through insightface and as a bare ONNX file: the same direction."""
    pack = models / "buffalo_l"
    panel = load_panel([f"own=pack:{pack}", f"onnx:{pack / 'recognition.onnx'}", f"again=pack:{pack}"])
    image, faces = faces_of(panel, (4, 5))
    by_pack, by_other, by_file = (
        judge.embed(image, faces)
        for judge in sorted(
            panel.recognizers, key=lambda judge: ("own", "again", "recognition").index(judge.name)
        )
    )
    np.testing.assert_allclose(by_file, by_pack, atol=1e-3 * np.abs(by_pack).max())
    np.testing.assert_allclose(by_other, by_pack, atol=1e-5 * np.abs(by_pack).max())


def test_adaface_sees_bgr(models: Path) -> None:
    file = models / "adaface.onnx"
    panel = load_panel([f"pack:{models / 'buffalo_l'}", f"rgb=onnx:{file}", f"bgr=adaface:{file}"])
    image, faces = faces_of(panel, (4,))
    rgb, bgr = (judge for judge in panel.recognizers if judge.name in ("rgb", "bgr"))
    mirrored = np.ascontiguousarray(image[:, :, ::-1])
    np.testing.assert_allclose(bgr.embed(image, faces), rgb.embed(mirrored, faces), rtol=1e-4, atol=1e-4)
    assert np.abs(bgr.embed(image, faces) - rgb.embed(image, faces)).max() > 0.1


def test_facenet_sees_the_box_alone(models: Path, tmp_path: Path) -> None:
    write_facenet(tmp_path / "last.onnx", channels_last=True)
    panel = load_panel(
        [
            f"pack:{models / 'buffalo_l'}",
            f"facenet:{models / 'facenet.onnx'}",
            f"facenet:{tmp_path / 'last.onnx'}",
        ]
    )
    image, faces = faces_of(panel, (4,))
    facenet, last = panel.recognizers[1:]
    before = facenet.embed(image, faces)
    np.testing.assert_allclose(last.embed(image, faces), before, atol=1e-5)  # layout of channels
    around = image.copy()
    x1, y1, x2, y2 = (int(v) for v in faces[0].bbox)
    around[: y1 - 1] = 255
    np.testing.assert_array_equal(facenet.embed(around, faces), before)
    inside = image.copy()
    inside[y1 + 5 : y2 - 5, x1 + 5 : x2 - 5] = 255
    assert np.abs(facenet.embed(inside, faces) - before).max() > 1e-3
    assert facenet.embed(image, []).shape[0] == 0


def test_clip_scores_pictures_and_prompts(models: Path) -> None:
    panel = load_panel([f"pack:{models / 'buffalo_l'}", f"clip:{models / 'clip-vit-base-patch16'}"])
    (clip,) = panel.pictures
    made = clip.features(bench_world.target((1,)))
    other = clip.features(Image.new("RGB", (64, 64), "red"))
    scores = clip.score(made, made, "a person")
    assert scores["clip_i"] == pytest.approx(1)
    assert -1 <= scores["clip_t"] <= 1
    assert clip.score(other, made, "a person")["clip_i"] < 1
    assert clip.score(made, made, "b")["clip_t"] != scores["clip_t"]
    assert set(clip.score(made, None, "a person")) == {"clip_t"}
    long = clip.score(made, made, "a b c " * 40)  # longer than the text encoder takes
    assert np.isfinite(long["clip_t"])


def test_the_aesthetic_head_is_a_chain_of_linear_layers(models: Path) -> None:
    from safetensors.torch import load_file

    where = models / "aesthetic-predictor-v2-5"
    judge = judges.AestheticJudge("aesthetic", str(where), "cpu")
    image = bench_world.target((1,))
    pixels = judge._processor(images=image, return_tensors="pt").pixel_values
    with torch.no_grad():
        hidden = judge._model(pixel_values=pixels).pooler_output[0]
        hidden = hidden / hidden.norm()
        head = load_file(where / "head.safetensors")
        for n in (0, 2, 4):
            hidden = head[f"scoring_head.{n}.weight"] @ hidden + head[f"scoring_head.{n}.bias"]
    score = judge.score(judge.features(image), None, "")["aesthetic"]
    assert score == pytest.approx(float(hidden), abs=1e-5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cilp:folder", "Did you mean 'clip'"),
        ("pak:folder", "Did you mean 'pack'.*Available: pack, onnx"),
        ("nonsense", "give NAME=KIND:WHERE"),
        ("pack:", "give NAME=KIND:WHERE"),
    ],
)
def test_an_unknown_judge_gets_help(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Spec.parse(text)


def test_names_and_places_of_judges() -> None:
    assert Spec.parse("x=onnx:a/b.onnx") == Spec("x", "onnx", "a/b.onnx")
    assert Spec.parse("onnx:a=1/b.onnx") == Spec("b", "onnx", "a=1/b.onnx")
    assert Spec.parse("my.module:judges").kind == "my.module"
    assert expand(["mini", "clip:x"]) == ["withanyone.mini.benching:judges", "clip:x"]
    assert expand(["paper"], "here")[1] == "facenet=facenet:here/facenet.onnx"


def test_two_judges_of_one_name_and_a_wrong_size_are_refused(models: Path, tmp_path: Path) -> None:
    pack = f"pack:{models / 'buffalo_l'}"
    with pytest.raises(ValueError, match="several of one name: buffalo_l"):
        load_panel([pack, pack])
    panel = load_panel([pack, f"onnx:{models / 'facenet.onnx'}"])
    assert "(B, 3, 112, 112) is needed" in panel.absent["facenet"]
    panel = load_panel([pack, "no.such.module:judges", "withanyone.bench.judges:nothing"])
    assert "No module named 'no'" in panel.absent["no.such.module:judges"]
    assert "has no 'nothing'" in panel.absent["withanyone.bench.judges:nothing"]


def test_the_coach_is_shown_and_never_averaged(models: Path) -> None:
    panel = load_panel([f"coach=pack:{models / 'buffalo_l'}", f"onnx:{models / 'adaface.onnx'}"])
    assert [judge.name for judge in panel.recognizers] == ["coach", "adaface"]
    assert panel.scoring == ["adaface"]
    assert load_panel([f"coach=pack:{models / 'buffalo_l'}"]).scoring == ["coach"]  # nobody else is there
