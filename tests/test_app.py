"""The page's endpoints for programs, on a pipeline with random weights, and what may not be reached."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import time
from pathlib import Path

import gradio as gr
import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from PIL import Image

import app
import space.studio
from space.studio import Studio
from space.visits import Limits
from tests import tiny_faces
from withanyone import WithAnyonePipeline
from withanyone.arrangements import arrange
from withanyone.cli import main as cli
from withanyone.mini import gallery
from withanyone.mini.world import unknown_words
from withanyone.settings import MARK, read_settings


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> WithAnyonePipeline:
    pipe = WithAnyonePipeline.from_pretrained(tiny_model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def page(pipe):
    os.environ["GRADIO_IS_E2E_TEST"] = "1"  # heartbeats every quarter of a second
    demo = app.build_demo(pipe, limits=Limits(calls_per_minute=10_000, uploads_per_minute=10_000))
    _, demo.address, _ = demo.launch(
        prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", mcp_server=True
    )
    yield demo
    demo.close()
    del os.environ["GRADIO_IS_E2E_TEST"]


@pytest.fixture(scope="module")
def client(page, tmp_path_factory: pytest.TempPathFactory) -> Client:
    return Client(page.address, verbose=False, download_files=tmp_path_factory.mktemp("downloads"))


def arguments(photos: list[Path], **changes) -> dict:
    given = {f"photo_{i}": handle_file(photo) for i, photo in enumerate(photos, start=1)}
    settings = {"similarity": 1, "diversity": 0.5, "steps": 2, "guidance": 4, "seed": 0, "consent": True}
    return {"prompt": "ab", **given, **settings, **changes}


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_seed_0_is_a_seed_and_the_picture_carries_its_settings(client, painted_photos) -> None:
    first, settings, people = client.predict(**arguments(painted_photos[1:3]), api_name="/generate")
    again, _, _ = client.predict(**arguments(painted_photos[1:3]), api_name="/generate")
    assert np.array_equal(pixels(first), pixels(again))
    with Image.open(first) as image:
        assert image.info["Software"] == MARK
    assert read_settings(first) == settings
    assert settings["seed"] == 0 and settings["people"] == 2 and settings["diversity"] == 0.5
    assert settings["bboxes"] == [[round(v) for v in box] for box in arrange(2, 64, 64)]
    assert len(people["people"]) == len(people["words"]) == 2


def test_the_page_and_the_command_line_make_the_same_picture(
    client, painted_photos, tiny_model, tmp_path
) -> None:
    path, settings, _ = client.predict(**arguments(painted_photos[:1], seed=5), api_name="/generate")
    box = ",".join(str(value) for value in settings["bboxes"][0])
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
    command += ["--bbox", box, "--out", tmp_path / "out.png"]
    assert cli([str(part) for part in command]) == 0
    assert np.array_equal(pixels(path), pixels(tmp_path / "out.png"))


async def ask_mcp(address: str, tool: str | None, given: dict | None = None):
    from mcp import ClientSession
    from mcp.client.streamable_http import streamable_http_client

    url = f"{address.rstrip('/')}/gradio_api/mcp/"
    async with streamable_http_client(url) as (read, write, _), ClientSession(read, write) as session:
        await session.initialize()
        return await (session.call_tool(tool, given) if tool else session.list_tools())


def data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def test_an_mcp_client_makes_the_same_picture(page, client, painted_photos) -> None:
    mine, _, _ = client.predict(**arguments(painted_photos[1:3], seed=7), api_name="/generate")
    given = arguments([], seed=7) | {
        f"photo_{i}": data_url(p) for i, p in enumerate(painted_photos[1:3], start=1)
    }
    tools = asyncio.run(ask_mcp(page.address, None)).tools
    name = next(tool.name for tool in tools if tool.name.endswith("generate"))
    answer = asyncio.run(ask_mcp(page.address, name, given))
    assert not answer.isError, answer.content
    picture = next(part for part in answer.content if part.type == "image")
    theirs = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.data))))
    assert np.array_equal(pixels(mine), theirs)


def test_tools_describe_themselves(page) -> None:
    tools = {tool.name: tool for tool in asyncio.run(ask_mcp(page.address, None)).tools}
    assert {name.split("_", 1)[-1] if name not in tools else name for name in tools} and len(tools) == 3
    for name, tool in tools.items():
        parameters = tool.inputSchema["properties"]
        assert tool.description and all(part.get("description") for part in parameters.values()), name
    generate = next(tool for name, tool in tools.items() if name.endswith("generate"))
    assert "bboxes" in generate.inputSchema["properties"] and "seed" in generate.inputSchema["properties"]
    assert generate.inputSchema["properties"]["shape"]["enum"] == ["square", "landscape", "portrait"]


def test_the_page_names_its_endpoints_and_their_types(client) -> None:
    named = client.view_api(return_format="dict")["named_endpoints"]
    assert set(named) == {"/generate", "/find_faces", "/suggest_layout"}
    types = {p["parameter_name"]: p["python_type"]["type"] for p in named["/generate"]["parameters"]}
    assert (
        types["bboxes"] == "list[list[float]]" and types["seed"] == "int" and "filepath" in types["photo_1"]
    )


def test_several_photos_of_one_person(client, painted_photos) -> None:
    one = arguments(painted_photos[:2], person_of_photo=[1, 1])
    _, settings, people = client.predict(**one, api_name="/generate")
    assert settings["people"] == 1 and len(people["people"]) == 1


def test_a_new_seed_is_taken_and_told(client) -> None:
    seeds = {client.predict(**arguments([], seed=None), api_name="/generate")[1]["seed"] for _ in range(2)}
    assert len(seeds) == 2


def test_the_visible_mark_is_a_switch(client) -> None:
    plain, _, _ = client.predict(**arguments([]), api_name="/generate")
    marked, _, _ = client.predict(**arguments([], visible_mark=True), api_name="/generate")
    changed = (pixels(plain) != pixels(marked)).any(axis=2)
    assert changed[-8:, -8:].any() and not changed[:32].any()


def test_faces_are_found_and_a_layout_is_suggested(client, painted_photos) -> None:
    (face,) = client.predict(photo=handle_file(painted_photos[0]), api_name="/find_faces")
    assert np.allclose(face["bbox"], (20, 16, 90, 104), atol=2) and face["score"] > 0.5
    boxes = client.predict(
        num_people=3, width=192, height=128, arrangement="triangle", api_name="/suggest_layout"
    )
    assert np.allclose(boxes, arrange(3, 128, 192, "triangle"), atol=0.01)
    for wrong in ({"num_people": 9}, {"width": 0}, {"height": 10**9}, {"arrangement": "star"}):
        with pytest.raises(Exception, match="give"):
            client.predict(
                **{"num_people": 2, "width": 64, "height": 64, **wrong}, api_name="/suggest_layout"
            )


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"prompt": "  "}, "prompt"),
        ({"prompt": "a" * 10_000}, "2000"),
        ({"similarity": 2}, "1.5"),
        ({"diversity": -1}, "Diversity"),
        ({"similarity": None}, "Similarity"),
        ({"guidance": -1}, "Guidance"),
        ({"candidates": 9}, "Candidates"),
        ({"seed": -1}, "seed"),
        ({"steps": 100_000}, "100"),
        ({"bboxes": "here and there"}, "bboxes"),
        ({"bboxes": [[0, 0, 999, 30]]}, "outside"),
        ({"shape": "round"}, "round"),
        ({"consent": False}, "agree"),
        ({"person_of_photo": [2]}, "person_of_photo"),
        ({"drawn_people": [1]}, "drawn_people"),
        ({"photo_2": "data:image/png;base64,@@"}, "base64"),
        ({"photo_2": "http://127.0.0.1/photo.png"}, "not fetched"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_does_not_fit_is_a_message_and_the_page_goes_on(client, painted_photos, changes, named) -> None:
    with pytest.raises(Exception, match=named):
        client.predict(**arguments(painted_photos[:1], **changes), api_name="/generate")
    assert client.predict(num_people=1, width=64, height=64, api_name="/suggest_layout")


def test_numbers_that_json_does_not_have_are_refused(client) -> None:
    values = ["ab", *[None] * 10, float("nan"), 0.5, None, "square", 2, 4, 0, True, None, None]
    data = json.dumps({"data": values})
    call = f"{client.src}gradio_api/call/generate"
    answer = httpx.post(call, content=data, headers={"content-type": "application/json"})
    if answer.status_code == 200:
        stream = httpx.get(f"{call}/{answer.json()['event_id']}", timeout=60).text
        assert "event: error" in stream and "Similarity" in stream and "event: complete" not in stream
    else:
        assert 400 <= answer.status_code < 500
    assert client.predict(num_people=1, width=64, height=64, api_name="/suggest_layout")


@pytest.mark.parametrize("kind, named", [("blank", "[Nn]o face"), ("pdf", "PDF"), ("empty", "empty")])
def test_bad_photos_are_named(client, tmp_path, kind, named) -> None:
    photo = tmp_path / "photo.jpg"
    if kind == "blank":
        tiny_faces.blank().save(photo)
    else:
        photo.write_bytes(b"%PDF-1.7 and so on" if kind == "pdf" else b"")
    with pytest.raises(Exception, match=named):
        client.predict(**arguments([photo]), api_name="/generate")


@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "gradio.FileData"}}], ids=["plain", "file"])
@pytest.mark.parametrize("endpoint", ["find_faces", "generate"])
def test_files_of_the_server_are_out_of_reach(client, painted_photos, endpoint, meta) -> None:
    """A path that was not uploaded is refused, even where it names a photo with a face."""
    photo = {"path": str(painted_photos[0]), **meta}
    data = [photo] if endpoint == "find_faces" else ["ab", photo]
    if endpoint == "generate":
        data += [None] * 10 + [1, 0.5, None, "square", 2, 4, 0, True, None, None]
        data = data[:11] + data[12:]
    call = f"{client.src}gradio_api/call/{endpoint}"
    event = httpx.post(call, json={"data": data}).json()["event_id"]
    answer = httpx.get(f"{call}/{event}", timeout=60).text
    assert "event: error" in answer and "event: complete" not in answer


def test_a_programs_files_are_its_own_and_gone_when_it_closes(page, painted_photos, tmp_path) -> None:
    before = set(page.visits.inbox.iterdir())
    mine = Client(page.address, verbose=False, download_files=False)
    file, _, _ = mine.predict(**arguments(painted_photos[:1]), api_name="/generate")
    path = file["path"]
    address = f"{page.address}gradio_api/file={path}"
    answer = httpx.get(address)
    assert answer.status_code == 200 and "no-store" in answer.headers["cache-control"]
    assert len(Path(path).parent.name) == 48  # 192 random bits
    guesses = [Path(path).parent.parent, Path(path).parent, page.visits.root, page.visits.inbox]
    assert {httpx.get(f"{page.address}gradio_api/file={guess}").status_code for guess in guesses} == {403}
    assert set(page.visits.inbox.iterdir()) <= before  # the upload is gone already
    mine.close()
    deadline = time.monotonic() + 20
    while Path(path).exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(path).exists() and httpx.get(address).status_code == 403


def test_nothing_is_loaded_before_it_is_needed(tiny_model, monkeypatch) -> None:
    loads = []

    def load(settings):
        loads.append(settings.model)
        return WithAnyonePipeline.from_pretrained(settings.model), True

    monkeypatch.setattr(space.studio, "load", load)
    studio = Studio(settings=space.studio.Settings(model=str(tiny_model)))
    demo = app.build_demo(studio=studio)
    assert isinstance(demo, gr.Blocks) and studio.defaults["num_inference_steps"] == 2 and loads == []
    assert studio.pipe is studio.pipe and loads == [str(tiny_model)]
    demo.close()


def test_prompts_to_try_have_known_words_only() -> None:
    assert [
        word for texts in gallery.PROMPTS.values() for text in texts for word in unknown_words(text)
    ] == []


def test_drawn_people_stay_themselves_from_photo_to_photo_and_by_number() -> None:
    assert np.array_equal(np.asarray(gallery.draw_photo(7)), np.asarray(gallery.draw_photo(7)))
    assert not np.array_equal(np.asarray(gallery.draw_photo(7)), np.asarray(gallery.draw_photo(7, 1)))
    assert len(set(gallery.CAST.values())) == len(gallery.CAST)


def test_the_readme_has_the_front_matter_of_a_space() -> None:
    text = (Path(app.__file__).parent / "README.md").read_text(encoding="utf-8")
    head = text.split("---")[1]
    front = dict(
        line.split(": ", 1)
        for line in head.strip().splitlines()
        if not line.startswith((" ", "-")) and ": " in line
    )
    assert front["sdk"] == "gradio" and front["app_file"] == "app.py" and front["license"] == "apache-2.0"
    assert front["sdk_version"] == gr.__version__ and (Path(app.__file__).parent / front["app_file"]).exists()
    assert json.loads(json.dumps(front))["title"]


def test_the_examples_call_the_page_and_get_the_same_picture(page, painted_photos, tmp_path, capsys) -> None:
    from examples import call_the_page, call_the_page_by_mcp

    pictures = []
    for example in (call_the_page, call_the_page_by_mcp):
        out = tmp_path / f"{example.__name__}.png"
        given = [
            "--page",
            page.address,
            "--photo",
            painted_photos[0],
            "--prompt",
            "ab",
            "--steps",
            2,
            "--out",
            out,
        ]
        example.main([str(part) for part in given])
        pictures.append(pixels(out))
    assert np.array_equal(*pictures)
    assert "generate" in capsys.readouterr().out
