"""The page: its parts in their places, and what happens when."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anyio
import gradio as gr
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware

from withanyone import WithAnyonePipeline
from withanyone.layout import check_bboxes
from withanyone.mini import gallery
from withanyone.settings import slider_positions

from . import parts
from .desk import FLUX_PROMPTS, SWEEP_DIVERSITY, SWEEP_SIMILARITY, Desk, look_of, plain
from .guard import Guard, visitor_address
from .programs import Programs, add_endpoints
from .studio import MAX_SEED, SHAPES, Cancelled, Failed, Made, Order, Studio, Waiting, Withheld, Working
from .visits import Limits, Picture, Visit, Visits

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
PRIVATE = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
#: Fields that a picture made here brings back when dropped on the page, in their order as events' inputs.
SETTINGS = ("prompt", "similarity", "diversity", "shape", "steps", "guidance", "candidates", "seed")
#: Changes of the easel's boxes go into the text field inside the browser, so that none is late.
BOXES_TO_TEXT = "() => window.withanyoneBoxes"


class Page(gr.Blocks):
    """Blocks that launch with their theme, their styles and their guard, and that clean up when closed."""

    def __init__(self, studio: Studio, limits: Limits | None = None):
        super().__init__(title="WithAnyone", analytics_enabled=False)
        self.studio = studio
        self.visits = Visits(get_upload_folder(), limits)
        self.visits.forget = self.forget
        self.desk = Desk(studio, self.visits)

    def launch(self, *args: Any, **kwargs: Any) -> Any:
        guard = Middleware(Guard, visits=self.visits, behind_proxy=self.studio.settings.public)
        kwargs.setdefault("app_kwargs", {}).setdefault("middleware", []).append(guard)
        kwargs.setdefault("theme", theme())
        kwargs.setdefault("css", (FOLDER / "page.css").read_text(encoding="utf-8"))
        kwargs.setdefault("max_file_size", self.visits.limits.upload_bytes)
        kwargs.setdefault("show_error", True)
        kwargs.setdefault("ssr_mode", False)
        kwargs.setdefault("run_history", False)
        kwargs.setdefault("enable_monitoring", False)
        kwargs.setdefault("footer_links", ["api", "settings"])
        launched = super().launch(*args, **kwargs)
        give_all_outputs(getattr(self, "mcp_server_obj", None))
        return launched

    def close(self, *args: Any, **kwargs: Any) -> None:
        super().close(*args, **kwargs)
        self.visits.close()

    def forget(self, session: str) -> None:
        """Drop what Gradio itself still holds of a session: the last values of its parts."""
        holder = getattr(self, "state_holder", None)
        if holder is not None:
            holder.session_data.pop(session, None)
            holder.time_last_used.pop(session, None)

    def leave(self, request: gr.Request) -> None:
        """The visitor has closed the page (or a program its client)."""
        session = request.session_hash
        self.visits.end(session)
        if session:
            threading.Timer(1.0, self.forget, (session,)).start()


def give_all_outputs(mcp_server: Any) -> None:
    """Gradio 6.31 answers an MCP client that wants no progress with all outputs of a tool as one text, where
    others get a picture and two texts: let it give the outputs one by one to both."""
    if mcp_server is None:
        return

    async def outputs(job: Any) -> list[Any]:
        result = await anyio.to_thread.run_sync(job.result)
        return list(result) if isinstance(result, tuple) else [result]

    mcp_server._execute_tool_without_progress = outputs


def theme() -> gr.themes.Base:
    """Plain surfaces, the system's own fonts (none is fetched), one accent colour."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    made = gr.themes.Soft(
        primary_hue="orange",
        secondary_hue="orange",
        neutral_hue="stone",
        font=fonts,
        font_mono=["ui-monospace", "monospace"],
    )
    return made.set(
        block_title_background_fill="none",
        block_title_background_fill_dark="none",
        block_title_text_color="*body_text_color",
        block_title_text_color_dark="*body_text_color",
        block_title_padding="0",
        block_title_text_weight="600",
        block_label_background_fill="none",
        block_label_background_fill_dark="none",
        block_label_text_color="*body_text_color",
        block_label_text_color_dark="*body_text_color",
        block_border_width="1px",
        block_border_width_dark="1px",
        block_border_color="#ded9d4",
        block_border_color_dark="#4a4541",
        border_color_primary="#cfc8c2",
        border_color_primary_dark="#57514c",
        body_text_color_subdued="#5f5853",
        body_text_color_subdued_dark="#b9b1aa",
        button_primary_background_fill="#c2410c",
        button_primary_background_fill_hover="#9a3412",
        button_primary_background_fill_dark="#c2410c",
        button_primary_background_fill_hover_dark="#ea580c",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#ffffff",
        link_text_color="#b23a0a",
        link_text_color_dark="#ffa676",
        color_accent="#c2410c",
        slider_color="#c2410c",
        checkbox_border_color="#8a827b",
        checkbox_border_color_dark="#8a827b",
        checkbox_border_width="1px",
        input_border_color="#cfc8c2",
        input_border_color_dark="#57514c",
        input_border_width="1px",
        input_border_width_dark="1px",
        button_secondary_border_color="#cfc8c2",
        button_secondary_border_color_dark="#57514c",
        button_border_width="1px",
    )


def build_demo(
    pipe: WithAnyonePipeline | None = None, studio: Studio | None = None, limits: Limits | None = None
) -> gr.Blocks:
    """The page, on a pipeline, or on a studio that loads one when it is first needed (the miniature)."""
    studio = studio or Studio(pipe)
    page = Page(studio, limits)
    with page:
        _Builder(page).build()
    return page.queue(max_size=64, default_concurrency_limit=None)


@dataclass(frozen=True)
class Asked:
    """What stands in the page's fields when a button is pressed, unchecked."""

    prompt: str
    similarity: float
    diversity: float
    shape: str
    steps: int
    guidance: float
    candidates: int
    seed: int
    new_seed: bool
    count: int
    boxes: str
    consent: bool
    visible: bool


class _Builder:
    """Lays the page out and wires it. Its methods that take a `gr.Request` are the page's events."""

    def __init__(self, page: Page):
        self.page, self.desk, self.studio, self.visits = page, page.desk, page.studio, page.visits
        self.limits = page.visits.limits

    def build(self) -> None:
        self.lay_out()
        self.wire()
        add_endpoints(Programs(self.desk, self.studio.settings.public))

    # -- places ----------------------------------------------------------------------------------------------

    def lay_out(self) -> None:
        studio, defaults = self.studio, self.studio.defaults
        similarity, diversity = slider_positions(defaults["id_scale"], defaults["siglip_scale"])
        examples = FLUX_PROMPTS
        if studio.miniature:
            examples = (*gallery.PROMPTS[2], gallery.PROMPTS[1][0])
        gr.HTML(parts.head(studio.miniature, gallery.NOTICE), padding=False)
        self.people = parts.people(self.empty_people())
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                self.prompt = gr.Textbox(
                    label="What the picture shows",
                    lines=3,
                    max_lines=6,
                    value=gallery.PROMPTS[2][0] if studio.miniature else FLUX_PROMPTS[0],
                    elem_id="prompt",
                )
                self.words = gr.Markdown(container=False, elem_classes="wa-words", elem_id="words")
                gr.Examples(
                    [[text] for text in examples[:4]],
                    [self.prompt],
                    label="Or try one of these",
                    api_visibility="private",
                    elem_id="examples",
                )
                self.similarity = self.slider(
                    0, 1.5, similarity, 0.05, "Similarity", "How much the faces count", "similarity"
                )
                gr.HTML(
                    parts.ends(
                        "similarity",
                        "anybody",
                        "very much like the photo",
                        "From left to right: the same picture with similarity 0, 0.5, 1 and 1.5",
                    ),
                    padding=False,
                    elem_classes="wa-under",
                )
                self.diversity = self.slider(
                    0, 1, diversity, 0.05, "Diversity", "What may change about them", "diversity"
                )
                gr.HTML(
                    parts.ends(
                        "diversity",
                        "hair and expression as in the photo",
                        "only who it is stays",
                        "From left to right: the same picture with diversity 0, 0.33, 0.67 and 1",
                    ),
                    padding=False,
                    elem_classes="wa-under",
                )
                with gr.Row():
                    self.shape = gr.Radio(list(SHAPES), value="square", label="Shape", elem_id="shape")
                with gr.Accordion("More settings", open=False, elem_id="more"):
                    self.count = self.slider(
                        1,
                        self.limits.pictures_at_once,
                        1,
                        1,
                        "Number of pictures",
                        "Each with its own seed",
                        "count",
                    )
                    self.steps = self.slider(
                        1,
                        self.limits.steps,
                        defaults["num_inference_steps"],
                        1,
                        "Steps",
                        "More: finer, slower",
                        "steps",
                    )
                    self.guidance = self.slider(
                        1,
                        10,
                        defaults[studio.guidance_name],
                        0.1,
                        "Guidance",
                        "How closely to follow the words",
                        "guidance",
                    )
                    self.candidates = self.slider(
                        1,
                        self.limits.candidates,
                        defaults["num_candidates"],
                        1,
                        "Candidates",
                        "Of each picture; the likest faces go on. More: likelier, slower",
                        "candidates",
                    )
                    self.visible = gr.Checkbox(
                        studio.marks_visibly,
                        label="Write “AI-generated” on the picture",
                        info="Its file says so in any case",
                        elem_id="visible",
                    )
                    self.boxes = gr.Textbox(
                        label="Boxes of the faces",
                        info="Pixels, as JSON: [[x1, y1, x2, y2], ...], one for each person",
                        elem_id="boxes-text",
                        max_lines=4,
                    )
                    self.restore = gr.File(
                        label="Restore settings from a picture made here",
                        file_types=["image"],
                        height=110,
                        elem_id="restore",
                    )
            with gr.Column(scale=6, min_width=320):
                self.easel = parts.easel(parts.easel_value([], [], studio.size("square", 0)))
                self.consent = gr.Checkbox(
                    False,
                    label="The people in the photos agree to this (drawn people need not be asked)"
                    if studio.miniature
                    else "The people in the photos, or their guardians, agree to this",
                    elem_id="consent",
                )
                with gr.Row(elem_id="make-row"):
                    self.make = gr.Button(
                        "Make the picture", variant="primary", elem_id="make", min_width=130
                    )
                    self.sweep = gr.Button("Compare sliders", elem_id="sweep", min_width=110)
                    self.cancel = gr.Button(
                        "Cancel", variant="stop", interactive=False, elem_id="cancel", min_width=80
                    )
                with gr.Row(elem_id="seed-row"):
                    self.seed = gr.Number(0, label="Seed", precision=0, elem_id="seed", min_width=130)
                    self.dice = gr.Button("Roll the dice", elem_id="dice", min_width=110)
                    self.new_seed = gr.Checkbox(
                        True, label="A new seed each time", elem_id="new-seed", min_width=170
                    )
                self.readout = gr.HTML(
                    parts.readout(None, [], [], studio.calibration), padding=False, elem_id="readout"
                )
                self.shelf = parts.shelf(parts.shelf_value(None))
        gr.HTML(
            '<p class="wa-foot">Photos are deleted as soon as their faces are found; faces and pictures are '
            "kept only while this page is open. Every picture's file says that a model made it, and with "
            "which settings: drop it on the page to get them back.</p>",
            padding=False,
        )

    def slider(
        self, low: float, high: float, value: float, step: float, label: str, info: str, elem_id: str
    ) -> gr.Slider:
        """A slider that leaves checking to those who can say what to do."""
        made = gr.Slider(low, high, value, step=step, label=label, info=info, elem_id=elem_id, buttons=[])
        made.preprocess = lambda given: given
        return made

    def empty_people(self) -> dict[str, Any]:
        return {**self.desk.common, "people": [], "notice": {"text": "", "tone": ""}, "number": 100}

    # -- what happens when -----------------------------------------------------------------------------------

    def wire(self) -> None:
        settings = [getattr(self, name) for name in SETTINGS]
        ways = [self.make, self.sweep, self.cancel]
        shown = [self.people, self.easel, self.boxes]
        many = {**PRIVATE, "trigger_mode": "multiple"}
        self.people.bring(self.on_bring, [self.shape, self.boxes], [*shown, self.new_seed, *settings], **many)
        self.people.act(self.on_act, [self.shape, self.boxes], shown, **many)
        self.restore.upload(
            self.on_restore,
            [self.restore, self.shape, self.boxes],
            [*shown, self.new_seed, *settings, self.restore],
            **PRIVATE,
        )
        self.shape.input(self.on_shape, [self.shape], [self.easel, self.boxes], **PRIVATE)
        self.easel.moved(
            None, None, self.boxes, js=BOXES_TO_TEXT, trigger_mode="multiple", api_visibility="private"
        )
        self.easel.arrange(self.on_arrange, [self.shape], [self.easel, self.boxes], **PRIVATE)
        for event in (self.boxes.submit, self.boxes.blur):
            event(self.on_typed_boxes, [self.shape, self.boxes], [self.easel, self.boxes], **PRIVATE)
        self.prompt.change(self.on_words, self.prompt, self.words, trigger_mode="always_last", **PRIVATE)
        self.page.load(self.on_words, self.prompt, self.words, **PRIVATE)
        self.dice.click(
            None,
            None,
            [self.seed, self.new_seed],
            api_visibility="private",
            js=f"() => [Math.floor(Math.random() * {MAX_SEED}), false]",
        )
        asked = [*settings, self.new_seed, self.count, self.boxes, self.consent, self.visible]
        made = [self.easel, self.shelf, self.readout, self.seed, *ways]
        self.make.click(self.making(sweep=False), asked, made, trigger_mode="once", **PRIVATE)
        self.sweep.click(self.making(sweep=True), asked, made, trigger_mode="once", **PRIVATE)
        self.cancel.click(self.on_cancel, None, [self.cancel], queue=False, **PRIVATE)
        one = [self.shape, self.boxes]
        self.shelf.show(self.on_show, one, [self.easel, self.shelf, self.readout], **PRIVATE)
        self.easel.choose(
            self.on_choose,
            one,
            [self.easel, self.shelf, self.readout, self.similarity, self.diversity, self.seed, self.new_seed],
            **PRIVATE,
        )
        self.easel.reuse(self.on_reuse, None, [self.seed, self.new_seed], **PRIVATE)
        self.page.unload(self.page.leave)

    # -- people ----------------------------------------------------------------------------------------------

    def refresh(
        self, visit: Visit, shape: str, boxes: str | None, people_before: int, said: str, tone: str
    ) -> list:
        """Cards, easel and boxes after the people changed."""
        before = self.studio.size(shape, people_before)
        kept = self.desk.kept_boxes(visit, shape, boxes, before)
        number = secrets.randbelow(100_000)
        return [
            parts.people_value(visit, self.desk.common, said, tone, number),
            self.idle_easel(visit, shape, kept),
            text_of(kept),
        ]

    def idle_easel(self, visit: Visit, shape: str, boxes: list, **more: Any) -> dict[str, Any]:
        return parts.easel_value(look_of(visit), boxes, self.desk.size(visit, shape), **more)

    def on_bring(self, shape: str, boxes: str, event: gr.EventData, request: gr.Request) -> list:
        visit = self.visits.get(request.session_hash)
        data = event._data or {}
        files = [file for file in data.get("files") or [] if isinstance(file, dict)][:16]
        return self.bring(visit, files, data.get("person"), bool(data.get("dropped")), shape, boxes)

    def on_restore(self, path: str | None, shape: str, boxes: str, request: gr.Request) -> list:
        visit = self.visits.get(request.session_hash)
        files = [{"path": path, "name": "This picture"}] if path else []
        return [*self.bring(visit, files, None, True, shape, boxes, photos=False), None]

    def bring(
        self,
        visit: Visit,
        files: list[dict],
        person: str | None,
        dropped: bool,
        shape: str,
        boxes: str,
        photos: bool = True,
    ) -> list:
        before = len(visit.people)
        said, tone, found = self.desk.bring(visit, files, person, dropped, photos)
        if found is None:
            rest = [gr.skip()] * (1 + len(SETTINGS))
            return [*self.refresh(visit, shape, boxes, before, said, tone), *rest]
        shape = found.get("shape", shape)
        width, height = self.desk.size(visit, shape)
        try:
            own = check_bboxes(found["boxes"], height, width, num_people=len(visit.people))
            kept = [[round(value) for value in box] for box in own]
        except (KeyError, ValueError):
            kept = self.desk.suggested_boxes(visit, shape)
        cards = parts.people_value(visit, self.desk.common, said, tone)
        rest = [found.get(name, gr.skip()) for name in SETTINGS]
        return [cards, self.idle_easel(visit, shape, kept), text_of(kept), "seed" not in found, *rest]

    def on_act(self, shape: str, boxes: str, event: gr.EventData, request: gr.Request) -> list:
        visit = self.visits.get(request.session_hash)
        before = len(visit.people)
        try:
            said, tone = self.desk.act(visit, event._data or {})
        except ValueError as error:
            said, tone = plain(error), "warn"
        return self.refresh(visit, shape, boxes, before, said, tone)

    # -- boxes, words, seeds ---------------------------------------------------------------------------------

    def on_shape(self, shape: str, request: gr.Request) -> list:
        visit = self.visits.get(request.session_hash)
        boxes = self.desk.suggested_boxes(visit, shape)
        return [self.idle_easel(visit, shape, boxes), text_of(boxes)]

    def on_arrange(self, shape: str, event: gr.EventData, request: gr.Request) -> list:
        visit = self.visits.get(request.session_hash)
        try:
            boxes = self.desk.suggested_boxes(visit, shape, (event._data or {}).get("name"))
        except ValueError as error:
            raise gr.Error(plain(error), print_exception=False) from error
        return [self.idle_easel(visit, shape, boxes), text_of(boxes)]

    def on_typed_boxes(self, shape: str, text: str, request: gr.Request) -> list:
        """Boxes typed by hand appear on the easel; what is wrong with them is said there."""
        visit = self.visits.get(request.session_hash)
        width, height = self.desk.size(visit, shape)
        try:
            boxes = self.desk.read_boxes(text)
            if boxes is None:
                boxes = self.desk.suggested_boxes(visit, shape)
            else:
                check_bboxes(boxes, height, width, num_people=len(visit.people))
        except ValueError as error:
            kept = self.desk.suggested_boxes(visit, shape)
            return [self.idle_easel(visit, shape, kept, state="failed", text=plain(error)), gr.skip()]
        return [self.idle_easel(visit, shape, boxes), text_of(boxes)]

    def on_words(self, text: str) -> str:
        # Words of a visitor are shown as text: Markdown and HTML in them mean nothing.
        words = self.desk.words(text)
        for mark in "\\`*_{}[]<>#+-!|$":
            words = words.replace(mark, f"\\{mark}" if mark != "<" else "&lt;")
        return words

    def on_reuse(self, event: gr.EventData) -> list:
        return [(event._data or {}).get("seed", 0), False]

    # -- making ----------------------------------------------------------------------------------------------

    def making(self, sweep: bool) -> Callable[..., Iterator[list]]:
        """What a button does with the page's fields, given one by one: a picture, or the sweep."""

        def on_make(
            prompt: str,
            similarity: float,
            diversity: float,
            shape: str,
            steps: int,
            guidance: float,
            candidates: int,
            seed: int,
            new_seed: bool,
            count: int,
            boxes: str,
            consent: bool,
            visible: bool,
            request: gr.Request,
        ) -> Iterator[list]:
            asked = Asked(
                prompt,
                similarity,
                diversity,
                shape,
                steps,
                guidance,
                candidates,
                seed,
                new_seed,
                count,
                boxes,
                consent,
                visible,
            )
            yield from self.run(asked, request, sweep)

        return on_make

    def orders(self, visit: Visit, asked: Asked, sweep: bool) -> list[Order]:
        """The pictures that are asked for: some seeds, or one seed at several positions of the sliders."""
        seed = asked.seed
        if asked.new_seed:
            seed = secrets.randbelow(MAX_SEED - self.limits.pictures_at_once)
        first = self.desk.order(
            prompt=asked.prompt,
            people=[list(person.photos) for person in visit.people],
            names=[person.name for person in visit.people],
            similarity=asked.similarity,
            diversity=asked.diversity,
            shape=asked.shape,
            steps=asked.steps,
            guidance=asked.guidance,
            candidates=asked.candidates,
            seed=seed,
            boxes=self.desk.read_boxes(asked.boxes) if visit.people else None,
            consent=asked.consent,
            visible_mark=asked.visible,
        )
        if sweep:
            if not visit.people:
                raise ValueError("Add a person first: the sliders say how much faces count.")
            first = replace(first, candidates=1)  # what the sliders do, not what a choice makes of it
            return [
                replace(first, similarity=s, diversity=d) for s in SWEEP_SIMILARITY for d in SWEEP_DIVERSITY
            ]
        count = asked.count
        if isinstance(count, bool) or count not in range(1, self.limits.pictures_at_once + 1):
            raise ValueError(f"The number of pictures is {count}: give 1 to {self.limits.pictures_at_once}.")
        return [replace(first, seed=(first.seed + i) % (MAX_SEED + 1)) for i in range(int(count))]

    def run(self, asked: Asked, request: gr.Request, sweep: bool) -> Iterator[list]:
        """Make what was asked for and show it as it forms: easel, shelf, readout, seed, and the buttons."""
        visit = self.visits.get(request.session_hash)
        shape = asked.shape if asked.shape in SHAPES else "square"
        look = look_of(visit)
        names, colors = [p["name"] for p in look], [p["color"] for p in look]
        idle, busy = self.buttons(False), self.buttons(True)
        try:
            kept = (
                [[float(v) for v in box] for box in self.desk.read_boxes(asked.boxes) or []]
                if visit.people
                else []
            )
            orders = self.orders(visit, asked, sweep)
            if not self.visits.makes.allow(visitor_key(request, self.studio.settings.public), len(orders)):
                raise ValueError(
                    f"More than {self.limits.pictures_per_minute} pictures a minute: wait a moment, please."
                )
            permit = visit.permit()
        except ValueError as error:
            gr.Warning(plain(error))
            suggested = self.desk.suggested_boxes(visit, shape)
            easel = parts.easel_value(
                look,
                suggested,
                self.desk.size(visit, shape),
                state="failed",
                text=plain(error),
            )
            yield [easel, gr.skip(), gr.skip(), gr.skip(), *idle]
            return
        size = self.studio.size(orders[0].shape, len(orders[0].people))
        kept = kept or [list(box) for box in orders[0].bboxes or ()]

        def easel(**more: Any) -> dict[str, Any]:
            return parts.easel_value(look, kept, size, **more)

        cells = [{"thumb": None, "label": position(order)} for order in orders]
        grid = {"columns": len(SWEEP_DIVERSITY), "cells": cells} if sweep else None
        seed = orders[0].seed
        yield [
            easel(state="waiting", fraction=None, text="Asking for a place …", grid=grid),
            gr.skip(),
            gr.skip(),
            seed,
            *busy,
        ]
        picture, latest, text = None, None, ""
        for update in self.studio.make(orders, permit):
            if isinstance(update, Waiting):
                text = (
                    "The model is loading …" if update.loading else f"{update.place} before you in the queue"
                )
                yield [easel(state="waiting", fraction=None, text=text, grid=grid), *[gr.skip()] * 3, *busy]
            elif isinstance(update, Working):
                if update.preview is not None:
                    latest = parts.data_uri(update.preview, 384)
                elif update.step == 0:
                    latest = None if len(orders) == 1 else latest
                yield [
                    easel(
                        state="making",
                        picture=None if sweep else latest,
                        alt="The picture as it forms",
                        fraction=(update.index + update.step / update.steps) / len(orders),
                        text=progress_text(update, len(orders)),
                        grid=grid,
                    ),
                    *[gr.skip()] * 3,
                    *busy,
                ]
            elif isinstance(update, Made):
                picture = self.desk.keep(visit, update)
                if sweep:
                    grid = self.with_cell(grid, update, picture)
                latest = parts.picture_uri(picture)
                more = (
                    {"grid": grid}
                    if sweep
                    else {"picture": latest, "alt": alt_of(picture), **file_of(picture)}
                )
                yield [
                    easel(state="making", fraction=(update.index + 1) / len(orders), text="…", **more),
                    parts.shelf_value(visit, picture.id),
                    parts.readout(picture, names, colors, self.studio.calibration),
                    gr.skip(),
                    *busy,
                ]
            elif isinstance(update, (Withheld, Failed, Cancelled)):
                text = {
                    Withheld: lambda u: u.text,
                    Failed: lambda u: plain(u.error),
                    Cancelled: lambda u: "Cancelled.",
                }[type(update)](update)
                if isinstance(update, (Failed, Withheld)):
                    gr.Warning(text)
                if not isinstance(update, Withheld):
                    state = "failed" if isinstance(update, Failed) else "idle"
                    more = (
                        self.shown(picture) if picture and not sweep else {"grid": grid if picture else None}
                    )
                    yield [easel(state=state, text=text, **more), *[gr.skip()] * 3, *idle]
                    return
        if picture is None:
            yield [easel(state="failed", text=text), *[gr.skip()] * 3, *idle]
            return
        if sweep:
            said = "Click the picture you like: the sliders go there."
            yield [easel(state="done", grid=grid, text=said), *[gr.skip()] * 3, *idle]
            return
        yield [easel(state="done", **self.shown(picture)), *[gr.skip()] * 3, *idle]

    def with_cell(self, grid: dict, made: Made, picture: Picture) -> dict:
        cells = [dict(cell) for cell in grid["cells"]]
        cells[made.index] |= {"thumb": parts.data_uri(made.image, 256), "id": picture.id}
        return {**grid, "cells": cells}

    def shown(self, picture: Picture) -> dict[str, Any]:
        return {"picture": parts.picture_uri(picture), "alt": alt_of(picture), **file_of(picture)}

    def buttons(self, busy: bool) -> list:
        return [
            gr.update(interactive=not busy),
            gr.update(interactive=not busy),
            gr.update(interactive=busy),
        ]

    def on_cancel(self, request: gr.Request) -> Any:
        self.visits.get(request.session_hash).cancel()
        return gr.update(interactive=False)

    # -- pictures made before --------------------------------------------------------------------------------

    def picture_of(self, visit: Visit, event: gr.EventData) -> Picture:
        picture = visit.pictures.get((event._data or {}).get("id"))
        if picture is None:
            raise gr.Error("This picture is gone: only the last ones are kept.", print_exception=False)
        return picture

    def on_show(self, shape: str, boxes: str, event: gr.EventData, request: gr.Request) -> list:
        visit = self.visits.get(request.session_hash)
        return self.show(visit, self.picture_of(visit, event), boxes)

    def show(self, visit: Visit, picture: Picture, boxes: str) -> list:
        """A picture of this visit on the easel, with what was read out of it."""
        look = look_of(visit)
        size = picture.settings["width"], picture.settings["height"]
        try:
            kept = self.desk.read_boxes(boxes) or []
        except ValueError:
            kept = []
        count = len(picture.settings["bboxes"] or ())
        names = [p["name"] for p in look] if len(look) == count else [f"Person {i + 1}" for i in range(count)]
        colors = [p["color"] for p in look] if len(look) == count else list(parts.COLORS[:count])
        return [
            parts.easel_value(look, kept, size, state="done", **self.shown(picture)),
            parts.shelf_value(visit, picture.id),
            parts.readout(picture, names, colors, self.studio.calibration),
        ]

    def on_choose(self, shape: str, boxes: str, event: gr.EventData, request: gr.Request) -> list:
        """A picture of the sweep's grid: the sliders go to its position."""
        visit = self.visits.get(request.session_hash)
        picture = self.picture_of(visit, event)
        settings = picture.settings
        return [
            *self.show(visit, picture, boxes),
            settings["similarity"],
            settings["diversity"],
            settings["seed"],
            False,
        ]


def visitor_key(request: gr.Request, public: bool) -> str:
    return f"{visitor_address(request, public)} {request.session_hash}"


def text_of(boxes: list) -> str:
    return str([[round(v, 2) for v in box] for box in boxes]) if boxes else ""


def position(order: Order) -> str:
    return f"similarity {order.similarity:g}, diversity {order.diversity:g}"


def alt_of(picture: Picture) -> str:
    return f"The picture made for: {picture.settings['prompt']}"


def file_of(picture: Picture) -> dict[str, Any]:
    return {"file": f"withanyone_{picture.settings['seed']}.png", "seed": picture.settings["seed"]}


def progress_text(update: Working, count: int) -> str:
    which = f"Picture {update.index + 1} of {count}, step" if count > 1 else "Step"
    left = update.seconds_left
    about = (
        "" if left is None else f" · about {max(1, round(left))} s left" if left >= 1 else " · nearly done"
    )
    return f"{which} {update.step} of {update.steps}{about}"
