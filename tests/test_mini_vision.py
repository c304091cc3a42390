"""The image encoder: the pipeline's crops, truthful mirror images, probes that find what is there."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTextModel, SiglipImageProcessor, SiglipVisionModel

from withanyone.faces import crop_face
from withanyone.mini import PRETRAINED, vision, world
from withanyone.mini.loop import TrainingLoop

SHARD_SIZE = 10
POSE = list(world.PERSON_ATTRIBUTES).index("pose")


@pytest.fixture(scope="module")
def crops(picture_shards):
    return vision.load_crops(picture_shards, "train", 25)


def test_crops_are_cut_as_the_pipeline_cuts_them():
    picture = world.render([5], 5, width=128, height=128)
    bbox = picture.people[0].bbox
    theirs = crop_face(Image.fromarray(picture.image), bbox, vision.IMAGE_SIZE)
    assert np.array_equal(vision.face_crop(picture.image, bbox), np.asarray(theirs))


def test_crops_come_with_their_labels(crops):
    assert len(crops) == 25
    assert crops.pixels.shape == (25, 112, 112, 3)
    assert crops.labels.shape == (25, len(vision.ATTRIBUTES))
    yaw = crops.angles[:, 0]
    for label, side in zip(crops.labels[:, POSE], yaw, strict=True):
        assert world.PERSON_ATTRIBUTES["pose"][label] == (
            "ahead" if abs(side) < world.POSE_YAW else "right" if side > 0 else "left"
        )


def test_mirror_images_look_the_other_way(crops):
    rows = np.arange(len(crops)).repeat(4)
    drawn = vision.draw(crops, rows, np.random.default_rng(0))
    flipped = drawn.angles[:, 0] != crops.angles[rows, 0]
    assert 0.3 < flipped.mean() < 0.7
    assert np.array_equal(drawn.pixels[flipped], crops.pixels[rows][flipped][:, :, ::-1])
    assert np.array_equal(drawn.pixels[~flipped], crops.pixels[rows][~flipped])
    for label, side in zip(drawn.labels[:, POSE], drawn.angles[:, 0], strict=True):
        assert (world.PERSON_ATTRIBUTES["pose"][label] == "left") == (side <= -world.POSE_YAW)


def test_missing_pictures_are_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="`pictures`.*no train shards: run"):
        vision.load_crops(tmp_path, "train", 10)


def test_patch_colors_belong_to_their_tokens():
    pixels = torch.zeros(1, 3, 112, 112)
    pixels[:, 0, 16:32, 32:48] = 1.0  # second row, third column
    colors = vision.patch_colors(pixels)
    assert colors.shape == (1, 49, 48)
    assert colors[0].abs().sum(dim=1).nonzero()[:, 0].tolist() == [7 + 2]


def test_ridge_finds_a_linear_map():
    torch.manual_seed(0)
    inputs, weight = torch.randn(60, 8), torch.randn(8, 3)
    targets = inputs @ weight + 2.0
    found = vision.apply(vision.ridge(inputs, targets, 1e-6), inputs)
    assert torch.allclose(found, targets, atol=1e-3)


def test_balanced_accuracy_counts_values_alike():
    truth = np.array([0] * 9 + [1])
    assert vision.balanced_accuracy(np.zeros(10), truth) == 0.5
    assert vision.balanced_accuracy(truth, truth) == 1.0


def test_contrastive_loss_is_least_where_pairs_match():
    texts = torch.eye(4)
    matched = vision.contrastive_loss(texts, texts)
    assert matched < vision.contrastive_loss(texts.roll(1, 0), texts)
    assert float(matched) < 0.01


def test_training_resumes_exactly(crops, tmp_path, monkeypatch):
    text_encoder = CLIPTextModel.from_pretrained(PRETRAINED / "text_encoder")
    monkeypatch.setattr(vision, "TrainingLoop", partial(TrainingLoop, save_seconds=0.0))

    def run(folder):
        encoder = vision.train(folder, crops, text_encoder, 3, batch_size=4)
        return torch.cat([parameter.detach().flatten() for parameter in encoder.parameters()])

    through = run(tmp_path / "a")
    with monkeypatch.context() as patch:
        calls = []
        loss = vision.contrastive_loss

        def stopping(*args):
            calls.append(1)
            if len(calls) > 2:
                raise KeyboardInterrupt
            return loss(*args)

        patch.setattr(vision, "contrastive_loss", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "b")
    assert torch.equal(run(tmp_path / "b"), through)


def test_shipped_processor_makes_what_training_saw(crops):
    processor = SiglipImageProcessor.from_pretrained(PRETRAINED / "feature_extractor")
    processed = processor(images=[Image.fromarray(crops.pixels[0])], return_tensors="pt").pixel_values
    assert torch.allclose(processed, vision.to_tensor(crops.pixels[:1]), atol=1e-5)


@torch.no_grad()
def test_shipped_encoder_tells_changes_from_people():
    """A person with other hair, hat and glasses is further away than another person with the same look."""
    encoder = SiglipVisionModel.from_pretrained(PRETRAINED / "image_encoder").eval()
    assert encoder.dtype == torch.float32
    rng = np.random.default_rng(0)
    nearer = []
    for seed in range(12):
        look = [world.random_appearance(rng) for _ in range(2)]
        people = [(2_000_000 + seed, look[0]), (2_000_500 + seed, look[0]), (2_000_000 + seed, look[1])]
        crops = []
        for identity, appearance in people:
            picture = world.render(
                [identity], seed, scene="studio", light="daylight", appearances=[appearance]
            )
            crops.append(vision.face_crop(picture.image, picture.people[0].bbox))
        tokens = encoder(vision.to_tensor(np.stack(crops))).last_hidden_state.mean(dim=1)
        same_look, same_person = (float((tokens[0] - tokens[k]).norm()) for k in (1, 2))
        nearer.append(same_look < same_person)
    assert np.mean(nearer) > 0.8
