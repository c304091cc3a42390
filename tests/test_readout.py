"""The read-out: copies, swaps and missing people are told apart, by constructed faces."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from PIL import Image

from withanyone.faces import Face
from withanyone.mini import PRETRAINED
from withanyone.readout import ANTELOPEV2, Calibration, copying, describe, read_picture

CALIBRATION = Calibration(median=0.5, low=0.3, high=0.7, stranger=0.2)
BOXES = [(10.0, 10.0, 50.0, 60.0), (70.0, 10.0, 110.0, 60.0)]


def unit(*parts: float) -> np.ndarray:
    vector = np.zeros(512)
    vector[: len(parts)] = parts
    return vector / np.linalg.norm(vector)


ADA, BELA = unit(1), unit(0, 1)


def like(person: np.ndarray, cosine: float) -> np.ndarray:
    """An embedding at this cosine to a person, towards a direction nobody has."""
    return cosine * person + math.sqrt(1 - cosine**2) * unit(0, 0, 1)


def face(embedding: np.ndarray, bbox: tuple[float, ...]) -> Face:
    crop = Image.new("RGB", (8, 8))
    return Face(np.array(bbox, np.float32), np.zeros((5, 2), np.float32), 0.9, 7.0 * embedding, crop)


def read(*found: Face):
    return read_picture(found, np.stack([ADA, BELA]), BOXES, CALIBRATION)


def test_copying_is_0_up_to_two_photos_of_one_person_and_1_for_the_photo_itself() -> None:
    assert copying(1.0, 0.5) == pytest.approx(1)
    assert copying(0.5, 0.5) == pytest.approx(0) and copying(-0.2, 0.5) == 0
    values = [copying(c, 0.5) for c in np.linspace(0.5, 1, 20)]
    assert values == sorted(values)
    assert copying(math.cos(math.radians(30)), 0.5) == pytest.approx(0.5)  # half of 60 degrees


def test_each_person_is_read_in_their_box() -> None:
    reading = read(face(like(BELA, 0.9), BOXES[1]), face(like(ADA, 0.4), BOXES[0]))
    ada, bela = reading.people
    assert ada.likeness == pytest.approx(0.4) and ada.copying == 0 and not ada.swapped
    assert bela.likeness == pytest.approx(0.9) and bela.copying > 0.3 and reading.extra == 0
    said = describe(reading, ["Ada", "Bela"], CALIBRATION)
    assert said[0] == {"tone": "good", "text": "Ada: looks like the same person."}
    assert "copied from the photo" in said[1]["text"]


def test_a_swap_is_told_and_not_hidden() -> None:
    reading = read(face(like(BELA, 0.6), BOXES[0]), face(like(ADA, 0.6), BOXES[1]))
    assert [person.swapped for person in reading.people] == [True, True]
    assert "more like Bela" in describe(reading, ["Ada", "Bela"], CALIBRATION)[0]["text"]


def test_strangers_are_no_swap() -> None:
    reading = read(face(like(BELA, 0.1), BOXES[0]), face(like(ADA, 0.05), BOXES[1]))
    assert not any(person.swapped for person in reading.people)
    assert {s["tone"] for s in describe(reading, ["A", "B"], CALIBRATION)} == {"poor"}


def test_missing_people_and_extra_faces_are_counted() -> None:
    reading = read(face(like(ADA, 0.5), BOXES[0]), face(BELA, (60.0, 100.0, 90.0, 120.0)))
    assert [person.found for person in reading.people] == [True, False] and reading.extra == 1
    assert reading.people[1].likeness is None
    assert "Bela is missing" in describe(reading, ["Ada", "Bela"], CALIBRATION)[1]["text"]
    assert [person.found for person in read().people] == [False, False]
    assert json.loads(json.dumps(reading.as_dict()))["extra"] == 1


def test_a_single_swapped_person_beside_a_missing_one_is_found() -> None:
    reading = read(face(like(BELA, 0.6), BOXES[0]))
    assert reading.people[0].swapped and not reading.people[1].found


def test_the_miniatures_calibration_comes_from_its_measured_figures(tmp_path) -> None:
    figures = json.loads((PRETRAINED / "figures" / "faces.json").read_text())
    calibration = Calibration.from_figures(PRETRAINED / "figures" / "faces.json")
    assert calibration.median == figures["recognizer_on_detected_faces"]["same_person_median"]
    assert calibration.low < calibration.median < calibration.high and ANTELOPEV2.median == 0.46
    (tmp_path / "figures.json").write_text('{"command": ""}')
    with pytest.raises(ValueError, match="no figure"):
        Calibration.from_figures(tmp_path / "figures.json")


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="low"):
        Calibration(median=0.2, low=0.5, high=0.7, stranger=0.1)
    with pytest.raises(ValueError, match="references"):
        read_picture([], np.stack([ADA]), BOXES, CALIBRATION)
    with pytest.raises(ValueError, match="names"):
        describe(read(), ["Ada"], CALIBRATION)
    with pytest.raises(ValueError, match="same_person"):
        copying(0.5, 1.0)
