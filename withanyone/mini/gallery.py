"""What the miniature offers to those who try it: drawn people, prompts it understands, sizes it knows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from . import world

if TYPE_CHECKING:
    from ..faces import Face

NOTICE = (
    "This miniature knows drawn people only: take some from its gallery, or make new ones from a number. "
    "Photos of real people need FLUX.1 with the released weights."
)

#: Drawn people to start with: name -> number. None of them was seen in training.
CAST: dict[str, int] = {
    "Ada": 1,
    "Bela": 2,
    "Chidi": 3,
    "Dilan": 4,
    "Edda": 5,
    "Farid": 6,
    "Gita": 7,
    "Hana": 8,
    "Ilja": 9,
    "Jun": 10,
    "Kaya": 11,
    "Lou": 12,
}

#: Prompts to start with, in words that the miniature knows, by number of people.
PROMPTS: dict[int, tuple[str, ...]] = {
    1: (
        "a smiling person with long red hair wearing a blue sweater, facing the camera, at the beach",
        "a portrait of a laughing person wearing round glasses and a yellow hoodie in a city",
        "a surprised person with short black hair wearing a straw hat in a garden with flowers",
    ),
    2: (
        "two people at the beach in daylight",
        "two friends in a cafe: on the left a laughing person in a green shirt, "
        "on the right a smiling person wearing sunglasses",
        "two people in the snow wearing beanies",
    ),
    3: ("three people in the mountains in warm light", "three friends at sunset"),
    4: ("a group of four people in a garden", "four people in an office in daylight"),
}

#: Width and height in pixels of each shape, by number of people; more people take the last.
SIZES: dict[str, dict[int, tuple[int, int]]] = {
    "square": {1: (128, 128), 2: (192, 192), 3: (256, 256)},
    "landscape": {1: (192, 128), 2: (256, 192)},
    "portrait": {1: (128, 192), 2: (192, 256)},
}


#: Faces of which the detector is less sure are not taken for drawn ones: of 810 drawn portraits of validation
#: people none scored below 0.952; of 100 small photos of real faces (scikit-image's) 94 did.
DRAWN_SCORE = 0.94


def is_miniature(model: str | os.PathLike) -> bool:
    """Is this model folder the bundled miniature?"""
    from . import PRETRAINED

    return Path(model).expanduser().resolve() == Path(PRETRAINED).resolve()


def size_for(num_people: int, shape: str = "square") -> tuple[int, int]:
    """(width, height) in pixels of the miniature's pictures of so many people."""
    if num_people < 0:
        raise ValueError(f"`num_people` is {num_people}: give 0 or more.")
    if shape not in SIZES:
        raise ValueError(f"`shape` is {shape!r}: give one of {', '.join(SIZES)}.")
    return SIZES[shape][min(max(num_people, 1), max(SIZES[shape]))]


def check_drawn(people: Sequence[Sequence[Face]]) -> None:
    """A ValueError that says what to do where a face, though found, is hardly that of a drawn person.

    people: for each person the faces of the photos, as `WithAnyonePipeline.find_faces` gives them.
    """
    for i, faces in enumerate(people):
        for face in faces:
            if face.det_score < DRAWN_SCORE:
                raise ValueError(
                    f"`faces[{i}]`: no face found that looks drawn (score {face.det_score:.2f}; drawn ones "
                    f"have {DRAWN_SCORE} and more)."
                )


def draw_photo(number: int, photo: int = 0, size: int = 256) -> Image.Image:
    """One photo, so to speak, of the drawn person with this number; other values of `photo` show the person
    at other times: hair, clothes, expression, pose and light change, the face stays.

    People come from the range that no training has seen. size: pixels to a side, a multiple of 16.
    """
    people = world.RANGES["test"]
    if not 0 <= number < len(people):
        raise ValueError(f"`number` is {number}: drawn people have the numbers 0 to {len(people) - 1}.")
    if photo < 0:
        raise ValueError(f"`photo` is {photo}: give 0 or more.")
    seed = number * 1009 + photo
    picture = world.render([people[number]], seed, width=size, height=size, close_up=True)
    return Image.fromarray(picture.image)
