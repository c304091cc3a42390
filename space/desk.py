"""What visitors do, without the page: bring photos, change people, ask for pictures, restore settings."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from withanyone.arrangements import arrange
from withanyone.layout import check_bboxes
from withanyone.mini import gallery, world
from withanyone.settings import read_settings, save_picture, slider_positions

from .parts import color_of, data_uri
from .studio import MAX_SEED, SHAPES, Made, Order, Studio
from .visits import Person, Photo, Picture, Visit, Visits

FLUX_PROMPTS = (
    "a photo of two friends laughing at the beach, golden hour",
    "a photo of a person reading in a cafe, soft light",
    "a film still of two people in raincoats crossing a street at night",
)
#: The sweep's positions: rows and columns of its grid.
SWEEP_SIMILARITY = (0.6, 1.0, 1.4)
SWEEP_DIVERSITY = (0.0, 0.5, 1.0)
FACE_HELP = "Take one in which the face is large, sharp, lit, and seen from the front or half from the side."


class Desk:
    """Requests of visitors in, orders for the studio out. Whatever does not fit is a ValueError in words."""

    def __init__(self, studio: Studio, visits: Visits):
        self.studio = studio
        self.visits = visits
        self.limits = visits.limits

    @cached_property
    def common(self) -> dict[str, Any]:
        """What the people's cards show to everyone: limits, and the gallery of drawn people."""
        drawn = []
        if self.studio.miniature:
            for name, number in gallery.CAST.items():
                thumb = data_uri(gallery.draw_photo(number, size=128), 116)
                drawn.append({"name": name, "number": number, "thumb": thumb})
        return {
            "gallery": drawn,
            "last_number": len(world.RANGES["test"]) - 1,
            "most": self.limits.people,
            "upload_bytes": self.limits.upload_bytes,
            "name_length": self.limits.name,
            "hint": "Take drawn people below, or make new ones."
            if self.studio.miniature
            else "One to four people work best; several photos of a person help.",
        }

    # -- people ----------------------------------------------------------------------------------------------

    def bring(
        self,
        visit: Visit,
        files: Sequence[Mapping[str, Any]],
        person_id: str | None,
        dropped: bool,
        photos: bool = True,
    ) -> tuple[str, str, dict[str, Any] | None]:
        """Files that arrived: (what to say, its tone, settings that a dropped picture carries).

        person_id: whose photos they are; None: each of somebody new. photos: False where settings are wanted.
        """
        said, tone = [], "good"
        for file in files:
            name = str(file.get("name") or "The photo")[:60]
            try:
                with self.visits.uploaded(file.get("path")) as path:
                    settings = carried_settings(path) if dropped else None
                    if settings is not None:
                        return self.restore(visit, settings)
                    if not photos:
                        raise ValueError(f"{name} carries no settings: take a picture that was made here.")
                    said.append(self._add_photo(visit, path.read_bytes(), name, person_id))
            except ValueError as error:
                said.append(plain(error))
                tone = "warn"
        return " ".join(said), tone, None

    def _add_photo(self, visit: Visit, data: bytes, name: str, person_id: str | None) -> str:
        person = find(visit, person_id) if person_id else None
        self.check_room(visit, person)
        faces = self.studio.find_faces(data, name)[: self.limits.faces_per_photo]
        if not faces:
            help_text = gallery.NOTICE if self.studio.miniature else FACE_HELP
            raise ValueError(
                f"No {'drawn ' if self.studio.miniature else ''}face was found in {name}. {help_text}"
            )
        person = self.add(visit, Photo(faces), person)
        if len(faces) > 1:
            return f"{len(faces)} faces found in {name}: the largest is taken, click another if it is wrong."
        return f"Face of {person.name} found."

    def add(
        self, visit: Visit, photo: Photo, person: Person | None = None, name: str | None = None
    ) -> Person:
        """One more photo of a person, or a new person with it."""
        with visit.lock:
            self.check_room(visit, person)
            if person is None:
                color = visit.color_for_new()
                person = Person(name or f"Person {color + 1}", [], color)
                visit.people.append(person)
            person.photos.append(photo)
            return person

    def check_room(self, visit: Visit, person: Person | None) -> None:
        if person is None and len(visit.people) >= self.limits.people:
            raise ValueError(f"{self.limits.people} people at most: remove one first.")
        if person is not None and len(person.photos) >= self.limits.photos_per_person:
            raise ValueError(f"{self.limits.photos_per_person} photos a person at most: remove one first.")

    def act(self, visit: Visit, action: Mapping[str, Any]) -> tuple[str, str]:
        """One click on the cards: (what to say, its tone)."""
        what = action.get("do")
        with visit.lock:
            if what == "drawn":
                return self._take_drawn(visit, action.get("number"), action.get("name"))
            if what == "anybody":
                return self._take_drawn(visit, secrets.randbelow(100_000), None)
            person = find(visit, action.get("person"))
            if what == "remove":
                visit.people.remove(person)
                return f"{person.name} is removed.", ""
            if what == "rename":
                name = " ".join(str(action.get("name") or "").split())[: self.limits.name]
                person.name = name or f"Person {person.color + 1}"
                return "", ""
            photo = next((photo for photo in person.photos if photo.id == action.get("photo")), None)
            if photo is None:
                raise ValueError("This photo is gone: add it again.")
            if what == "drop":
                person.photos.remove(photo)
                if not person.photos:
                    visit.people.remove(person)
                return "The photo is removed.", ""
            if what == "choose":
                face = action.get("face")
                if not isinstance(face, int) or not 0 <= face < len(photo.faces):
                    raise ValueError(f"This photo has {len(photo.faces)} faces: choose one of them.")
                photo.chosen = face
                return f"{person.name} is face {face + 1}.", "good"
            if what == "split":
                return self._split(visit, person, photo)
        raise ValueError(f"Unknown action {what!r}.")

    def _take_drawn(self, visit: Visit, number: Any, name: Any) -> tuple[str, str]:
        if not self.studio.miniature:
            raise ValueError("Drawn people are for the miniature.")
        self.check_room(visit, None)
        photo = self.drawn_photo(number)
        known = {number: name for name, number in gallery.CAST.items()}
        person = self.add(visit, photo, name=known.get(photo.drawn[0], f"No. {photo.drawn[0]}"))
        return f"{person.name} is in the picture.", "good"

    def drawn_photo(self, number: Any, photo: Any = 0) -> Photo:
        if isinstance(number, bool) or not isinstance(number, int) or not isinstance(photo, int):
            raise ValueError("Give a whole number, 0 or more, for a drawn person.")
        faces = self.studio.find_faces(gallery.draw_photo(number, photo), f"drawn person {number}")
        if not faces:
            raise ValueError(f"The face of drawn person {number} was not found: take another number.")
        return Photo(faces[:1], drawn=(number, photo))

    def _split(self, visit: Visit, person: Person, photo: Photo) -> tuple[str, str]:
        """Everybody in a group photo becomes a person, left to right; the photo's owner keeps their face."""
        others = [i for i in range(len(photo.faces)) if i != photo.chosen]
        others.sort(key=lambda i: float(photo.faces[i].bbox[0]))
        room = self.limits.people - len(visit.people)
        for i in others[:room]:
            self.add(visit, Photo([photo.faces[i]]))
        photo.faces, photo.chosen = [photo.face], 0
        left_out = len(others) - room
        said = f"{min(room, len(others)) + 1} people taken from the photo."
        return (said, "good") if left_out <= 0 else (f"{said} {left_out} did not fit.", "warn")

    # -- orders ----------------------------------------------------------------------------------------------

    def size(self, visit: Visit, shape: str) -> tuple[int, int]:
        return self.studio.size(shape, len(visit.people))

    def suggested_boxes(self, visit: Visit, shape: str, arrangement: str = "suggested") -> list[list[int]]:
        """Boxes in whole pixels for the visit's people; [] for nobody."""
        if not visit.people:
            return []
        width, height = self.size(visit, shape)
        boxes = arrange(len(visit.people), height, width, arrangement)
        return [[round(value) for value in box] for box in boxes]

    def kept_boxes(self, visit: Visit, shape: str, text: str | None, before: tuple[int, int]) -> list:
        """Boxes after the picture's shape or size changed: scaled, if they still fit the people."""
        width, height = self.size(visit, shape)
        try:
            boxes = self.read_boxes(text)
        except ValueError:
            boxes = None
        if not boxes or len(boxes) != len(visit.people) or before == (0, 0):
            return self.suggested_boxes(visit, shape)
        sx, sy = width / before[0], height / before[1]
        if abs(sx - sy) > 0.01 * sx:  # another shape: the people would be squeezed
            return self.suggested_boxes(visit, shape)
        return [[round(v * s) for v, s in zip(box, (sx, sy, sx, sy), strict=True)] for box in boxes]

    def read_boxes(self, text: str | None) -> list[list[float]] | None:
        """Boxes as JSON; None where there is nothing."""
        if not (text or "").strip():
            return None
        try:
            boxes = json.loads(text)
            return [[float(number) for number in box] for box in boxes]
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(
                "The boxes are not readable: write [[x1, y1, x2, y2], ...] in pixels, one for each person."
            ) from error

    def order(
        self,
        *,
        prompt: Any,
        people: Sequence[Sequence[Photo]],
        names: Sequence[str],
        similarity: Any,
        diversity: Any,
        shape: Any,
        steps: Any,
        guidance: Any,
        candidates: Any,
        seed: Any,
        boxes: Sequence[Sequence[float]] | None,
        consent: Any,
        visible_mark: Any,
    ) -> Order:
        """A checked order. consent: the people, or their guardians, agreed."""
        prompt = (prompt if isinstance(prompt, str) else "").strip()
        if not prompt:
            raise ValueError("The prompt is empty: say what the picture shows.")
        if len(prompt) > self.limits.prompt:
            raise ValueError(f"The prompt has {len(prompt)} characters: {self.limits.prompt} at most.")
        if people and consent is not True:
            raise ValueError("Tick first that the people in the photos agree to this picture (`consent`).")
        if len(people) > self.limits.people:
            raise ValueError(f"{len(people)} people are given: {self.limits.people} at most.")
        if shape not in SHAPES:
            raise ValueError(f"The shape is {shape!r}: give one of {', '.join(SHAPES)}.")
        width, height = self.studio.size(shape, len(people))
        if not people:
            boxes = None
        elif boxes:
            checked = check_bboxes(boxes, height, width, num_people=len(people))
            boxes = tuple(tuple(round(value, 2) for value in box) for box in checked)
        else:  # what the page draws for so many people, so that a program gets the page's picture
            found = arrange(len(people), height, width)
            boxes = tuple(tuple(float(round(value)) for value in box) for box in found)
        drawn = tuple(
            tuple(photo.drawn for photo in photos) if all(photo.drawn for photo in photos) else None
            for photos in people
        )
        return Order(
            prompt=prompt,
            people=tuple(tuple(photo.face for photo in photos) for photos in people),
            names=tuple(names),
            similarity=number("Similarity", similarity, 0, 1.5),
            diversity=number("Diversity", diversity, 0, 1),
            shape=shape,
            steps=whole("Steps", steps, 1, self.limits.steps),
            guidance=number("Guidance", guidance, 1, 20),
            candidates=whole("Candidates", candidates, 1, self.limits.candidates),
            seed=whole("The seed", seed, 0, MAX_SEED),
            bboxes=boxes,
            visible_mark=bool(visible_mark),
            drawn=drawn if any(drawn) else None,
        )

    def keep(self, visit: Visit, made: Made) -> Picture:
        """Save a picture in the visit's folder."""
        path = visit.folder / f"{secrets.token_hex(8)}.png"
        picture = Picture(
            save_picture(made.image, path, made.settings), made.settings, made.reading, made.said
        )
        visit.keep(picture)
        return picture

    # -- restoring -------------------------------------------------------------------------------------------

    def restore(self, visit: Visit, settings: Mapping[str, Any]) -> tuple[str, str, dict[str, Any]]:
        """People that are drawn come back; the rest is checked as if a stranger had written it."""
        found = self.restorable(settings)
        drawn = settings.get("drawn")
        if self.studio.miniature and isinstance(drawn, list) and 0 < len(drawn) <= self.limits.people:
            people = [self._drawn_again(entry) for entry in drawn]
            if all(people):
                with visit.lock:
                    visit.people = []
                    known = {number: name for name, number in gallery.CAST.items()}
                    for photos in people:
                        number = photos[0].drawn[0]
                        person = self.add(visit, photos[0], name=known.get(number, f"No. {number}"))
                        for photo in photos[1 : self.limits.photos_per_person]:
                            self.add(visit, photo, person)
        count = settings.get("people")
        said = "The settings of this picture are back."
        if isinstance(count, int) and count != len(visit.people):
            who = "one person" if count == 1 else f"{count} people"
            said += f" It shows {who}: add the same photos, which no file keeps."
        return said, "good", found

    def _drawn_again(self, entry: Any) -> list[Photo]:
        if not isinstance(entry, list) or not entry:
            return []
        try:
            return [self.drawn_photo(*pair) for pair in entry[: self.limits.photos_per_person]]
        except (ValueError, TypeError):
            return []

    def restorable(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that the page has a place for and whose values are allowed."""
        sliders = {name: settings.get(name) for name in ("similarity", "diversity")}
        scales = [settings.get(name) for name in ("id_scale", "siglip_scale")]
        if sliders["similarity"] is None and all(isinstance(s, (int, float)) for s in scales):
            sliders = dict(zip(sliders, slider_positions(*scales), strict=True))
        checks = {
            "prompt": lambda v: v[: self.limits.prompt] if isinstance(v, str) else None,
            "similarity": lambda v: number("similarity", v, 0, 1.5),
            "diversity": lambda v: number("diversity", v, 0, 1),
            "shape": lambda v: v if v in SHAPES else None,
            "steps": lambda v: whole("steps", v, 1, self.limits.steps),
            "guidance": lambda v: number("guidance", v, 1, 20),
            "candidates": lambda v: whole("candidates", v, 1, self.limits.candidates),
            "seed": lambda v: whole("seed", v, 0, MAX_SEED),
            "boxes": lambda v: self.read_boxes(json.dumps(v)) if v else None,
        }
        given = {
            **settings,
            **sliders,
            "steps": settings.get("num_inference_steps"),
            "guidance": settings.get(self.studio.guidance_name),
            "candidates": settings.get("num_candidates"),
            "boxes": settings.get("bboxes"),
        }
        found = {}
        for name, check in checks.items():
            try:
                value = check(given.get(name))
            except (ValueError, TypeError):
                continue
            if value is not None:
                found[name] = value
        return found

    def words(self, text: str | None) -> str:
        """Which words of a prompt the miniature does not know; "" where it knows all."""
        unknown = world.unknown_words(text or "") if self.studio.miniature else []
        if self.studio.miniature and (text or "").strip() and not unknown and not _has_words(text):
            return "The miniature knows English words only."
        if not unknown:
            return ""
        shown = ", ".join(unknown[:12]) + (" …" if len(unknown) > 12 else "")
        return f"The miniature does not know these words and passes over them: {shown}"


def _has_words(text: str | None) -> bool:
    return any(letter.isascii() and letter.isalpha() for letter in text or "")


def carried_settings(path: Path) -> dict[str, Any] | None:
    """The settings in a picture's file; None where it is no picture, or carries none."""
    try:
        return read_settings(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def find(visit: Visit, person_id: Any) -> Person:
    person = next((person for person in visit.people if person.id == person_id), None)
    if person is None:
        raise ValueError("This person is gone: add them again.")
    return person


def number(name: str, value: Any, low: float, high: float) -> float:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= value <= high:
        raise ValueError(f"{name} is {value}: give a number from {low:g} to {high:g}.")
    return float(value)


def whole(name: str, value: Any, low: int, high: int) -> int:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value != int(value) or not low <= value <= high:
        raise ValueError(f"{name} is {value}: give a whole number from {low} to {high}.")
    return int(value)


def plain(error: ValueError) -> str:
    """An error's words for a visitor, without the marks around code."""
    return str(error).replace("`", "")


def look_of(visit: Visit) -> list[dict[str, str]]:
    """Names and colours of a visit's people, in order."""
    return [{"name": person.name, "color": color_of(person)} for person in visit.people]
