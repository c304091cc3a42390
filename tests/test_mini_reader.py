"""The reader: what a square shows, how it is kept, how it is scored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from withanyone.mini import pictures, reader, world


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, reader.Drawn]:
    folder = tmp_path_factory.mktemp("pictures")
    for shard in (0, 1):
        pictures.render_shard(folder, shard, "validation", size=3)
    return folder, reader.labelled_squares(folder, "validation", 100)


def test_labels_are_those_of_the_drawing(drawn: tuple[Path, reader.Drawn]) -> None:
    folder, squares = drawn
    truth = []
    for path in pictures.shard_paths(folder, "validation"):
        arrays, _ = pictures.read_shard(path, "attributes", "identities")
        truth += arrays["attributes"][arrays["identities"] >= 0].tolist()
    images, labels = squares["person"]
    assert images.shape[1:] == (80, 80, 3)
    assert np.stack([labels[name] for name in world.PERSON_ATTRIBUTES], axis=1).tolist() == truth
    assert len(squares["picture"][0]) == 6


def test_a_persons_square_is_centred_and_reaches_past_the_border() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[20:44, 20:44] = 255
    square = reader.person_crop(image, (20, 20, 44, 44), size=46)
    columns = np.flatnonzero(square[..., 0].max(axis=0) > 127)
    assert abs((columns[0] + columns[-1]) / 2 - 22.5) <= 1  # centred
    assert len(columns) == pytest.approx(46 / reader.PERSON_REACH, abs=1.5)
    red = np.full((64, 64, 3), (200, 0, 0), np.uint8)
    assert (reader.person_crop(red, (0, 0, 30, 60)) == (200, 0, 0)).all()  # the border goes on


def test_saved_and_loaded_reads_the_same(tmp_path: Path, drawn: tuple[Path, reader.Drawn]) -> None:
    torch.manual_seed(0)
    made = reader.AttributeReader("person", world.PERSON_ATTRIBUTES).half().float().eval()
    made.save(tmp_path / "person.safetensors")
    loaded = reader.AttributeReader.load(tmp_path / "person.safetensors")
    squares = list(drawn[1]["person"][0])
    assert loaded.read(squares) == made.read(squares)
    assert set(loaded.read(squares)[0]) == set(world.PERSON_ATTRIBUTES)


def test_training_learns_what_it_is_shown_and_resumes(
    tmp_path: Path, drawn: tuple[Path, reader.Drawn]
) -> None:
    squares, labels = drawn[1]["picture"]
    made = reader.train_reader("picture", squares, labels, tmp_path, steps=60, batch=16)
    read = reader.figures({"picture": made}, drawn[1])["picture"]
    assert read["scene"] > 0.5
    again = reader.train_reader(
        "picture", squares, labels, tmp_path, steps=60, batch=16
    )  # nothing left to do
    for name, value in made.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)


def test_balanced_accuracy_by_hand() -> None:
    assert reader.balanced_accuracy(list("aaab"), list("aaba")) == pytest.approx((2 / 3 + 0) / 2)


def test_missing_pictures_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`pictures`.*mini pictures"):
        reader.labelled_squares(tmp_path, "train", 5)
