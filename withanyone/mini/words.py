"""Words for the drawn world: captions from a small closed vocabulary, and which words of a prompt are known.

A caption says how many people there are, then per person (from left to right) hair, expression, hat, glasses,
beard, clothes and pose, then scene and light, in varied phrasing and with parts left out at random.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

#: Longest caption in words and punctuation marks, so that it fits a text encoder of 96 tokens.
MAX_CAPTION_TOKENS = 88

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
OPENERS = ("", "", "a photo of ", "a picture of ", "an image of ", "a drawing of ")
OPENERS_ONE = ("a portrait of ", "a close photo of ")
EXPRESSIONS = {
    "neutral": ("neutral", "calm", "serious"),
    "smiling": ("smiling", "smiling", "happy"),
    "laughing": ("laughing", "laughing", "joyful"),
    "surprised": ("surprised", "surprised", "amazed"),
    "sad": ("sad", "sad", "unhappy"),
    "angry": ("angry", "angry", "mad"),
}
HAIR_COLORS = {
    "black": ("black",),
    "brown": ("brown",),
    "blond": ("blond", "blonde"),
    "red": ("red",),
    "grey": ("grey", "gray"),
    "blue": ("blue",),
    "pink": ("pink",),
}
HAIR_STYLES = {
    "bald": ("a bald head", "no hair"),
    "short": ("short {color} hair",),
    "spiky": ("spiky {color} hair",),
    "bob": ("a {color} bob", "{color} hair cut in a bob"),
    "long": ("long {color} hair",),
    "curly": ("curly {color} hair",),
    "bun": ("{color} hair in a bun", "a {color} bun"),
    "ponytail": ("{color} hair in a ponytail", "a {color} ponytail"),
    "braids": ("{color} braids", "{color} hair in braids"),
    "mohawk": ("a {color} mohawk",),
}
GLASSES = {
    "round": ("round glasses",),
    "square": ("square glasses",),
    "sunglasses": ("sunglasses", "dark glasses"),
}
HATS = {
    "cap": ("a cap",),
    "beanie": ("a beanie", "a wool hat"),
    "straw hat": ("a straw hat", "a sun hat"),
    "headband": ("a headband",),
}
BEARDS = {
    "stubble": ("stubble",),
    "moustache": ("a moustache", "a mustache"),
    "beard": ("a beard", "a full beard"),
}
MAKEUP = {"lipstick": ("lipstick", "makeup")}
CLOTHES = {
    "t-shirt": ("t-shirt",),
    "shirt": ("shirt",),
    "hoodie": ("hoodie",),
    "sweater": ("sweater",),
    "jacket": ("jacket",),
}
POSES = {
    "left": ("looking left", "looking to the left", "facing left", "turned to the left"),
    "ahead": ("looking ahead", "facing the camera", "looking at the camera"),
    "right": ("looking right", "looking to the right", "facing right", "turned to the right"),
}
SCENES = {
    "beach": ("at the beach", "on the beach", "by the sea"),
    "forest": ("in a forest", "in the forest", "in the woods"),
    "city": ("in the city", "in a city", "on a city street"),
    "office": ("in an office", "in the office"),
    "sunset": ("at sunset", "in front of the sunset"),
    "snow": ("in the snow", "in winter"),
    "room": ("in a living room", "at home"),
    "garden": ("in a garden", "in a garden with flowers"),
    "night": ("at night", "under the stars", "in the night"),
    "cafe": ("in a cafe", "in a coffee shop"),
    "mountains": ("in the mountains", "in front of mountains"),
    "studio": ("in a studio", "in front of a plain wall"),
}
LIGHTS = {
    "daylight": ("in daylight", "in bright daylight"),
    "warm light": ("in warm light",),
    "cool light": ("in cool light", "in cold light"),
    "side light": ("in side light", "with light from the side"),
    "dim light": ("in dim light", "in soft dim light"),
}
#: Words of the sentences around the tables above, and of the fixed prompts.
GLUE = (
    "a an and the of in on at with by from to is are wearing person people persons friends group who there",
    "has no nobody empty scene left right middle first second third fourth fifth sixth seventh eighth photo",
)

_TOKENS = re.compile(r"[a-z]+(?:[-'][a-z]+)*|[^\sa-z]")
_WORDS = re.compile(r"[^\W_]+(?:[-'’][^\W_]+)*")


def _phrases() -> list[str]:
    tables = (
        EXPRESSIONS,
        HAIR_COLORS,
        HAIR_STYLES,
        GLASSES,
        HATS,
        BEARDS,
        MAKEUP,
        CLOTHES,
        POSES,
        SCENES,
        LIGHTS,
    )
    phrases = [phrase for table in tables for options in table.values() for phrase in options]
    colors = "red orange yellow green blue purple pink black white"
    return [*phrases, *OPENERS, *OPENERS_ONE, *NUMBERS, *GLUE, colors]


#: Every word a caption can contain, lower case, sorted.
VOCABULARY: tuple[str, ...] = tuple(
    sorted({word for phrase in _phrases() for word in _WORDS.findall(phrase.replace("{color}", " "))})
)
_KNOWN = frozenset(VOCABULARY)
SPELLINGS = {
    "tshirt": "t-shirt",
    "tee": "t-shirt",
    "café": "cafe",
    "photograph": "photo",
    "pic": "picture",
    "eyeglasses": "glasses",
    "spectacles": "glasses",
    "jumper": "sweater",
    "pullover": "sweater",
    "golden": "blond",
    "ginger": "red",
    "smiles": "smiling",
    "smile": "smiling",
    "laughs": "laughing",
    "wears": "wearing",
    "centre": "middle",
    "center": "middle",
    "cold": "cold",
    "woman": "person",
    "man": "person",
    "women": "people",
    "men": "people",
    "girl": "person",
    "boy": "person",
    "2": "two",
    "3": "three",
    "4": "four",
    "1": "one",
}


def known_form(word: str) -> str | None:
    """The vocabulary's form of a word (case, plural, common spellings), or None for an unknown word."""
    word = word.lower().replace("’", "'")
    candidates = [word, SPELLINGS.get(word, ""), word.removesuffix("'s"), word.removesuffix("s")]
    candidates += [word.removesuffix("es"), word + "s"]
    return next((form for form in candidates if form in _KNOWN), None)


def unknown_words(prompt: str) -> list[str]:
    """Words of ``prompt`` that no caption of the drawn world contains, in order, each once, as written."""
    words = [word for word in _WORDS.findall(prompt) if known_form(word) is None]
    return list(dict.fromkeys(words))


def count_phrase(count: int) -> str:
    """ "one person", "two people", ... "eight people"."""
    return "one person" if count == 1 else f"{NUMBERS[count]} people"


def fixed_prompt(count: int) -> str:
    """The dummy prompt of the first training phase: the number of people and nothing else."""
    if not 0 <= count < len(NUMBERS):
        raise ValueError(f"`count` must be 0 to {len(NUMBERS) - 1} people, got {count!r}.")
    return count_phrase(count)


def _one_of(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _join(parts: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def describe_person(attributes: dict[str, str], rng: np.random.Generator, detail: float) -> str:
    """One person in words, e.g. "a smiling person with long red hair, wearing a cap and a blue hoodie".

    ``detail``: probability (0..1) with which each attribute is mentioned.
    """

    def said(share: float = 1.0) -> bool:
        return rng.random() < detail * share

    expression = _one_of(rng, EXPRESSIONS[attributes["expression"]])
    hair_color = _one_of(rng, HAIR_COLORS[attributes["hair_color"]])
    hair = _one_of(rng, HAIR_STYLES[attributes["hair_style"]]).format(color=hair_color)
    adjectives = [expression] if said(0.7 if attributes["expression"] == "neutral" else 1.0) else []
    features = []
    if said():
        if attributes["hair_style"] == "bald" and rng.random() < 0.5:
            adjectives.append("bald")
        else:
            features.append(hair)
    if attributes["beard"] != "none" and said():
        features.append(_one_of(rng, BEARDS[attributes["beard"]]))
    worn = []
    if attributes["hat"] != "none" and said():
        worn.append(_one_of(rng, HATS[attributes["hat"]]))
    if attributes["glasses"] != "none" and said():
        worn.append(_one_of(rng, GLASSES[attributes["glasses"]]))
    if attributes["makeup"] != "none" and said(0.7):
        worn.append(_one_of(rng, MAKEUP[attributes["makeup"]]))
    clothes = said()
    garment = f"{attributes['clothing_color']} {_one_of(rng, CLOTHES[attributes['clothing']])}"
    in_clothes = rng.random() < 0.35
    if clothes and not in_clothes:
        worn.append(_article(garment))
    pose = (
        _one_of(rng, POSES[attributes["pose"]])
        if said(0.55 if attributes["pose"] == "ahead" else 0.9)
        else ""
    )

    text = _article(" ".join([*adjectives, "person"]))
    if features:
        text += f" with {_join(features)}"
    if worn:
        text += f"{', ' if features else ' '}wearing {_join(worn)}"
    if clothes and in_clothes:
        text += f" in {_article(garment)}"
    return text + (f", {pose}" if pose else "")


ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")


def _positions(count: int, rng: np.random.Generator) -> list[str]:
    """Where each person of a group stands, in words, left to right."""
    if count == 2:
        return ["on the left", "on the right"]
    if count == 3:
        return ["on the left", "in the middle", "on the right"]
    if count == 4 and rng.random() < 0.5:
        return ["on the left", "second from the left", "second from the right", "on the right"]
    return [ORDINALS[index] for index in range(count)]


def _group(descriptions: Sequence[str], rng: np.random.Generator) -> str:
    """Descriptions of several people, each tied to its place."""
    count = len(descriptions)
    style = rng.integers(3)
    if style == 0:
        return "from left to right " + ", ".join(descriptions[:-1]) + f" and {descriptions[-1]}"
    positions = _positions(count, rng)
    if positions[0] == "first":
        return "from left to right: " + "; ".join(
            f"{place} {text}" for place, text in zip(positions, descriptions, strict=True)
        )
    if style == 1:
        return ", ".join(f"{place} {text}" for place, text in zip(positions, descriptions, strict=True))
    return "; ".join(f"{text} {place}" for place, text in zip(positions, descriptions, strict=True))


def token_count(text: str) -> int:
    """Words and punctuation marks of a caption."""
    return len(_TOKENS.findall(text))


def caption_of(people: Sequence, scene: str, light: str, rng: np.random.Generator) -> str:
    """A caption for ``people`` (left to right, each with ``attributes()``) in a scene and light.

    Lower case, words of :data:`VOCABULARY` only, at most :data:`MAX_CAPTION_TOKENS` tokens; parts are left
    out at random, and more of them the more people there are.
    """
    count = len(people)
    place = _one_of(rng, SCENES[scene]) if rng.random() < 0.92 else ""
    lit = _one_of(rng, LIGHTS[light]) if rng.random() < 0.85 else ""
    setting = " ".join(part for part in (place, lit) if part)
    opener = _one_of(rng, OPENERS + (OPENERS_ONE if count == 1 else ()))
    if count == 0:
        return " ".join(f"{opener}an empty scene {setting}".split())
    detail = {1: 0.9, 2: 0.88, 3: 0.8, 4: 0.7}.get(count, 0.45) * (1.0 if rng.random() < 0.85 else 0.5)
    while True:
        descriptions = [describe_person(person.attributes(), rng, detail) for person in people]
        if count == 1:
            caption = f"{opener}{descriptions[0]} {setting}"
        else:
            whole = count_phrase(count)
            if rng.random() < 0.25:
                whole = f"a group of {whole}"
            elif rng.random() < 0.12:
                whole = f"{NUMBERS[count]} friends"
            body = _group(descriptions, rng)
            caption = (
                f"{opener}{whole} {setting}: {body}"
                if rng.random() < 0.6
                else f"{opener}{whole}: {body}, {setting}"
            )
        caption = " ".join(caption.replace(" :", ":").split()).rstrip(", ").replace(" ,", ",")
        if token_count(caption) <= MAX_CAPTION_TOKENS:
            return caption
        detail *= 0.85
