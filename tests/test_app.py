"""The page: what a visitor and a program get from it, on a pipeline with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import gradio as gr
import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from PIL import Image

import app
from tests import tiny_faces
from withanyone import WithAnyonePipeline
from withanyone.cli import main as cli
from withanyone.layout import default_bboxes
from withanyone.mini import gallery
from withanyone.mini.world import unknown_words
from withanyone.settings import MARK, read_settings


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> WithAnyonePipeline:
    pipe = WithAnyonePipeline.from_pretrained(tiny_model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def client(pipe: WithAnyonePipeline, tmp_path_factory: pytest.TempPathFactory):
    """A program's view of the page, served on this machine."""
    demo = app.build_demo(pipe)
    _, address, _ = demo.queue().launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    yield Client(address, verbose=False, download_files=tmp_path_factory.mktemp("downloads"))
    demo.close()


def arguments(photos: list[Path], **changes) -> dict:
    given = [handle_file(photo) for photo in photos] + [None] * (app.MAX_PEOPLE - len(photos))
    people = {f"photo_{i}": photo for i, photo in enumerate(given, start=1)}
    settings = {"similarity": 1, "diversity": 0.5, "shape": "square", "steps": 2, "guidance": 4, "boxes": ""}
    return {"prompt": "ab", **people, **settings, "seed": 0, "new_seed": False, **changes}


def test_seed_0_is_a_seed_and_the_picture_carries_its_settings(client, painted_photos) -> None:
    first, seed, said = client.predict(**arguments(painted_photos[1:3]), api_name="/generate")
    again, _, _ = client.predict(**arguments(painted_photos[1:3]), api_name="/generate")
    assert seed == 0 and "2 people" in said and "seed 0" in said
    with Image.open(first) as a, Image.open(again) as b:
        assert np.array_equal(np.asarray(a), np.asarray(b))
        assert a.info["Software"] == MARK
    settings = read_settings(first)
    assert settings["seed"] == 0 and settings["people"] == 2 and settings["diversity"] == 0.5
    assert np.allclose(settings["bboxes"], default_bboxes(2, 64, 64), atol=0.01)


def test_the_page_and_the_command_line_make_the_same_picture(
    client, painted_photos, tiny_model, tmp_path
) -> None:
    path, _, _ = client.predict(**arguments(painted_photos[:1], seed=5), api_name="/generate")
    command = ["generate", "--model", tiny_model, "--device", "cpu", "--quiet", "--face", painted_photos[0]]
    command += [
        "--prompt",
        "ab",
        "--seed",
        5,
        "--similarity",
        1,
        "--diversity",
        0.5,
        "--steps",
        2,
        "--guidance",
        4,
    ]
    assert cli([str(part) for part in [*command, "--out", tmp_path / "out.png"]]) == 0
    with Image.open(path) as page, Image.open(tmp_path / "out.png") as command_line:
        assert np.array_equal(np.asarray(page), np.asarray(command_line))


def test_a_new_seed_is_taken_and_told(client) -> None:
    seeds = {client.predict(**arguments([], new_seed=True), api_name="/generate")[1] for _ in range(2)}
    assert len(seeds) == 2


def test_faces_are_found_for_programs_too(client, painted_photos) -> None:
    (face,) = client.predict(photo=handle_file(painted_photos[0]), api_name="/find_faces")
    assert np.allclose(face["bbox"], (20, 16, 90, 104), atol=2) and face["score"] > 0.5


def test_a_layout_is_suggested(client) -> None:
    boxes = client.predict(num_people=3, width=192, height=128, api_name="/suggest_layout")
    assert np.allclose(boxes, default_bboxes(3, 128, 192))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"prompt": "  "}, "prompt"),
        ({"prompt": "a" * 10_000}, "2000"),
        ({"similarity": 2}, "1.5"),
        ({"diversity": -1}, "diversity"),
        ({"similarity": None}, "similarity"),
        ({"guidance": -1}, "guidance_scale"),
        ({"seed": -1}, "seed"),
        ({"steps": 100_000}, "100"),
        ({"boxes": "here and there"}, "x1, y1, x2, y2"),
        ({"boxes": "[[0, 0, 999, 30]]"}, "bboxes"),
        ({"shape": "round"}, "round"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_does_not_fit_is_a_message_and_the_page_goes_on(client, painted_photos, changes, named) -> None:
    with pytest.raises(Exception, match=named):
        client.predict(**arguments(painted_photos[:1], **changes), api_name="/generate")
    assert client.predict(num_people=1, width=64, height=64, api_name="/suggest_layout")


@pytest.mark.parametrize("kind, named", [("blank", "no face found"), ("pdf", "PDF"), ("empty", "empty")])
def test_bad_photos_are_named(client, tmp_path, kind, named) -> None:
    photo = tmp_path / "photo.jpg"
    if kind == "blank":
        tiny_faces.blank().save(photo)
    else:
        photo.write_bytes(b"%PDF-1.7 and so on" if kind == "pdf" else b"")
    with pytest.raises(Exception, match=named):
        client.predict(**arguments([photo]), api_name="/generate")


def test_what_is_said_at_the_upload(pipe, painted_photos, tmp_path, monkeypatch) -> None:
    studio = app.Studio(pipe)
    tiny_faces.blank().save(tmp_path / "blank.png")
    two = tiny_faces.paint_face(Image.open(painted_photos[0]), (94, 20, 126, 60), 4)
    two.save(tmp_path / "two.png")
    (tmp_path / "text.png").write_text("no picture")
    assert app.describe_faces(studio, None) == ""
    assert app.describe_faces(studio, str(painted_photos[0])) == "✓ Face found."
    assert "No face" in app.describe_faces(studio, str(tmp_path / "blank.png"))
    assert "2 faces" in app.describe_faces(studio, str(tmp_path / "two.png"))
    assert "could not be read" in app.describe_faces(studio, str(tmp_path / "text.png"))
    studio.miniature = True
    assert gallery.NOTICE in app.describe_faces(studio, str(tmp_path / "blank.png"))
    monkeypatch.setattr(
        gallery, "DRAWN_SCORE", 0.999
    )  # as a photo of a real person, of whose face it is not sure
    assert gallery.NOTICE in app.describe_faces(studio, str(painted_photos[0]))


def test_the_miniature_names_words_it_does_not_know(pipe) -> None:
    studio = app.Studio(pipe)
    assert app.describe_words(studio, "two people on a zeppelin") == ""
    studio.miniature = True
    assert "zeppelin" in app.describe_words(studio, "two people on a zeppelin")
    assert app.describe_words(studio, gallery.PROMPTS[2][0]) == ""


def test_prompts_to_try_have_known_words_only() -> None:
    assert [
        word for texts in gallery.PROMPTS.values() for text in texts for word in unknown_words(text)
    ] == []


def test_drawn_people_stay_themselves_from_photo_to_photo_and_by_number() -> None:
    assert np.array_equal(np.asarray(gallery.draw_photo(7)), np.asarray(gallery.draw_photo(7)))
    assert not np.array_equal(np.asarray(gallery.draw_photo(7)), np.asarray(gallery.draw_photo(7, 1)))
    assert len(set(gallery.CAST.values())) == len(gallery.CAST)


def test_nothing_is_loaded_before_it_is_needed(tiny_model, monkeypatch) -> None:
    loads = []
    monkeypatch.setattr(
        app, "load_pipeline", lambda model: loads.append(model) or WithAnyonePipeline.from_pretrained(model)
    )
    studio = app.Studio(model=tiny_model)
    assert isinstance(app.build_demo(studio=studio), gr.Blocks)
    assert studio.defaults["num_inference_steps"] == 2 and loads == []
    assert studio.pipe is studio.pipe and loads == [str(tiny_model)]


def test_the_page_names_its_endpoints(client) -> None:
    named = client.view_api(return_format="dict")["named_endpoints"]
    assert set(named) == {"/generate", "/find_faces", "/suggest_layout"}
    assert json.dumps(named)


@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "gradio.FileData"}}], ids=["plain", "file"])
@pytest.mark.parametrize("endpoint", ["find_faces", "generate"])
def test_files_of_the_server_are_out_of_reach(client, painted_photos, endpoint, meta) -> None:
    """A path that was not uploaded is refused, even where it names a photo with a face."""
    photo = {"path": str(painted_photos[0]), **meta}
    data = [photo] if endpoint == "find_faces" else list(arguments([]).values())
    if endpoint == "generate":
        data[1] = photo
    call = f"{client.src}gradio_api/call/{endpoint}"
    event = httpx.post(call, json={"data": data}).json()["event_id"]
    answer = httpx.get(f"{call}/{event}", timeout=60).text
    assert "event: error" in answer and "event: complete" not in answer
