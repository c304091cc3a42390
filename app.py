"""The page: faces in, a prompt, two sliders, a picture out. `python app.py`, or `make demo`.

Runs the bundled miniature unless WITHANYONE_MODEL (or --model) names another pipeline folder or Hub id.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import secrets
import sys
import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image

from withanyone import WithAnyonePipeline, slider_scales
from withanyone.cli import load_pipeline
from withanyone.faces import Face, load_image
from withanyone.layout import default_bboxes
from withanyone.mini import PRETRAINED, gallery
from withanyone.mini.world import unknown_words
from withanyone.settings import mark_picture, slider_positions

logger = logging.getLogger(__name__)

MAX_PEOPLE = 4
MAX_SEED = 2**31 - 1
MAX_STEPS = 100
MAX_PROMPT = 2000
FLUX_SIZES = {"square": (1024, 1024), "landscape": (1216, 832), "portrait": (832, 1216)}
FLUX_PROMPTS = ("a photo of two friends at the beach", "a photo of a person reading in a cafe, soft light")

CSS = """
.gradio-container { max-width: 1100px !important; margin: 0 auto; }
.person-status { min-height: 2.4em; }
.drawn-people, .drawn-people * { min-height: 0 !important; }
.drawn-people .grid-wrap { height: auto !important; max-height: none !important; overflow: visible; }
.drawn-people .grid-container {
    grid-template-columns: repeat(auto-fill, minmax(66px, 1fr)) !important;
    height: auto !important;
}
"""


class Studio:
    """One pipeline for all visitors: loaded at first need, used by one of them at a time."""

    def __init__(self, pipe: WithAnyonePipeline | None = None, model: str | os.PathLike = PRETRAINED):
        self.model = str(model)
        self.miniature = pipe is None and gallery.is_miniature(model)
        self._pipe = pipe
        self._loading = threading.Lock()
        self._working = threading.Lock()

    @property
    def pipe(self) -> WithAnyonePipeline:
        with self._loading:
            if self._pipe is None:
                self._pipe = load_pipeline(self.model)
                self._pipe.set_progress_bar_config(disable=True)
                report_providers(self._pipe)
        return self._pipe

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """The model's own settings; needs its configuration only, not its weights."""
        if self._pipe is not None:
            return dict(self._pipe.config.sampling_defaults)
        return dict(WithAnyonePipeline.load_config(self.model)["sampling_defaults"])

    def size(self, shape: str, num_people: int) -> tuple[int, int]:
        """(width, height) of a picture."""
        if self.miniature:
            return gallery.size_for(num_people, shape)
        if shape == "square" and self.defaults["width"] and self.defaults["height"]:
            return self.defaults["width"], self.defaults["height"]
        return FLUX_SIZES[shape]

    def find_faces(self, photo: str) -> list[dict[str, Any]]:
        """The faces of a photo, largest first: a list of {"bbox": [x1, y1, x2, y2], "score": 0 to 1}."""
        return [
            {"bbox": [round(float(v), 1) for v in face.bbox], "score": round(face.det_score, 3)}
            for face in refuse_clearly(self, self._detect, photo)
        ]

    def _detect(self, photo: str) -> list[Face]:
        image = load_image(photo, "photo")
        return self.pipe.face_analyzer.detect(image)

    def make(
        self,
        prompt: str,
        photos: Sequence[Any],
        *,
        similarity: float,
        diversity: float,
        seed: int,
        shape: str,
        steps: int,
        guidance: float,
        bboxes: Sequence[Sequence[float]] | None,
        on_step: Callable[[int], None],
    ) -> Image.Image:
        """One picture, with its settings in `info`; ValueError where something given does not fit."""
        width, height = self.size(shape, len(photos))
        id_scale, siglip_scale = slider_scales(similarity, diversity)

        def step_done(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
            on_step(step + 1)
            return tensors

        with self._working:
            pipe = self.pipe
            faces = pipe.find_faces(list(photos)) if photos else None
            if self.miniature:
                gallery.check_drawn(faces or [])
            out = pipe(
                prompt=prompt,
                faces=faces,
                bboxes=bboxes,
                id_scale=id_scale,
                siglip_scale=siglip_scale,
                width=width,
                height=height,
                num_inference_steps=steps,
                generator=torch.Generator("cpu").manual_seed(seed),
                callback_on_step_end=step_done,
                **{self.guidance_name: guidance},
            )
        settings = {
            "prompt": prompt,
            "seed": seed,
            "similarity": similarity,
            "diversity": diversity,
            "width": width,
            "height": height,
            "num_inference_steps": steps,
            self.guidance_name: guidance,
            "bboxes": None
            if out.bboxes is None
            else [[round(float(v), 2) for v in box] for box in out.bboxes],
            "people": len(photos),
            "model": "miniature" if self.miniature else self.model,
        }
        return mark_picture(out.images[0], settings)

    def generate(
        self,
        prompt: str,
        photo_1: str | None,
        photo_2: str | None,
        photo_3: str | None,
        photo_4: str | None,
        similarity: float,
        diversity: float,
        shape: str,
        steps: float,
        guidance: float,
        boxes: str,
        seed: float,
        new_seed: bool,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (Gradio finds it by this default)
    ) -> tuple[Image.Image, int, str]:
        """Make one picture of up to four people.

        Args:
            prompt: what the picture shows.
            photo_1: a photo of the first person; the others likewise, or None.
            similarity: 0 to 1.5, how much the faces count.
            diversity: 0 to 1; 0 keeps more of the photo, 1 only who it is.
            shape: square, landscape or portrait.
            steps: denoising steps.
            guidance: how closely to follow the words.
            boxes: JSON, a box [x1, y1, x2, y2] in pixels for each person; empty for a layout.
            seed: 0 or more; the same seed gives the same picture.
            new_seed: take a new seed instead.

        Returns:
            The picture, the seed it was made from, and what there is to say about it.
        """
        people = [photo for photo in (photo_1, photo_2, photo_3, photo_4) if photo]
        used = secrets.randbelow(MAX_SEED) if new_seed else check_seed(seed)
        steps = check_steps(steps)
        progress((0, steps), desc="Looking at the faces")
        image = refuse_clearly(
            self,
            self.make,
            check_prompt(prompt),
            people,
            similarity=similarity,
            diversity=diversity,
            seed=used,
            shape=check_shape(shape),
            steps=steps,
            guidance=guidance,
            bboxes=read_boxes(boxes),
            on_step=lambda done: progress((done, steps), desc="Making the picture"),
        )
        who = {0: "Nobody in particular", 1: "One person"}.get(len(people), f"{len(people)} people")
        return image, used, f"{who}, {image.width} x {image.height} pixels, seed {used}."

    @property
    def guidance_name(self) -> str:
        """The guidance that the model uses: a second pass, or the one distilled into FLUX.1 [dev]."""
        return "true_cfg_scale" if self.defaults["true_cfg_scale"] > 1 else "guidance_scale"


def report_providers(pipe: WithAnyonePipeline) -> None:
    """Say what the face models run on, and how to mend it where a CUDA card stands idle."""
    if pipe.face_analyzer is None:
        return
    active = pipe.face_analyzer.providers
    logger.info("Face models run on %s.", ", ".join(active))
    if torch.cuda.is_available() and "CUDAExecutionProvider" not in active:
        logger.warning(
            "There is a CUDA card, but onnxruntime does not use it: "
            "pip install --force-reinstall --no-deps onnxruntime-gpu"
        )


def photo_input(label: str, **look: Any) -> gr.Image:
    """An image input that hands on the uploaded file as it is: `load_image` reads it and names mistakes.

    Only uploaded files: a program might as well send the path of any file of this machine.
    """
    photo = gr.Image(label=label, type="filepath", format="png", **look)
    uploads = Path(photo.GRADIO_CACHE).resolve()

    def uploaded_file(payload: Any) -> str | None:
        if payload is None or payload.path is None:
            return None
        path = Path(payload.path).resolve()
        if not path.is_relative_to(uploads):
            raise gr.Error(f"{payload.path} was not uploaded: upload the photo first.", print_exception=False)
        return str(path)

    photo.preprocess = uploaded_file
    return photo


def slider(*args: Any, **kwargs: Any) -> gr.Slider:
    """A slider that leaves checking to those who know the argument's name and can say what to do."""
    made = gr.Slider(*args, **kwargs)
    made.preprocess = lambda value: value
    return made


def build_demo(pipe: WithAnyonePipeline | None = None, studio: Studio | None = None) -> gr.Blocks:
    """The page, on a pipeline, or on a studio that loads one when it is first needed (the miniature)."""
    studio = studio or Studio(pipe)
    defaults = studio.defaults
    similarity, diversity = slider_positions(defaults["id_scale"], defaults["siglip_scale"])

    with gr.Blocks(title="WithAnyone", delete_cache=(600, 3600)) as demo:
        gr.Markdown("# WithAnyone\nPictures of people of your choice: give their faces and say what they do.")
        if studio.miniature:
            gr.Markdown(f"**Before you upload:** {gallery.NOTICE}")

        photos, notes = [], []
        with gr.Row():
            for i in range(1, MAX_PEOPLE + 1):
                with gr.Column(min_width=150):
                    look = {"sources": ["upload", "clipboard"], "height": 190, "buttons": []}
                    photos.append(photo_input(f"Person {i}", **look))
                    notes.append(gr.Markdown(elem_classes="person-status", container=False))
        if studio.miniature:
            add_drawn_people(photos)

        with gr.Row(equal_height=False):
            with gr.Column(scale=3):
                prompt = gr.Textbox(
                    label="Prompt",
                    lines=3,
                    max_length=MAX_PROMPT,
                    placeholder="What the picture shows",
                    value=gallery.PROMPTS[2][0] if studio.miniature else FLUX_PROMPTS[0],
                )
                words = gr.Markdown(container=False)
                similarity_slider = slider(
                    0,
                    1.5,
                    similarity,
                    step=0.05,
                    label="Similarity: how much the faces count",
                    info="0: not at all · 1: as the model was trained · 1.5: more than that",
                )
                diversity_slider = slider(
                    0,
                    1,
                    diversity,
                    step=0.05,
                    label="Diversity: what may change",
                    info="0: little, the photo's hair, expression and style stay · 1: all but who it is",
                )
                with gr.Accordion("More settings", open=False):
                    shape = gr.Radio(list(FLUX_SIZES), value="square", label="Shape")
                    steps = slider(1, MAX_STEPS, defaults["num_inference_steps"], step=1, label="Steps")
                    guidance = slider(
                        1,
                        10,
                        defaults[studio.guidance_name],
                        step=0.1,
                        label="Guidance: how closely to follow the words",
                    )
                    boxes = gr.Textbox(
                        label="Boxes of the faces (optional)",
                        placeholder="[[x1, y1, x2, y2], ...] in pixels, one for each person",
                        max_length=MAX_PROMPT,
                    )
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=0, min_width=120)
                    new_seed = gr.Checkbox(True, label="A new seed each time", min_width=120)
            with gr.Column(scale=4):
                result = gr.Image(label="Picture", type="pil", format="png", height=480, interactive=False)
                said = gr.Markdown(container=False)
                make = gr.Button("Make the picture", variant="primary")
        examples = FLUX_PROMPTS
        if studio.miniature:
            examples = [text for texts in gallery.PROMPTS.values() for text in texts]
        gr.Examples([[text] for text in examples], [prompt], label="Prompts to try", api_visibility="private")

        # -- what happens ----------------------------------------------------------------------------------

        for photo, note in zip(photos, notes, strict=True):
            photo.change(
                lambda path: describe_faces(studio, path),
                photo,
                note,
                show_progress="hidden",
                trigger_mode="always_last",
                api_visibility="private",
            )
        prompt.change(
            lambda text: describe_words(studio, text),
            prompt,
            words,
            show_progress="hidden",
            trigger_mode="always_last",
            api_visibility="private",
        )

        make.click(
            studio.generate,
            [
                prompt,
                *photos,
                similarity_slider,
                diversity_slider,
                shape,
                steps,
                guidance,
                boxes,
                seed,
                new_seed,
            ],
            [result, seed, said],
            api_name="generate",
            concurrency_limit=1,
            concurrency_id="model",
        )

        with gr.Group(visible=False):  # for programs
            photo, found = photo_input("photo"), gr.JSON(label="faces")
            gr.Button().click(studio.find_faces, photo, found, api_name="find_faces", concurrency_limit=4)

        def suggest_layout(num_people: int, width: int, height: int) -> list:
            """Boxes [x1, y1, x2, y2] in pixels for the faces of 1 to 8 people in a picture of this size."""
            return [list(box) for box in refuse_clearly(studio, default_bboxes, num_people, height, width)]

        gr.api(suggest_layout, api_name="suggest_layout")
    return demo


def add_drawn_people(photos: list[gr.Image]) -> None:
    """The miniature's gallery and "make a person": each click fills the next free place."""
    cast = list(gallery.CAST.items())
    with gr.Accordion("Drawn people: a click puts one into the next free place", open=True):
        shown = gr.Gallery(
            [(gallery.draw_photo(number, size=128), name) for name, number in cast],
            label="Drawn people to choose from",
            show_label=False,
            columns=6,
            height="auto",
            elem_classes="drawn-people",
            allow_preview=False,
            buttons=[],
            format="png",
        )
        with gr.Row():
            number = gr.Number(100, label="Make a person: each number is one", precision=0, minimum=0)
            again = gr.Number(0, label="Photo of that person", precision=0, minimum=0)
            draw = gr.Button("Draw this person")
            dice = gr.Button("Draw anybody")

    def place(image: Image.Image, taken: Sequence[str | None]) -> list[Any]:
        """Updates for all places: the image into the first free one."""
        updates: list[Any] = [gr.skip()] * len(taken)
        free = next((i for i, photo in enumerate(taken) if not photo), None)
        if free is None:
            gr.Warning(f"All {len(taken)} places are taken: clear one first.")
        else:
            updates[free] = image
        return updates

    def choose(event: gr.SelectData, *taken: str | None) -> list[Any]:
        return place(gallery.draw_photo(cast[event.index][1]), taken)

    def make_person(number: float | None, photo: float | None, *taken: str | None) -> list[Any]:
        if number is None or photo is None:
            raise gr.Error(
                "Give a number, 0 or more, for the person and for the photo.", print_exception=False
            )
        try:
            return place(gallery.draw_photo(int(number), int(photo)), taken)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def make_anybody(*taken: str | None) -> list[Any]:
        number = secrets.randbelow(100_000)
        return [number, *place(gallery.draw_photo(number), taken)]

    hidden = {"api_visibility": "private", "show_progress": "hidden"}
    shown.select(choose, photos, photos, **hidden)
    draw.click(make_person, [number, again, *photos], photos, **hidden)
    dice.click(make_anybody, photos, [number, *photos], **hidden)


# -- words for visitors ------------------------------------------------------------------------------------


def describe_faces(studio: Studio, path: str | None) -> str:
    """One line under a photo, at once after the upload."""
    if not path:
        return ""
    try:
        found = studio.find_faces(path)
    except gr.Error as error:
        return f"⚠️ {error.message}"
    if not found or (studio.miniature and found[0]["score"] < gallery.DRAWN_SCORE):
        help_text = gallery.NOTICE if studio.miniature else "Take one where it is sharp, lit and not cut off."
        return f"⚠️ No {'drawn ' if studio.miniature else ''}face was found in this photo. {help_text}"
    if len(found) > 1:
        return f"✓ {len(found)} faces found; the largest is taken."
    return "✓ Face found."


def describe_words(studio: Studio, text: str) -> str:
    unknown = unknown_words(text) if studio.miniature else []
    return (
        f"The miniature does not know: {', '.join(unknown)}. It passes over these words." if unknown else ""
    )


def refuse_clearly(studio: Studio, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """What the function gives; its ValueError becomes a message on the page."""
    try:
        return function(*args, **kwargs)
    except ValueError as error:
        message = str(error)
        if studio.miniature and "no face found" in message:
            message = f"{message} {gallery.NOTICE}"
        raise gr.Error(message, print_exception=False) from error


def check_seed(seed: float | None) -> int:
    if seed is None or not 0 <= seed <= MAX_SEED:
        raise gr.Error(f"The seed is {seed}: give a number from 0 to {MAX_SEED}.", print_exception=False)
    return int(seed)


def check_steps(steps: float | None) -> int:
    if steps is None or not 1 <= steps <= MAX_STEPS:
        raise gr.Error(f"Steps are {steps}: give 1 to {MAX_STEPS}.", print_exception=False)
    return int(steps)


def check_shape(shape: str) -> str:
    if shape not in FLUX_SIZES:
        raise gr.Error(f"The shape is {shape!r}: give one of {', '.join(FLUX_SIZES)}.", print_exception=False)
    return shape


def check_prompt(prompt: str | None) -> str:
    prompt = (prompt or "").strip()
    if not prompt:
        raise gr.Error("The prompt is empty: say what the picture shows.", print_exception=False)
    if len(prompt) > MAX_PROMPT:
        raise gr.Error(
            f"The prompt has {len(prompt)} characters: {MAX_PROMPT} at most.", print_exception=False
        )
    return prompt


def read_boxes(text: str | None) -> list[list[float]] | None:
    """Boxes typed as JSON; None where nothing is typed."""
    if not (text or "").strip():
        return None
    try:
        boxes = json.loads(text)
        return [[float(number) for number in box] for box in boxes]
    except (ValueError, TypeError) as error:
        raise gr.Error(
            "The boxes are not readable: write [[x1, y1, x2, y2], ...] in pixels, one for each person.",
            print_exception=False,
        ) from error


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The page of WithAnyone.")
    parser.add_argument("--model", default=os.environ.get("WITHANYONE_MODEL") or str(PRETRAINED))
    parser.add_argument("--host", default=None, help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=None)
    parser.add_argument("--no-browser", action="store_true", help="do not open a browser")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    studio = Studio(model=args.model)
    demo = build_demo(studio=studio)
    # The page opens at once; the model loads while the visitor looks around.
    threading.Thread(target=lambda: studio.pipe, daemon=True).start()
    screen = sys.platform in ("darwin", "win32") or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    demo.queue(max_size=32).launch(
        server_name=args.host,
        server_port=args.port,
        inbrowser=screen and not args.no_browser,
        theme=gr.themes.Soft(),
        css=CSS,
        max_file_size="20mb",
        show_error=True,
    )


if __name__ == "__main__":
    main()
