"""The drawn world: people who exist only as numbers, and pictures of them.

A person is an :class:`Identity`, fixed by a seed: bone structure, the shape and spacing of features, skin,
eyes, brows, marks. Everything else belongs to an :class:`Appearance` and changes from picture to picture:
pose, expression, gaze, hair, beard, glasses, hat, make-up, clothes. :func:`render` draws people into a
scene and knows the truth about it: boxes, landmarks, attributes, caption. All randomness comes from seeds,
so the same arguments give the same bytes. Drawing itself is in ``draw.py``, backgrounds in ``scenes.py``,
words in ``words.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType

import numpy as np

from . import draw, scenes
from .words import (
    VOCABULARY,
    caption_of,
    fixed_prompt,
    known_form,
    unknown_words,
)

__all__ = [
    "PERSON_ATTRIBUTES",
    "PICTURE_ATTRIBUTES",
    "RANGES",
    "VOCABULARY",
    "Appearance",
    "Identity",
    "Person",
    "Picture",
    "caption_of",
    "contact_sheet",
    "fixed_prompt",
    "known_form",
    "make_identity",
    "random_appearance",
    "render",
    "split_of",
    "unknown_words",
]

MAX_PEOPLE = 8
SUPERSAMPLING = 2

#: Identity seeds of the four splits: disjoint by construction.
RANGES: dict[str, range] = {
    "train": range(0, 1_000_000),
    "judge": range(1_000_000, 2_000_000),
    "validation": range(2_000_000, 3_000_000),
    "test": range(3_000_000, 4_000_000),
}

#: What may change about a person, by name, with its values.
PERSON_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "hair_style": ("bald", "short", "spiky", "bob", "long", "curly", "bun", "ponytail", "braids", "mohawk"),
    "hair_color": ("black", "brown", "blond", "red", "grey", "blue", "pink"),
    "hat": ("none", "cap", "beanie", "straw hat", "headband"),
    "glasses": ("none", "round", "square", "sunglasses"),
    "beard": ("none", "stubble", "moustache", "beard"),
    "expression": ("neutral", "smiling", "laughing", "surprised", "sad", "angry"),
    "makeup": ("none", "lipstick"),
    "clothing": ("t-shirt", "shirt", "hoodie", "sweater", "jacket"),
    "clothing_color": ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black", "white"),
    "pose": ("left", "ahead", "right"),
}

#: What may change about a whole picture.
PICTURE_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "scene": scenes.SCENES,
    "light": tuple(draw.LIGHTS),
}

#: Hair that still shows what it is under a hat.
HAIR_UNDER_HATS = ("short", "bob", "long", "curly", "ponytail", "braids")

#: Lights that would contradict a scene, left out when the light is drawn at random.
UNFITTING_LIGHTS = {"night": ("daylight",), "sunset": ("daylight", "cool light")}

#: Continuous identity traits: name -> (centre, spread); a person's value is uniform in centre ± spread.
#: Lengths are in head units (the face from forehead to chin is about 1.8 high).
TRAITS: dict[str, tuple[float, float]] = {
    "face_width": (0.80, 0.115),
    "cheekbones": (1.00, 0.055),
    "forehead_width": (0.93, 0.085),
    "forehead_height": (1.20, 0.07),
    "jaw": (0.76, 0.15),
    "chin_width": (0.35, 0.11),
    "chin_length": (0.00, 0.12),
    "chin_forward": (0.00, 0.09),
    "cheek_fullness": (0.00, 1.00),
    "eye_spacing": (0.365, 0.06),
    "eye_height": (-0.06, 0.075),
    "eye_width": (0.205, 0.042),
    "eye_opening": (0.60, 0.16),
    "eye_tilt": (0.03, 0.24),
    "eye_depth": (0.50, 0.50),
    "iris_size": (0.112, 0.019),
    "lid_crease": (0.50, 0.50),
    "lash": (0.50, 0.50),
    "brow_thickness": (0.078, 0.042),
    "brow_tilt": (-0.06, 0.20),
    "brow_height": (0.28, 0.062),
    "brow_length": (0.245, 0.06),
    "brow_arch": (0.50, 0.50),
    "brow_taper": (0.50, 0.50),
    "brow_gap": (0.00, 0.045),
    "nose_length": (0.42, 0.105),
    "nose_width": (0.165, 0.065),
    "nose_bridge": (0.075, 0.035),
    "nose_tip": (0.50, 0.50),
    "nose_turn": (0.00, 1.00),
    "nose_lift": (0.22, 0.085),
    "nose_hump": (0.00, 0.06),
    "mouth_width": (0.30, 0.085),
    "mouth_height": (0.615, 0.05),
    "upper_lip": (0.062, 0.034),
    "lower_lip": (0.085, 0.042),
    "cupids_bow": (0.50, 0.50),
    "mouth_corners": (0.018, 0.026),
    "ear_size": (0.19, 0.065),
    "ear_out": (0.05, 0.06),
    "ear_height": (0.06, 0.07),
    "ear_lobe": (0.50, 0.50),
    "skin_tone": (0.50, 0.50),
    "skin_undertone": (0.00, 1.00),
    "skin_rosiness": (0.50, 0.50),
    "lip_tint": (0.50, 0.50),
    "brow_tone": (0.50, 0.50),
    "eye_asymmetry": (0.00, 0.028),
    "mouth_asymmetry": (0.00, 0.022),
    "nose_asymmetry": (0.00, 0.03),
    "jaw_asymmetry": (0.00, 0.035),
}

#: Traits that many people lack: name -> the share of people who have it (value then uniform in 0.35 to 1).
MARKS: dict[str, float] = {
    "smile_folds": 0.35,
    "eye_bags": 0.35,
    "forehead_lines": 0.22,
    "crows_feet": 0.22,
    "chin_dimple": 0.25,
    "cheek_dimples": 0.22,
    "freckles": 0.25,
    "hollow_cheeks": 0.25,
}

SKIN_TONES = ((92, 60, 46), (124, 82, 58), (150, 102, 72), (188, 138, 104), (222, 176, 142), (246, 210, 184))
IRIS_COLORS = (
    (62, 38, 22),
    (104, 64, 30),
    (142, 98, 44),
    (86, 118, 60),
    (66, 132, 112),
    (64, 112, 172),
    (108, 150, 190),
    (118, 122, 130),
)
BROW_COLORS = ((30, 24, 22), (58, 38, 26), (88, 58, 36), (140, 100, 56), (124, 62, 34), (44, 32, 28))


def split_of(identity: int) -> str:
    """Name of the split whose range holds this identity seed."""
    for name, seeds in RANGES.items():
        if identity in seeds:
            return name
    raise ValueError(
        f"`identity` must lie in one of the ranges of RANGES (0 to 3,999,999), got {identity!r}."
    )


@dataclass(frozen=True)
class Identity:
    """Everything about a person that no picture can change. Colours are RGB in 0..255."""

    seed: int
    traits: Mapping[str, float]
    skin: tuple[float, float, float]
    lips: tuple[float, float, float]
    iris: tuple[float, float, float]
    brows: tuple[float, float, float]
    freckle_spots: tuple[tuple[float, float], ...]
    moles: tuple[tuple[float, float, float], ...]
    scar: tuple[float, float, float] | None

    def __getitem__(self, trait: str) -> float:
        return self.traits[trait]


def _ramp(colors: Sequence[Sequence[float]], position: float) -> np.ndarray:
    """Colour at ``position`` in 0..1 along a list of colours."""
    stops = np.linspace(0, 1, len(colors))
    return np.array([np.interp(position, stops, channel) for channel in np.array(colors, float).T])


@lru_cache(maxsize=4096)
def make_identity(seed: int) -> Identity:
    """The person with this seed. Different seeds give independent people.

    Raises ValueError for a seed outside every range of :data:`RANGES`.
    """
    split_of(seed)
    rng = np.random.default_rng([0x1D, int(seed)])
    traits = {name: float(center + spread * rng.uniform(-1, 1)) for name, (center, spread) in TRAITS.items()}
    for name, share in MARKS.items():
        present, strength = rng.random() < share, rng.uniform(0.35, 1.0)
        traits[name] = float(strength) if present else 0.0

    undertone = np.array([4.0, -1.0, -9.0]) * traits["skin_undertone"]
    rosiness = np.array([5.0, -7.0, -4.0]) * (traits["skin_rosiness"] - 0.5)
    skin = np.clip(_ramp(SKIN_TONES, traits["skin_tone"]) + undertone + rosiness, 20, 252)
    lip_color = _ramp(((0.86, 0.58, 0.54), (0.93, 0.58, 0.58), (0.98, 0.52, 0.56)), traits["lip_tint"])
    lips = np.clip(skin * lip_color + np.array([14, 0, 4]), 20, 240)
    iris = np.array(IRIS_COLORS[rng.integers(len(IRIS_COLORS))]) + rng.uniform(-14, 14, 3)
    brows = np.array(BROW_COLORS[rng.integers(len(BROW_COLORS))]) * (0.75 + 0.4 * traits["brow_tone"])
    brows = brows * (0.55 + 0.45 * traits["skin_tone"])

    spots = rng.uniform(-1, 1, (26, 2))
    number_of_moles = rng.choice(4, p=[0.4, 0.3, 0.2, 0.1])
    moles = [(rng.uniform(-0.5, 0.5), rng.uniform(-0.45, 0.75), rng.uniform(0.026, 0.042)) for _ in range(3)]
    scar = (rng.uniform(-0.55, 0.55), rng.uniform(-0.55, 0.45), rng.uniform(-1, 1))
    return Identity(
        seed=int(seed),
        traits=MappingProxyType(traits),
        skin=tuple(map(float, skin)),
        lips=tuple(map(float, lips)),
        iris=tuple(map(float, np.clip(iris, 15, 230))),
        brows=tuple(map(float, np.clip(brows, 12, 200))),
        freckle_spots=tuple((float(u), float(v)) for u, v in spots) if traits["freckles"] else (),
        moles=tuple(tuple(map(float, mole)) for mole in moles[:number_of_moles]),
        scar=tuple(map(float, scar)) if rng.random() < 0.12 else None,
    )


@dataclass
class Appearance:
    """How a person looks in one picture. Angles in radians; yaw > 0 turns the face to the picture's right."""

    yaw: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0
    gaze: float = 0.0
    expression: str = "neutral"
    hair_style: str = "short"
    hair_color: str = "brown"
    hat: str = "none"
    hat_color: str = "red"
    glasses: str = "none"
    beard: str = "none"
    makeup: str = "none"
    clothing: str = "t-shirt"
    clothing_color: str = "blue"
    weight: float = 0.0
    detail_seed: int = 0

    def __post_init__(self) -> None:
        for name, values in PERSON_ATTRIBUTES.items():
            if name != "pose" and getattr(self, name) not in values:
                raise ValueError(f"`{name}` must be one of {', '.join(values)}, got {getattr(self, name)!r}.")

    @property
    def pose(self) -> str:
        """Where the face is turned to, as seen in the picture: left, ahead or right."""
        if abs(self.yaw) < POSE_YAW:
            return "ahead"
        return "right" if self.yaw > 0 else "left"

    def attributes(self) -> dict[str, str]:
        """Value of every name in :data:`PERSON_ATTRIBUTES`."""
        return {name: getattr(self, name) for name in PERSON_ATTRIBUTES}


#: Yaw (radians) from which a face counts as looking left or right.
POSE_YAW = 0.23


def _pick(rng: np.random.Generator, attribute: str, weights: Sequence[float] | None = None) -> str:
    values = PERSON_ATTRIBUTES[attribute]
    shares = None if weights is None else np.array(weights, float) / np.sum(weights)
    return values[int(rng.choice(len(values), p=shares))]


def random_appearance(rng: np.random.Generator) -> Appearance:
    """An appearance drawn independently of who the person is."""
    ahead, turn, side = rng.random() < 0.42, rng.beta(1.6, 1.5), rng.choice([-1.0, 1.0])
    yaw = float(np.clip(rng.normal(0, 0.1), -0.19, 0.19)) if ahead else float(side * (0.28 + 0.49 * turn))
    hat = _pick(rng, "hat", (60, 11, 11, 9, 9))
    hair_style = _pick(rng, "hair_style")
    if hat != "none":
        hair_style = HAIR_UNDER_HATS[int(rng.integers(len(HAIR_UNDER_HATS)))]
    return Appearance(
        yaw=yaw,
        pitch=float(np.clip(rng.normal(0, 0.13), -0.3, 0.3)),
        roll=float(np.clip(rng.normal(0, 0.1), -0.3, 0.3)),
        gaze=float(rng.uniform(-1, 1)),
        expression=_pick(rng, "expression", (23, 29, 17, 12, 10, 9)),
        hair_style=hair_style,
        hair_color=_pick(rng, "hair_color", (22, 20, 16, 13, 11, 9, 9)),
        hat=hat,
        hat_color=_pick(rng, "clothing_color"),
        glasses=_pick(rng, "glasses", (60, 14, 14, 12)),
        beard=_pick(rng, "beard", (70, 9, 9, 12)),
        makeup=_pick(rng, "makeup", (80, 20)),
        clothing=_pick(rng, "clothing"),
        clothing_color=_pick(rng, "clothing_color"),
        weight=float(rng.uniform(-1, 1)),
        detail_seed=int(rng.integers(1 << 30)),
    )


@dataclass
class Person:
    """One person of a picture. ``bbox``: (4,) float32, xyxy pixels of the tight face (forehead to chin).

    ``kps``: (5, 2) float32 pixels: left eye, right eye, nose tip, left and right mouth corner as seen.
    """

    identity: int
    appearance: Appearance
    bbox: np.ndarray
    kps: np.ndarray

    def attributes(self) -> dict[str, str]:
        """Value of every name in :data:`PERSON_ATTRIBUTES` for this person."""
        return self.appearance.attributes()


@dataclass
class Picture:
    """A rendered picture, (H, W, 3) uint8 RGB, and the truth about it; people from left to right."""

    image: np.ndarray
    people: list[Person] = field(default_factory=list)
    scene: str = ""
    light: str = ""
    caption: str = ""


def _check_choice(name: str, value: str | None, allowed: Sequence[str]) -> None:
    if value is not None and value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(allowed)} or None, got {value!r}.")


def _check_sizes(width: int, height: int) -> None:
    for name, size in (("width", width), ("height", height)):
        if size < 32 or size % 16:
            raise ValueError(f"`{name}` must be a multiple of 16 of at least 32 pixels, got {size!r}.")


def _check_faces(bboxes: Sequence, count: int, width: int, height: int) -> np.ndarray:
    boxes = np.asarray(bboxes, np.float64)
    if boxes.shape != (count, 4):
        raise ValueError(
            f"`bboxes` must hold one box of four numbers per person, {count} in all, got {boxes.shape}."
        )
    inside = (
        np.isfinite(boxes).all() and (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= (width, height)).all()
    )
    if not inside or (boxes[:, 2:] - boxes[:, :2] < 4).any():
        raise ValueError(
            f"`bboxes` must be xyxy pixels inside the {width} x {height} picture, at least 4 pixels wide "
            f"and high, got {boxes.tolist()}."
        )
    return boxes


def place_faces(count: int, width: int, height: int, rng: np.random.Generator, close_up: bool) -> np.ndarray:
    """Where ``count`` faces go: (count, 3) of centre x, centre y and face height in pixels, left to right."""
    if count == 0:
        return np.zeros((0, 3))
    if close_up:
        share = rng.uniform(0.60, 0.68)
        size = min(share * height, 0.78 * width)
        return np.array([[width * rng.uniform(0.46, 0.54), height * rng.uniform(0.52, 0.56), size]])
    rows = 1 if count <= 4 else 2
    if width < 0.8 * height and count >= 3 or width < 0.45 * height and count == 2:
        rows = 2
    columns = -(-count // rows)
    spacing = width / columns
    largest = 0.53 * height if rows == 1 else 0.21 * height
    size = min((0.86 if count > 3 else 0.78) * spacing, largest) * rng.uniform(0.93, 1.03)
    faces = []
    for row in range(rows):
        in_row = min(columns, count - row * columns)
        middle = (0.55 if rows == 1 else 0.30 + 0.39 * row) * height
        for column in range(in_row):
            center_x = width * (column + 0.5) / in_row + spacing * rng.uniform(-0.05, 0.05)
            stagger = (0.045 * (-1) ** column if rows == 1 and count > 1 else 0.0) * height
            center_y = middle + stagger + height * rng.uniform(-0.035, 0.035) / rows
            faces.append((center_x, center_y, size * rng.uniform(0.96, 1.04)))
    return np.array(faces)


def render(
    identities: Sequence[int],
    seed: int,
    *,
    width: int = 128,
    height: int = 128,
    scene: str | None = None,
    light: str | None = None,
    appearances: Sequence[Appearance] | None = None,
    bboxes: Sequence | None = None,
    close_up: bool = False,
) -> Picture:
    """Draw people into a scene. The same arguments give the same bytes.

    Args:
        identities: 0 to 8 identity seeds.
        seed: decides everything that is not given: layout, scene, light, appearances, caption.
        width, height: pixels, multiples of 16.
        scene, light: values of :data:`PICTURE_ATTRIBUTES`, or None to have them drawn.
        appearances: one per person in the order of ``identities``, or None to have them drawn.
        bboxes: (N, 4) xyxy pixels: where the faces go. Centre and height are met (a face is moved and shrunk
            where it would leave the picture); the width is the person's own.
        close_up: one person whose face fills the picture, as in a reference photo.

    Returns:
        A :class:`Picture`; its people are ordered from left to right.

    Raises:
        ValueError: for arguments out of range; the message names the argument.
    """
    count = len(identities)
    if count > MAX_PEOPLE:
        raise ValueError(f"`identities` must name at most {MAX_PEOPLE} people, got {count}.")
    if close_up and count != 1:
        raise ValueError(f"`close_up` shows one person, got {count} `identities`.")
    if appearances is not None and len(appearances) != count:
        raise ValueError(f"`appearances` must hold one per person, {count} in all, got {len(appearances)}.")
    _check_sizes(width, height)
    _check_choice("scene", scene, PICTURE_ATTRIBUTES["scene"])
    _check_choice("light", light, PICTURE_ATTRIBUTES["light"])
    boxes = None if bboxes is None else _check_faces(bboxes, count, width, height)

    rng_scene, rng_people, rng_layout, rng_caption = (
        np.random.default_rng([stream, int(seed)]) for stream in (0x5C, 0x9E, 0x1A, 0xCA)
    )
    drawn_scene = str(rng_scene.choice(PICTURE_ATTRIBUTES["scene"]))
    scene = scene or drawn_scene
    unfitting = UNFITTING_LIGHTS.get(scene, ())
    drawn_light = str(
        rng_scene.choice([name for name in PICTURE_ATTRIBUTES["light"] if name not in unfitting])
    )
    light = light or drawn_light
    lighting = draw.make_light(light, rng_scene)

    drawn_appearances = [random_appearance(rng_people) for _ in identities]
    looks = list(appearances) if appearances is not None else drawn_appearances
    layout = place_faces(count, width, height, rng_layout, close_up)
    if boxes is not None:
        layout = np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 3:] - boxes[:, 1:2]], axis=1)

    background = scenes.draw_scene(scene, width, height, rng_scene)
    canvas = draw.Canvas.enlarged(background, SUPERSAMPLING)
    people: list[Person | None] = [None] * count
    for index in np.lexsort((layout[:, 2], np.round(layout[:, 1] / (0.2 * height)))):
        identity = make_identity(int(identities[index]))
        head = draw.Head.placed(identity, looks[index], layout[index], (width, height), SUPERSAMPLING)
        draw.draw_person(canvas, head, identity, looks[index], lighting)
        kps = (head.landmarks() / SUPERSAMPLING).astype(np.float32)
        bbox = (head.face_box() / SUPERSAMPLING).astype(np.float32)
        people[index] = Person(int(identities[index]), looks[index], bbox, kps)

    people.sort(key=lambda person: float(person.bbox[0] + person.bbox[2]))
    image = draw.finish(canvas, lighting, SUPERSAMPLING)
    caption = caption_of(people, scene, light, rng_caption)
    return Picture(image=image, people=people, scene=scene, light=light, caption=caption)


def contact_sheet(
    rows: int = 6, columns: int = 8, size: int = 128, seed: int = 0, split: str = "validation"
) -> np.ndarray:
    """A sheet (rows * size, columns * size, 3): a row shows one person many times, the last rows groups."""
    first = RANGES[split].start
    sheet = []
    for row in range(rows):
        people = [first + 100 * seed + row * 10 + offset for offset in range(MAX_PEOPLE)]
        group = max(0, row - rows // 2)
        shown = people[: group + 1]
        sheet.append(
            np.hstack(
                [
                    render(shown, 1000 * seed + row * 50 + column, width=size, height=size).image
                    for column in range(columns)
                ]
            )
        )
    return np.vstack(sheet)
