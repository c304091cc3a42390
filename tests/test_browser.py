"""The page as a visitor has it: the miniature in headless Chromium, by mouse, keys and touch."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gradio_client import Client, handle_file
from PIL import Image

import app
from space.studio import Studio
from tests.test_app import ask_mcp, data_url
from withanyone.mini import gallery
from withanyone.settings import MARK, read_settings

pytestmark = pytest.mark.browser
SECOND = 1000  # Playwright counts milliseconds


@pytest.fixture(scope="module")
def page():
    """The page on the miniature, served on this machine."""
    os.environ["GRADIO_IS_E2E_TEST"] = "1"  # heartbeats every quarter of a second
    studio = Studio()
    studio.warm_up()
    demo = app.build_demo(studio=studio)
    _, demo.address, _ = demo.launch(
        prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", mcp_server=True
    )
    yield demo
    demo.close()
    del os.environ["GRADIO_IS_E2E_TEST"]


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert path, "Chromium is missing: `apt-get install chromium`, or run `make browser` as root."
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


#: Keeps every state of the easel from now on, with what the page said in it.
WATCH = """() => {
  window.seen = [];
  document.querySelector('.wa-easel').dataset.state = '';  // what was is no news
  if (window.watching) window.watching.disconnect();
  window.watching = new MutationObserver(() => {
    const easel = document.querySelector('.wa-easel'), said = document.querySelector('.wa-status');
    if (easel && easel.dataset.state) window.seen.push([easel.dataset.state, said ? said.innerText : '']);
  });
  window.watching.observe(document.body, {
    subtree: true, childList: true, characterData: true, attributes: true, attributeFilter: ['data-state'],
  });
}"""


class Visitor:
    """One visitor's page, and what people do on it."""

    def __init__(self, chromium, address: str, **context):
        self.context = chromium.new_context(**{"viewport": {"width": 1280, "height": 1500}, **context})
        self.page = self.context.new_page()
        self.page.set_default_timeout(60 * SECOND)
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(address)
        self.page.wait_for_selector(".wa-frame")

    def status(self) -> str:
        return self.page.locator(".wa-status").inner_text()

    def state(self) -> str:
        return self.page.locator(".wa-easel").get_attribute("data-state")

    def notice(self, text: str) -> str:
        """The line under the cards, once it holds `text` (a regular expression)."""
        place = self.page.locator(".wa-notice").filter(has_text=re.compile(text))
        place.wait_for()
        return place.inner_text()

    def people(self, count: int) -> None:
        self.page.wait_for_function(f"document.querySelectorAll('[data-person]').length === {count}")

    def take(self, *names: str) -> None:
        before = self.page.locator("[data-person]").count()
        for i, name in enumerate(names, start=1):
            self.page.get_by_role("button", name=f"Take {name}").click()
            self.people(before + i)

    def boxes(self) -> list[list[float]]:
        self.more()
        return json.loads(self.page.locator("#boxes-text textarea").input_value() or "[]")

    def more(self) -> None:
        """Open the further settings."""
        if not self.page.locator("#boxes-text textarea").is_visible():
            self.page.locator("#more button").first.click()
            self.page.locator("#boxes-text textarea").wait_for()

    def slider(self, name: str, value: float) -> None:
        self.more()
        field = self.page.locator(f"#{name} input[type=number]")
        field.fill(str(value))
        field.press("Enter")

    def value(self, name: str) -> float:
        return float(self.page.locator(f"#{name} input[type=number]").first.input_value())

    def make(self, button: str = "make", until: str = "done|failed") -> set[str]:
        """Press the button, wait for the end, and return everything that was said on the way."""
        # The page itself keeps what it goes through: on a busy machine, a look now and then misses states.
        self.page.evaluate(WATCH)
        self.page.locator(f"#{button}").click()
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            seen = self.page.evaluate("window.seen")
            started = any(state in ("waiting", "making", "failed") for state, _ in seen)
            if started and re.fullmatch(until, seen[-1][0]):
                return {said for _, said in seen} | {self.status()}
            time.sleep(0.03)
        raise AssertionError(f"still {self.state()}: {seen}")

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """With the mouse, in pixels of the picture."""
        frame = self.page.locator(".wa-boxes").bounding_box()
        width, height = map(float, self.page.locator(".wa-boxes").get_attribute("viewBox").split()[2:])

        def at(point: tuple[float, float]) -> tuple[float, float]:
            return (
                frame["x"] + point[0] / width * frame["width"],
                frame["y"] + point[1] / height * frame["height"],
            )

        self.page.mouse.move(*at(start))
        self.page.mouse.down()
        self.page.mouse.move(*at(((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)), steps=3)
        self.page.mouse.move(*at(end), steps=3)
        self.page.mouse.up()

    def drop(self, path: Path) -> None:
        """A file dropped on the page."""
        data = base64.b64encode(path.read_bytes()).decode()
        transfer = self.page.evaluate_handle(
            """([data, name]) => {
                const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
                const transfer = new DataTransfer();
                transfer.items.add(new File([bytes], name, { type: "image/png" }));
                return transfer;
            }""",
            [data, path.name],
        )
        self.page.dispatch_event("body", "drop", {"dataTransfer": transfer})

    def close(self) -> None:
        self.context.close()


@pytest.fixture
def visitor(chromium, page) -> Iterator[Visitor]:
    visitor = Visitor(chromium, page.address)
    yield visitor
    visitor.close()
    assert visitor.errors == []


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    for number in (1, 2):
        gallery.draw_photo(number).save(folder / f"{number}.png")
    return [folder / "1.png", folder / "2.png"]


def upload(visitor: Visitor, *files: Path) -> None:
    visitor.page.locator("#wa-upload").set_input_files([str(file) for file in files])


def pixels(source: str | Path | io.BytesIO) -> np.ndarray:
    with Image.open(source) as image:
        return np.asarray(image.convert("RGB"))


def test_a_whole_visit(visitor, page, photos, tmp_path) -> None:
    # 1. Two faces, uploaded; the page says at once that they were found.
    upload(visitor, *photos)
    visitor.people(2)
    assert "found" in visitor.notice("Person 2")
    visitor.page.locator(".wa-name").first.fill("Ada")
    visitor.page.locator(".wa-name").first.press("Enter")
    visitor.page.locator(".wa-box text").filter(has_text="Ada").wait_for()

    # 2. A box, moved and resized by mouse; it stays valid beyond the canvas' edge.
    first, second = visitor.boxes()
    middle = ((first[0] + first[2]) / 2, (first[1] + first[3]) / 2)
    visitor.drag(middle, (middle[0] + 5, middle[1] - 12))
    visitor.page.wait_for_timeout(300)
    moved, other = visitor.boxes()
    assert other == second and np.allclose(np.subtract(moved, first), [5, -12, 5, -12], atol=2)
    visitor.drag((second[2], second[3]), (500, second[3] + 10))
    visitor.page.wait_for_timeout(300)
    assert visitor.boxes()[1][2] == 192 and visitor.boxes()[1][:2] == second[:2]

    # 3. Both sliders; a picture with its progress, and what was read out of it.
    visitor.page.locator("#similarity input[type=range]").focus()
    visitor.page.keyboard.press("ArrowLeft")
    assert visitor.value("similarity") == pytest.approx(0.95)
    visitor.slider("diversity", 0.5)
    visitor.slider("steps", 8)
    visitor.page.locator("#prompt textarea").fill("two people at the beach")
    assert "agree" in "".join(visitor.make(until="failed"))  # consent comes first
    visitor.page.locator("#consent input").check()
    frame = visitor.page.locator(".wa-frame").bounding_box()
    below = visitor.page.locator("#make-row").bounding_box()
    said = visitor.make()
    assert sum("of 8" in text for text in said) >= 3, said
    assert visitor.page.locator(".wa-frame").bounding_box() == frame  # no layout jump
    assert visitor.page.locator("#make-row").bounding_box() == below
    assert visitor.page.locator(".wa-readout li").count() >= 2
    assert "Ada" in visitor.page.locator(".wa-readout li").first.inner_text()
    assert not visitor.page.locator(".wa-readout table").is_visible()  # numbers stand behind a fold
    visitor.page.locator(".wa-readout summary").click()
    assert visitor.page.locator(".wa-readout table").is_visible()

    # 4. Downloaded, with settings and mark; the seed used is shown.
    with visitor.page.expect_download() as download:
        visitor.page.get_by_role("button", name="Download").click()
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    settings = read_settings(path)
    assert settings["seed"] == visitor.value("seed") and settings["bboxes"] == visitor.boxes()
    with Image.open(path) as image:
        assert image.info["Software"] == MARK

    # 5. A program, by gradio_client and by MCP, makes the same picture.
    asked = {
        "prompt": settings["prompt"],
        "similarity": settings["similarity"],
        "diversity": settings["diversity"],
        "bboxes": settings["bboxes"],
        "steps": 8,
        "seed": settings["seed"],
        "consent": True,
    }
    client = Client(page.address, verbose=False, download_files=tmp_path)
    by_client, _, _ = client.predict(
        photo_1=handle_file(photos[0]), photo_2=handle_file(photos[1]), **asked, api_name="/generate"
    )
    assert np.array_equal(pixels(by_client), pixels(path))
    tool = next(t.name for t in asyncio_run(ask_mcp(page.address, None)).tools if t.name.endswith("generate"))
    answer = asyncio_run(
        ask_mcp(page.address, tool, {**asked, "photo_1": data_url(photos[0]), "photo_2": data_url(photos[1])})
    )
    picture = next(part.data for part in answer.content if part.type == "image")
    assert np.array_equal(pixels(io.BytesIO(base64.b64decode(picture))), pixels(path))
    client.close()

    # 6. Another one, cancelled while it forms, at once.
    visitor.slider("steps", 100)
    visitor.page.locator("#make").click()
    visitor.page.wait_for_function("/Step [1-9]/.test(document.querySelector('.wa-status').textContent)")
    started = time.monotonic()
    visitor.page.locator("#cancel").click()
    visitor.page.wait_for_function("document.querySelector('.wa-status').textContent === 'Cancelled.'")
    assert time.monotonic() - started < 5
    assert visitor.page.locator("#make").is_enabled()

    # 7. A sweep: a grid to choose from, and the sliders go there.
    visitor.slider("steps", 2)
    visitor.make("sweep")
    cells = visitor.page.locator("button.wa-cell")
    assert cells.count() == 9
    cells.nth(8).click()
    visitor.page.wait_for_function("document.querySelector('.wa-grid').hidden")
    assert (visitor.value("similarity"), visitor.value("diversity")) == (1.4, 1.0)

    # 8. The first picture's file, dropped on the page, brings its settings back.
    visitor.page.locator("#prompt textarea").fill("something else")
    visitor.drop(path)
    visitor.notice("settings of this picture are back")
    visitor.page.wait_for_function(
        "document.querySelector('#prompt textarea').value === 'two people at the beach'"
    )
    assert visitor.value("seed") == settings["seed"] and visitor.value("steps") == 8
    assert visitor.value("similarity") == pytest.approx(0.95) and visitor.boxes() == settings["bboxes"]
    visitor.make()
    visitor.page.locator("#new-seed input").uncheck()

    # 9. After a reload the page is new, and nothing of before is left on the server.
    before = {file.parent for file in page.visits.root.rglob("*.png")}
    assert before
    visitor.page.reload()
    visitor.page.wait_for_selector(".wa-frame")
    visitor.people(0)
    assert visitor.page.locator(".wa-thumb").count() == 0
    gone(before)


def asyncio_run(task):
    """Playwright has an event loop in this thread: another thread gets one of its own."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, task).result()


def gone(folders: set[Path]) -> None:
    deadline = time.monotonic() + 30
    while any(folder.exists() for folder in folders) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(folder.exists() for folder in folders)


def test_bad_files_are_answered_in_words_and_the_page_goes_on(visitor, tmp_path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"%PDF-1.7 and so on")
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(100_000_000)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "wide.png")
    Image.new("RGB", (200, 200), "teal").save(tmp_path / "wall.png")
    for name, words in (
        ("holiday.jpg", "is a PDF document"),
        ("large.png", "100 MB"),
        ("wide.png", "megapixels"),
        ("wall.png", "No drawn face.*drawn people only"),
    ):
        upload(visitor, tmp_path / name)
        visitor.notice(words)
        visitor.people(0)
    visitor.take("Ada")


def test_bad_wishes_are_answered_in_words_and_the_page_goes_on(visitor) -> None:
    visitor.slider("steps", 1)
    prompt = visitor.page.locator("#prompt textarea")
    prompt.fill("")
    assert "empty" in "".join(visitor.make(until="failed"))
    prompt.fill("a" * 10_000)
    assert "2000" in "".join(visitor.make(until="failed"))
    prompt.fill("해변의 두 사람, a person on a zeppelin")
    words = visitor.page.locator("#words")
    visitor.page.wait_for_function("document.querySelector('#words').textContent.includes('zeppelin')")
    assert "해변의" in words.inner_text()
    prompt.fill('<img src=x onerror="document.title=1"> **bold** person')
    visitor.page.wait_for_function("document.querySelector('#words').textContent.includes('onerror')")
    assert words.locator("img, strong").count() == 0
    visitor.make()
    assert visitor.page.title() == "WithAnyone"

    names = [name for name, _ in zip(gallery.CAST, range(9), strict=False)]
    visitor.take(*names[:8])
    visitor.page.get_by_role("button", name=f"Take {names[8]}").click()
    visitor.notice("8 people at most")
    visitor.page.locator("#consent input").check()
    visitor.more()
    field = visitor.page.locator("#boxes-text textarea")
    for text, words_ in (("[[0, 0, 9999, 20]]", "outside|boxes"), ("here", "not readable")):
        field.fill(text)
        field.press("Tab")
        visitor.page.wait_for_function(f"/{words_}/.test(document.querySelector('.wa-status').textContent)")
    field.fill("")
    field.press("Tab")
    visitor.page.wait_for_function("document.querySelector('.wa-status').textContent === ''")
    visitor.make(until="done")
    name = visitor.page.locator(".wa-name").first
    name.fill("<b onclick=1>x")
    name.press("Enter")
    visitor.page.locator(".wa-box text").filter(has_text="<b onclick").wait_for()


def test_faces_of_a_group_photo_can_be_chosen_or_all_taken(visitor, tmp_path) -> None:
    group = Image.new("RGB", (512, 256))
    group.paste(gallery.draw_photo(3), (0, 0))
    group.paste(gallery.draw_photo(6), (256, 0))
    group.save(tmp_path / "group.png")
    upload(visitor, tmp_path / "group.png")
    visitor.notice("2 faces")
    assert visitor.page.locator(".wa-pick").count() == 2
    visitor.page.get_by_role("button", name="Face 2 of 2").click()
    visitor.notice("is face 2")
    visitor.page.get_by_role("button", name="Take all as 2 people").click()
    visitor.people(2)


def test_a_broken_connection_ends_the_job_and_the_next_visitor_is_served(chromium, page, visitor) -> None:
    lost = Visitor(chromium, page.address)
    lost.slider("steps", 100)
    lost.page.locator("#make").click()
    lost.page.wait_for_function("/Step [1-9]/.test(document.querySelector('.wa-status').textContent)")
    folders = set(page.visits.root.iterdir())
    lost.close()
    visitor.slider("steps", 1)
    visitor.make()
    gone({folder for folder in folders if not (folder / "x").exists()} - set(page.visits.root.iterdir()))


def test_another_visitors_pictures_have_no_address(chromium, page, visitor) -> None:
    other = Visitor(chromium, page.address)
    other.slider("steps", 1)
    other.make()
    asked: list[str] = []
    other.page.on("request", lambda request: asked.append(request.url))
    other.page.locator(".wa-thumb").first.click()
    other.page.wait_for_timeout(500)
    assert not [url for url in asked if "file=" in url]
    files = list(page.visits.root.rglob("*.png"))
    assert files
    for file in files:
        assert visitor.context.request.get(f"{page.address}gradio_api/file={file}").status == 403
    other.close()


def test_on_a_phone_by_touch_and_keyboard(chromium, page) -> None:
    phone = Visitor(
        chromium, page.address, viewport={"width": 375, "height": 740}, has_touch=True, is_mobile=True
    )
    phone.take("Bela")
    too_wide = phone.page.evaluate(
        """() => document.documentElement.scrollWidth <= 375 ? [] : [...document.querySelectorAll("body *")]
            .filter((e) => e.getBoundingClientRect().right > 375 && !e.closest(".wa-gallery, .wa-shelf"))
            .map((e) => e.tagName + "." + e.className + "#" + e.id)"""
    )
    assert too_wide == [], too_wide
    before = phone.boxes()
    box = phone.page.locator(".wa-box").first
    box.focus()
    phone.page.keyboard.press("ArrowRight")
    phone.page.wait_for_timeout(300)
    moved = phone.boxes()
    assert moved[0][0] > before[0][0] and moved[0][2] - moved[0][0] == before[0][2] - before[0][0]
    phone.page.locator(".wa-frame").scroll_into_view_if_needed()
    at = phone.page.locator(".wa-body").first.bounding_box()
    x, y = at["x"] + at["width"] / 2, at["y"] + at["height"] / 2
    session = phone.context.new_cdp_session(phone.page)
    for kind, points in (("touchStart", [(x, y)]), ("touchMove", [(x, y - 30)]), ("touchEnd", [])):
        points = [{"x": px, "y": py} for px, py in points]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    phone.page.wait_for_timeout(400)
    assert phone.boxes()[0][1] < moved[0][1]
    nameless = phone.page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea, [role=button]")]
            .filter((e) => e.offsetParent !== null || e.ownerSVGElement)
            .filter((e) => !(e.getAttribute("aria-label") || e.textContent.trim() || e.title
                || (e.labels && e.labels.length) || e.getAttribute("aria-labelledby")))
            .map((e) => e.outerHTML.slice(0, 120))"""
    )
    assert nameless == []
    assert phone.errors == []
    phone.close()
