"""The miniature's judges for `withanyone.bench`, and what the drawn world knows about a case.

`python -m withanyone.bench score --judges mini ...` calls `judges()`: the pack's detector, the *judge* (a
recogniser of another build, trained on other identities), the *coach* (the pipeline's own recogniser, shown
beside), and the reader of attributes. Truth comes from the world's parameters, which every drawn case carries
in `meta.json`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from withanyone.bench import judges as bench_judges
from withanyone.bench.cases import Case
from withanyone.faces import FaceAnalyzer

from . import PRETRAINED, words
from .reader import JUDGES, SIZES, load_readers, person_crop, picture_view

JUDGE = JUDGES / "recognition.onnx"
#: Attributes whose words in a prompt are known, with the words.
PERSON_WORDS = {
    "expression": words.EXPRESSIONS,
    "hair_style": words.HAIR_STYLES,
    "hat": words.HATS,
    "glasses": words.GLASSES,
    "beard": words.BEARDS,
    "pose": words.POSES,
}
PICTURE_WORDS = {"scene": words.SCENES, "light": words.LIGHTS}
#: Where one person's description begins in a caption: "a smiling bald person ...".
_PERSON = re.compile(r"\ban? (?:[a-z]+ ){0,2}person\b")


def judges() -> list[object]:
    """The parts of the set `mini`: finder, judge, coach, reader; what is not there is named as absent."""
    analyzer = FaceAnalyzer.from_pretrained(PRETRAINED / "face_analyzer")
    parts: list[object] = [
        bench_judges.finder_of(analyzer),
        bench_judges.PackJudge(bench_judges.COACH, analyzer),
    ]
    if JUDGE.is_file():
        parts.append(bench_judges.OnnxJudge("judge", "onnx", JUDGE, analyzer))
    else:
        why = f"{JUDGE.name} is not trained yet (`python -m withanyone.mini judge`): the coach scores alone"
        parts.append(bench_judges.Absent("judge", why))
    missing = [kind for kind in SIZES if not (JUDGES / f"{kind}.safetensors").is_file()]
    if missing:
        why = f"no weights of {', '.join(missing)} (`python -m withanyone.mini reader`)"
        parts.append(bench_judges.Absent("reader", why))
    else:
        parts.append(Reader())
    return parts


class Reader:
    """The miniature's attribute reader as a judge of prompt following and copied attributes."""

    name = "reader"
    world = "the drawn world"

    def __init__(self) -> None:
        self._readers = load_readers()
        hashes = {kind: bench_judges.file_hash(JUDGES / f"{kind}.safetensors") for kind in SIZES}
        self.version = {"kind": "attributes", "world": self.world, **hashes}

    def read(self, image: np.ndarray, bboxes: Sequence[Sequence[float]]) -> list[dict[str, str]]:
        """Every attribute of the person of each box, scene and light of the whole picture included."""
        whole = self._readers["picture"].read([picture_view(image)])[0]
        squares = [person_crop(image, bbox) for bbox in bboxes]
        return [whole | person for person in self._readers["person"].read(squares)]

    def truth(self, case: Case) -> list[bench_judges.Truth] | None:
        """From the case's own `world`; a photo's scene and light, which it leaves out, are read from it."""
        world = case.meta.get("world")
        if world is None:
            return None
        setting = {name: world[name] for name in PICTURE_WORDS}
        said = asked(case.prompt, world["target"], setting)
        out = []
        for person, photo in enumerate(case.references):
            pixels = photo.pixels
            whole = self._readers["picture"].read([picture_view(pixels)])[0]
            out.append(
                bench_judges.Truth(
                    asked=said[person],
                    target=world["target"][person] | setting,
                    reference=whole | world["references"][person],
                )
            )
        return out


def asked(prompt: str, people: Sequence[dict[str, str]], setting: dict[str, str]) -> list[dict[str, str]]:
    """What a caption of the drawn world says of each person (left to right), scene and light included.

    A caption leaves things out, and what it leaves out was not asked for. Descriptions of people stand in
    order, each with the word "person" once; where they cannot be told apart, only scene and light count.
    """
    text = prompt.lower()
    whole = {
        name: setting[name] for name, table in PICTURE_WORDS.items() if _says(text, table[setting[name]])
    }
    starts = [match.start() for match in _PERSON.finditer(text)]
    if len(starts) != len(people):
        return [dict(whole) for _ in people]
    parts = [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]
    return [
        whole
        | {
            name: person[name]
            for name, table in PERSON_WORDS.items()
            if person[name] in table and _says(part, table[person[name]])
        }
        for person, part in zip(people, parts, strict=True)
    ]


def _says(text: str, phrases: Sequence[str]) -> bool:
    """Whether one of the phrases stands in the text; `{color}` means any word."""
    patterns = (re.escape(phrase).replace(re.escape("{color}"), "[a-z]+") for phrase in phrases)
    return any(re.search(rf"\b{pattern}\b", text) for pattern in patterns)
