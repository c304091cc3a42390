"""The page for programs: three named endpoints for gradio_client and MCP clients, typed and documented."""

from __future__ import annotations

import base64
import binascii
import contextlib
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

import gradio as gr
from gradio.components.api_component import Api
from gradio.data_classes import FileData
from gradio_client.utils import python_type_to_json_schema

from withanyone.arrangements import arrange
from withanyone.mini import gallery
from withanyone.settings import save_picture

from .desk import Desk, plain, whole
from .guard import visitor_address
from .studio import MAX_SEED, Failed, Made, Withheld, Working
from .visits import Permit, Photo

MAX_PHOTOS = 8
MAX_SIDE = 4096
Shape = Literal["square", "landscape", "portrait"]
Arrangement = Literal["suggested", "side by side", "triangle", "rows", "one large"]

#: An uploaded file, as gradio_client's handle_file makes it; text is taken too (see `Programs.photo_bytes`).
FILE_SCHEMA = {name: part for name, part in FileData.model_json_schema().items() if name != "description"}
PHOTO_SCHEMA = {"$defs": FILE_SCHEMA["$defs"], "anyOf": [FILE_SCHEMA, {"type": "string"}]}


class Programs:
    """The endpoints' functions. Their signatures and docstrings are what clients see."""

    def __init__(self, desk: Desk, public: bool):
        self.desk = desk
        self.public = public

    def generate(
        self,
        prompt: str,
        photo_1: dict | None = None,
        photo_2: dict | None = None,
        photo_3: dict | None = None,
        photo_4: dict | None = None,
        photo_5: dict | None = None,
        photo_6: dict | None = None,
        photo_7: dict | None = None,
        photo_8: dict | None = None,
        person_of_photo: list[int] | None = None,
        drawn_people: list[int] | None = None,
        similarity: float = 1.0,
        diversity: float = 0.5,
        bboxes: list[list[float]] | None = None,
        shape: Shape = "square",
        steps: int | None = None,
        guidance: float | None = None,
        seed: int | None = None,
        consent: bool = False,
        visible_mark: bool | None = None,
        candidates: int | None = None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (Gradio finds it by this default)
        request: gr.Request = None,
    ) -> tuple[dict, dict, dict]:
        """Make a picture of particular people from photos of their faces and a text.

        Args:
            prompt: What the picture shows, in English.
            photo_1: The first person, by the largest face of a photo: an uploaded file or a data: URL.
            photo_2: A photo of the second person, likewise.
            photo_3: A photo of the third person.
            photo_4: A photo of the fourth person.
            photo_5: A photo of the fifth person.
            photo_6: A photo of the sixth person.
            photo_7: A photo of the seventh person.
            photo_8: A photo of the eighth person.
            person_of_photo: Whose photo each is, such as [1, 1, 2]. Default: each shows another person.
            drawn_people: With the miniature: numbers of drawn people, such as [1, 2], in place of photos.
            similarity: 0 to 1.5: how much the faces count. 1 is what the model was trained for.
            diversity: 0 to 1: 0 keeps the photo's hair and expression, 1 keeps only who it is.
            bboxes: For each face [x1, y1, x2, y2] in pixels. Default: those of suggest_layout, rounded.
            shape: The picture's shape.
            steps: Denoising steps, 1 to 100. Default: the model's own.
            guidance: How closely to follow the prompt, 1 to 20. Default: the model's own.
            seed: 0 or more; the same seed and settings give the same picture. Default: a new one.
            consent: Must be true where photos are given: the people in them agree to this picture.
            visible_mark: Write "AI-generated" on the picture too. Its file says so in any case.
            candidates: Drawn at once, 1 to 8; the likest faces go on. Default: the model's own.

        Returns:
            The picture.
            Its settings, with the seed and the boxes used.
            What it shows of each person: likeness, copying, whether missing or swapped.
        """
        address = visitor_address(request, self.public)
        if not self.desk.visits.calls.allow(address):
            raise refusal(f"More than {self.desk.limits.calls_per_minute} calls a minute: wait a moment.")
        try:
            given = [photo_1, photo_2, photo_3, photo_4, photo_5, photo_6, photo_7, photo_8]
            people = self.people_of(given, person_of_photo, drawn_people)
            defaults = self.desk.studio.defaults
            order = self.desk.order(
                prompt=prompt,
                people=people,
                names=[f"Person {i}" for i in range(1, len(people) + 1)],
                similarity=similarity,
                diversity=diversity,
                shape=shape,
                steps=defaults["num_inference_steps"] if steps is None else steps,
                guidance=defaults[self.desk.studio.guidance_name] if guidance is None else guidance,
                candidates=defaults["num_candidates"] if candidates is None else candidates,
                seed=secrets.randbelow(MAX_SEED) if seed is None else seed,
                boxes=bboxes,
                consent=consent or all(photo.drawn for photos in people for photo in photos),
                visible_mark=self.desk.studio.marks_visibly if visible_mark is None else visible_mark,
            )
            # Not tied to the session: on a busy machine a client's heartbeat may fail while it still waits.
            permit = Permit(self.desk.visits.root)
        except ValueError as error:
            raise refusal(plain(error)) from error
        for update in self.desk.studio.make([order], permit):
            if isinstance(update, Working):
                progress((update.step, update.steps), desc="Making the picture")
            elif isinstance(update, Made):
                path = self.desk.visits.new_result(request.session_hash, f"withanyone_{order.seed}.png")
                save_picture(update.image, path, update.settings)
                reading = update.reading.as_dict() if update.reading else {"people": [], "extra": 0}
                reading["words"] = [said["text"] for said in update.said]
                return file_data(path), update.settings, reading
            elif isinstance(update, Withheld):
                raise refusal(update.text)
            elif isinstance(update, Failed):
                raise refusal(plain(update.error))
        raise refusal("The picture was cancelled.")

    def find_faces(self, photo: dict, request: gr.Request = None) -> list[dict[str, Any]]:
        """Find the faces of a photo.

        Args:
            photo: An uploaded file, or text: a data: URL with the picture.

        Returns:
            The faces, largest first: {"bbox": [x1, y1, x2, y2] in pixels of the photo, "score": 0 to 1}.
        """
        if not self.desk.visits.calls.allow(visitor_address(request, self.public)):
            raise refusal(f"More than {self.desk.limits.calls_per_minute} calls a minute: wait a moment.")
        try:
            faces = self.desk.studio.find_faces(self.photo_bytes(photo, "photo"), "photo")
        except ValueError as error:
            raise refusal(plain(error)) from error
        return [
            {"bbox": [round(float(v), 1) for v in face.bbox], "score": round(face.det_score, 3)}
            for face in faces
        ]

    def suggest_layout(
        self, num_people: int, width: int, height: int, arrangement: Arrangement = "suggested"
    ) -> list[list[float]]:
        """Suggest where the faces of a group go in a picture.

        Args:
            num_people: 1 to 8.
            width: The picture's width in pixels.
            height: The picture's height in pixels.
            arrangement: How the people are placed.

        Returns:
            A box [x1, y1, x2, y2] in pixels for each face.
        """
        try:
            size = whole("height", height, 1, MAX_SIDE), whole("width", width, 1, MAX_SIDE)
            boxes = arrange(whole("num_people", num_people, 1, 8), *size, arrangement)
        except ValueError as error:
            raise refusal(plain(error)) from error
        return [[round(value, 2) for value in box] for box in boxes]

    # -- photos ----------------------------------------------------------------------------------------------

    def people_of(self, given: Sequence[Any], person_of_photo: Any, drawn_people: Any) -> list[list[Photo]]:
        """The photos of each person, in the order of the people."""
        photos = [(i, photo) for i, photo in enumerate(given, start=1) if photo is not None]
        if drawn_people:
            if photos:
                raise ValueError("Give photos or `drawn_people`, not both.")
            if not self.desk.studio.miniature:
                raise ValueError("`drawn_people` are for the miniature model.")
            if not isinstance(drawn_people, list) or len(drawn_people) > self.desk.limits.people:
                raise ValueError(
                    f"`drawn_people` must be a list of at most {self.desk.limits.people} numbers."
                )
            return [[self.desk.drawn_photo(number)] for number in drawn_people]
        owners = list(range(1, len(photos) + 1)) if person_of_photo is None else person_of_photo
        numbers = isinstance(owners, list) and all(type(owner) is int for owner in owners)
        if not numbers or len(owners) != len(photos) or set(owners) != set(range(1, len(set(owners)) + 1)):
            raise ValueError(
                f"`person_of_photo` is {person_of_photo!r}: give a number from 1 on for each of "
                f"{len(photos)} photos, such as [1, 1, 2]."
            )
        people: list[list[Photo]] = [[] for _ in set(owners)]
        for (i, photo), owner in zip(photos, owners, strict=True):
            name = f"photo_{i}"
            faces = self.desk.studio.find_faces(self.photo_bytes(photo, name), name)
            if not faces:
                more = f" {gallery.NOTICE}" if self.desk.studio.miniature else ""
                raise ValueError(f"No face was found in {name}.{more}")
            people[owner - 1].append(Photo(faces[:1]))
        return people

    def photo_bytes(self, photo: Any, name: str) -> bytes:
        """A photo's file: an upload of this page (its path or its address), or a data: URL. No address on
        the web is fetched, and no other file of this machine is read."""
        if isinstance(photo, dict):
            photo = photo.get("path")
        if isinstance(photo, str) and photo.startswith("data:"):
            head, _, body = photo.partition(",")
            if not head.endswith(";base64") or len(body) > self.desk.limits.upload_bytes * 4 // 3 + 4:
                megabytes = self.desk.limits.upload_bytes // 10**6
                raise ValueError(f"{name}: give a base64 data: URL of at most {megabytes} MB.")
            with contextlib.suppress(binascii.Error, ValueError):
                return base64.b64decode(body, validate=True)
            raise ValueError(f"{name}: the data: URL is no base64.")
        if isinstance(photo, str) and "/gradio_api/file=" in photo:
            photo = unquote(photo.split("/gradio_api/file=", 1)[1])
        if isinstance(photo, str) and photo.startswith(("http://", "https://")):
            raise ValueError(f"{name} is an address on the web, which is not fetched: upload the photo.")
        try:
            with self.desk.visits.uploaded(photo) as path:
                return path.read_bytes()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def add_endpoints(programs: Programs) -> None:
    """Put the endpoints into the page that is being built."""
    hidden = {"preprocess": False, "postprocess": False, "show_progress": "hidden", "concurrency_limit": None}
    with gr.Group(visible=False):
        generate, faces, layout = gr.Button(), gr.Button(), gr.Button()
        photos = [Api(None, PHOTO_SCHEMA, f"photo_{i}") for i in range(1, MAX_PHOTOS + 1)]
        generate.click(
            programs.generate,
            [
                typed("prompt", str, "two people at the beach in daylight"),
                *photos,
                typed("person_of_photo", list[int]),
                typed("drawn_people", list[int]),
                typed("similarity", float, 1.0),
                typed("diversity", float, 0.5),
                typed("bboxes", list[list[float]]),
                typed("shape", Shape, "square"),
                typed("steps", int),
                typed("guidance", float),
                typed("seed", int),
                typed("consent", bool, False),
                typed("visible_mark", bool),
                typed("candidates", int),
            ],
            [
                Api(None, FILE_SCHEMA, "picture"),
                typed("settings", dict),
                typed("people", dict),
            ],
            api_name="generate",
            **hidden,
        )
        faces.click(
            programs.find_faces,
            [Api(None, PHOTO_SCHEMA, "photo")],
            [typed("faces", list[dict])],
            api_name="find_faces",
            **hidden,
        )
        layout.click(
            programs.suggest_layout,
            [
                typed("num_people", int, 2),
                typed("width", int, 192),
                typed("height", int, 192),
                typed("arrangement", Arrangement, "suggested"),
            ],
            [typed("bboxes", list[list[float]])],
            api_name="suggest_layout",
            **hidden,
        )


def typed(label: str, kind: Any, value: Any = None) -> Api:
    return Api(value, python_type_to_json_schema(kind), label)


def file_data(path: Path) -> dict[str, Any]:
    """What clients download a file by."""
    return {
        "path": str(path),
        "url": f"/gradio_api/file={path}",
        "orig_name": path.name,
        "size": path.stat().st_size,
        "mime_type": "image/png",
        "is_stream": False,
        "meta": {"_type": "gradio.FileData"},
    }


def refusal(text: str) -> gr.Error:
    return gr.Error(text, print_exception=False)
