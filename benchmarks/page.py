"""The page's pictures in the README, taken in headless Chromium: figures/page-{light,dark,phone}.png.

    python -m benchmarks.page [--out figures] [--address http://127.0.0.1:7860]

Starts `python app.py` with the miniature, takes drawn people, makes a picture, and looks at the page: on a
desktop in light and dark, and on a phone of 375 pixels.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from benchmarks.first_picture import start, stop

#: name -> (width, height, dark?, people, shape, seed)
VIEWS = {
    "light": (1280, 1500, False, ("Farid", "Gita"), "landscape", 4),
    "dark": (1280, 1500, True, ("Ada", "Edda", "Kaya"), "square", 7),
    "phone": (375, 812, False, ("Gita",), "square", 3),
}
PROMPTS = {
    1: "a smiling person at the beach",
    2: "two people at the beach in daylight",
    3: "three friends at sunset",
}


def take(chromium, address: str, name: str, out: Path) -> Path:
    """One view of the page with a picture made on it."""
    width, height, dark, people, shape, seed = VIEWS[name]
    context = chromium.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if dark else "light",
        has_touch=name == "phone",
        device_scale_factor=1.5 if name == "phone" else 1,
    )
    page = context.new_page()
    page.set_default_timeout(120_000)
    page.goto(f"{address}/?__theme={'dark' if dark else 'light'}")
    page.wait_for_selector(".wa-frame")
    for i, person in enumerate(people, start=1):
        page.get_by_role("button", name=f"Take {person}").click()
        page.wait_for_function(f"document.querySelectorAll('[data-person]').length === {i}")
    page.get_by_label(shape, exact=True).check()
    page.locator("#prompt textarea").fill(PROMPTS[len(people)])
    page.locator("#seed input").fill(str(seed))
    page.locator("#new-seed input").uncheck()
    page.locator("#consent input").check()
    page.locator("#make").click()
    page.wait_for_function("document.querySelector('.wa-easel').dataset.state === 'done'")
    if name == "dark":
        page.get_by_role("button", name="Boxes", exact=True).click()
    page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
    page.mouse.move(2, 2)
    page.wait_for_timeout(800)
    path = out / f"page-{name}.png"
    if name == "phone":  # what a hand sees at once
        page.locator(".wa-frame").evaluate(
            "frame => window.scrollBy(0, frame.getBoundingClientRect().top - 16)"
        )
        page.wait_for_timeout(400)
    page.screenshot(path=path, full_page=name != "phone")
    context.close()
    return path


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("figures"))
    parser.add_argument("--address", help="of a running page; without it one is started")
    args = parser.parse_args(argv)
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise SystemExit("Chromium is missing: apt-get install chromium.")
    process, address = (None, args.address) if args.address else start()
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            for name in VIEWS:
                print(take(browser, address, name, args.out))
            browser.close()
    finally:
        if process:
            stop(process)


if __name__ == "__main__":
    main()
