"""The page's own parts: the people's cards, the easel with boxes and picture, the shelf.

Each is a Gradio HTML component whose template never changes; its script, beside this file, draws from `value`
and tells of actions by events of its own. All text from visitors is set as text, never as markup.
"""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from withanyone.arrangements import ARRANGEMENTS
from withanyone.readout import Calibration

from .visits import Person, Picture, Visit

FOLDER = Path(__file__).parent
#: The people's colours, told apart by most eyes, with white text on them.
COLORS = ("#c8451f", "#2673a8", "#2f7d3a", "#7d4fc0", "#a06a00", "#0f7f7a", "#c03068", "#6d5a4b")


def people(value: dict[str, Any]) -> gr.HTML:
    """Cards of people. Events: `bring` (files arrived), `act` (anything else done to people)."""
    return _part("people", value)


def easel(value: dict[str, Any]) -> gr.HTML:
    """Boxes and picture. Events: `moved` (a box, by hand), `arrange`, `choose` (of a grid), `reuse`."""
    return _part("easel", value)


def shelf(value: dict[str, Any]) -> gr.HTML:
    """Pictures made so far. Event: `show` (one was clicked)."""
    return _part("shelf", value, 'role="group" aria-label="Your pictures"')


def _part(kind: str, value: dict[str, Any], attributes: str = "") -> gr.HTML:
    # No subclasses: Gradio writes a .pyi file beside the source of each when it is imported.
    return gr.HTML(
        value,
        html_template=f'<div class="wa-{kind}" {attributes}></div>',
        js_on_load=(FOLDER / f"{kind}.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        elem_id=kind,
    )


# -- values --------------------------------------------------------------------------------------------------


def color_of(person: Person) -> str:
    return COLORS[person.color % len(COLORS)]


def people_value(
    visit: Visit, common: dict[str, Any], notice: str = "", tone: str = "", number: int = 100
) -> dict[str, Any]:
    """What the cards show. common: what is the same for all visitors."""
    people = [
        {
            "id": person.id,
            "name": person.name,
            "color": color_of(person),
            "photos": [
                {
                    "id": photo.id,
                    "chosen": photo.chosen,
                    "faces": [data_uri(face.face_crop, 96) for face in photo.faces],
                }
                for photo in person.photos
            ],
        }
        for person in visit.people
    ]
    return {**common, "people": people, "notice": {"text": notice, "tone": tone}, "number": number}


def easel_value(
    people: list[dict[str, str]],
    boxes: list[list[float]],
    size: tuple[int, int],
    **more: Any,
) -> dict[str, Any]:
    """What the easel shows. more: state (idle, waiting, making, done, failed), picture, text, ..."""
    hint = "Drag the boxes to where each face shall be." if people else "The picture will be here."
    return {
        "width": size[0],
        "height": size[1],
        "people": people,
        "boxes": boxes,
        "arrangements": list(ARRANGEMENTS),
        "state": "idle",
        "picture": None,
        "alt": "",
        "file": None,
        "seed": -1,
        "fraction": 0,
        "text": "",
        "grid": None,
        "hint": hint,
        **more,
    }


def shelf_value(visit: Visit | None, current: str | None = None) -> dict[str, Any]:
    items = []
    for picture in reversed(list(visit.pictures.values()) if visit else []):
        with Image.open(picture.path) as image:
            thumb = data_uri(image.convert("RGB"), 136)
        items.append({"id": picture.id, "seed": picture.settings["seed"], "thumb": thumb})
    return {"items": items, "current": current}


def picture_uri(picture: Picture) -> str:
    """The whole file, settings and mark included, inside the page: it has no address of its own."""
    return "data:image/png;base64," + base64.b64encode(picture.path.read_bytes()).decode()


def data_uri(image: Image.Image, side: int) -> str:
    """A small JPEG of a picture."""
    image = image.convert("RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


# -- fixed pieces --------------------------------------------------------------------------------------------


def head(miniature: bool, notice: str) -> str:
    before = (
        f'<p class="wa-before"><strong>Before you upload:</strong> {escape(notice)}</p>' if miniature else ""
    )
    return (
        '<header class="wa-head"><h1>WithAnyone</h1>'
        "<p>Pictures of people you choose: give their faces, say what they do, drag them into place.</p>"
        "</header>" + (before if miniature else "")
    )


def ends(strip: str, left: str, right: str, what: str) -> str:
    """The words at a slider's two ends, under a strip of pictures that shows what it does."""
    file = FOLDER / "strips" / f"{strip}.jpg"
    image = ""
    if file.is_file():
        data = base64.b64encode(file.read_bytes()).decode()
        image = f'<img class="wa-strip" alt="{escape(what)}" src="data:image/jpeg;base64,{data}">'
    return f'{image}<div class="wa-ends"><span>← {escape(left)}</span><span>{escape(right)} →</span></div>'


def readout(picture: Picture | None, names: list[str], colors: list[str], calibration: Calibration) -> str:
    """What a picture shows of its people, in words, with the numbers behind a fold."""
    if picture is None or picture.reading is None:
        return '<div class="wa-readout" role="region" aria-label="How alike the people are"></div>'
    lines = "".join(
        f'<li style="--c:{color}"><span class="wa-dot" aria-hidden="true"></span>'
        f'<span class="wa-said" data-tone="{said["tone"]}">{"⚠ " if said["tone"] == "warn" else ""}'
        f"{escape(said['text'])}</span></li>"
        for said, color in zip(picture.said, colors, strict=True)
    )
    if picture.reading.extra:
        count = picture.reading.extra
        more = "another face that nobody asked for" if count == 1 else f"{count} faces that nobody asked for"
        lines += f'<li><span class="wa-said">There is {more}.</span></li>'

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{number(person.likeness)}</td><td>{number(person.copying)}</td></tr>"
        for name, person in zip(names, picture.reading.people, strict=True)
    )
    fold = (
        "<details><summary>The numbers</summary><table><thead><tr><th>person</th><th>likeness</th>"
        f"<th>copied</th></tr></thead><tbody>{rows}</tbody></table>"
        f"<p class='wa-small'>Likeness: 1 is the same photo. Two photos of one person have "
        f"{calibration.low:.2f} to {calibration.high:.2f}, {calibration.median:.2f} in the middle; strangers "
        f"stay below {calibration.stranger:.2f}. Copied: 0 is as alike as two photos of one person are, 1 is "
        "the very photo. A machine's estimate; trust your eyes too.</p></details>"
    )
    return (
        '<div class="wa-readout" role="region" aria-label="How alike the people are">'
        f"<ul>{lines}</ul>{fold}</div>"
    )
