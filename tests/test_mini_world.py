"""The drawn world: who somebody is stays apart from how they look, and the truth about a picture is exact."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from withanyone.mini import draw, words, world
from withanyone.mini.world import Appearance, make_identity, render

PEOPLE = world.RANGES["validation"]
PLAIN = {"scene": "studio", "light": "daylight"}


def picture_of(count: int, seed: int, width: int, height: int) -> world.Picture:
    return render([PEOPLE[20 * seed + number] for number in range(count)], seed, width=width, height=height)


def test_ranges_of_the_splits_share_no_identity() -> None:
    ranges = sorted(world.RANGES.values(), key=lambda seeds: seeds.start)
    assert set(world.RANGES) == {"train", "judge", "validation", "test"}
    assert all(before.stop <= after.start for before, after in zip(ranges, ranges[1:], strict=False))
    for name, seeds in world.RANGES.items():
        assert world.split_of(seeds.start) == world.split_of(seeds.stop - 1) == name
    with pytest.raises(ValueError, match="`identity`"):
        world.split_of(-1)


def test_the_same_arguments_give_the_same_bytes() -> None:
    first, second = (picture_of(3, 5, 256, 192) for _ in range(2))
    make_identity.cache_clear()
    third = picture_of(3, 5, 256, 192)
    for other in (second, third):
        assert first.image.tobytes() == other.image.tobytes()
        assert (first.caption, first.scene, first.light) == (other.caption, other.scene, other.light)
        for mine, theirs in zip(first.people, other.people, strict=True):
            assert mine.appearance == theirs.appearance
            assert np.array_equal(mine.bbox, theirs.bbox) and np.array_equal(mine.kps, theirs.kps)


def test_another_identity_changes_the_face_and_nothing_that_may_change() -> None:
    first, second = (render([PEOPLE[number]], 11) for number in (0, 1))
    assert first.people[0].attributes() == second.people[0].attributes()
    assert (first.caption, first.scene, first.light) == (second.caption, second.scene, second.light)
    x0, y0, x1, y1 = first.people[0].bbox.astype(int)
    faces = [picture.image[y0:y1, x0:x1].astype(float) for picture in (first, second)]
    assert np.abs(faces[0] - faces[1]).mean() > 4


def test_another_seed_changes_the_picture_and_not_the_identity() -> None:
    before = make_identity(PEOPLE[3])
    pictures = [render([PEOPLE[3]], seed) for seed in (1, 2)]
    assert make_identity(PEOPLE[3]) == before
    assert pictures[0].people[0].appearance != pictures[1].people[0].appearance
    assert pictures[0].people[0].identity == pictures[1].people[0].identity == PEOPLE[3]


def test_identity_traits_are_independent_and_fill_their_ranges() -> None:
    identities = [make_identity(seed) for seed in world.RANGES["train"][:400]]
    names = list(world.TRAITS)
    table = np.array([[identity[name] for name in names] for identity in identities])
    centers, spreads = np.array([world.TRAITS[name] for name in names]).T
    assert (np.abs(table - centers) <= spreads + 1e-12).all()
    assert (np.ptp(table, axis=0) > 1.9 * spreads).all()
    correlation = np.corrcoef(table.T) - np.eye(len(names))
    assert np.abs(correlation).max() < 0.25  # 400 samples: five standard deviations


@pytest.mark.parametrize("count", range(1, 9))
def test_faces_lie_inside_apart_and_hold_their_landmarks(count: int) -> None:
    sizes = ((128, 128), (192, 128), (128, 192)) if count <= 2 else ((256, 256), (256, 192))
    for width, height in sizes:
        people = picture_of(count, count, width, height).people
        boxes, kps = np.stack([p.bbox for p in people]), np.stack([p.kps for p in people])
        assert boxes.dtype == kps.dtype == np.float32 and kps.shape == (count, 5, 2)
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= (width, height)).all()
        assert (kps >= boxes[:, None, :2] - 0.01).all() and (kps <= boxes[:, None, 2:] + 0.01).all()
        middles = boxes[:, 0] + boxes[:, 2]
        assert (np.diff(middles) >= 0).all()
        assert max_iou(boxes) < 0.1
        assert (kps[:, 0, 0] < kps[:, 1, 0]).all() and (kps[:, 3, 0] < kps[:, 4, 0]).all()
        assert (kps[:, :2, 1].max(1) < kps[:, 3:, 1].min(1)).all()


def max_iou(boxes: np.ndarray) -> float:
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    iou = shared / (area[:, None] + area[None] - shared)
    return float((iou - np.eye(len(boxes))).max())


def test_faces_are_large_enough_to_be_known() -> None:
    def heights(count: int, size: int) -> np.ndarray:
        boxes = [p.bbox for seed in range(6) for p in picture_of(count, seed, size, size).people]
        return np.array([box[3] - box[1] for box in boxes])

    assert heights(1, 128).min() >= 58 and heights(1, 128).max() <= 76
    assert heights(4, 256).min() >= 45


def test_landmarks_lie_on_the_features() -> None:
    """Dark pupils at the eyes: what is drawn there is darker than the white beside it."""
    look = Appearance(hair_style="bald", expression="surprised")
    for number in range(5):
        picture = render(
            [PEOPLE[number]], 0, width=256, height=256, appearances=[look], close_up=True, **PLAIN
        )
        eye_width = (picture.people[0].bbox[2] - picture.people[0].bbox[0]) * 0.2
        for eye in picture.people[0].kps[:2]:
            x, y = np.round(eye).astype(int)
            half = int(eye_width / 2)
            pupil = picture.image[y - 3 : y + 4, x - 3 : x + 4].mean(-1).min()
            white = picture.image[y - 3 : y + 4, x - half : x + half].mean(-1).max()
            assert pupil < 70 < 150 < white


@pytest.mark.parametrize("angle", ["yaw", "pitch", "roll"])
def test_a_turned_head_moves_its_landmarks_as_geometry_says(angle: str) -> None:
    identity = make_identity(PEOPLE[8])
    nose = {}
    for turn in (-0.4, 0.0, 0.4):
        head = draw.Head(identity, Appearance(**{angle: turn}), np.zeros(2), 1.0)
        kps = head.landmarks()
        nose[turn] = kps[2] - kps[:2].mean(0)
    axis = 1 if angle == "pitch" else 0
    sign = -1 if angle == "roll" else 1
    assert sign * nose[-0.4][axis] < sign * nose[0.0][axis] < sign * nose[0.4][axis]


def test_given_boxes_are_met() -> None:
    boxes = [[20, 30, 90, 110], [150, 60, 215, 140]]
    picture = render(PEOPLE[:2], 4, width=256, height=192, bboxes=boxes)
    for person, box in zip(picture.people, boxes, strict=True):
        assert np.allclose(person.bbox[[1, 3]], [box[1], box[3]], atol=0.01)
        assert abs((person.bbox[0] + person.bbox[2]) / 2 - (box[0] + box[2]) / 2) < 0.01


def test_a_close_up_fills_the_picture() -> None:
    for seed in range(5):
        picture = render([PEOPLE[seed]], seed, width=160, height=160, close_up=True)
        box = picture.people[0].bbox
        assert 0.5 < (box[3] - box[1]) / 160 < 0.75


def test_an_empty_scene_has_no_people() -> None:
    picture = render([], 3, width=192, height=128)
    assert picture.image.shape == (128, 192, 3) and picture.people == []
    assert "empty scene" in picture.caption


@pytest.mark.parametrize("name", [name for name in world.PERSON_ATTRIBUTES if name != "pose"])
def test_every_attribute_is_visible_and_leaves_the_truth_in_place(name: str) -> None:
    base = Appearance(hair_style="long", hair_color="brown")
    seen = []
    for value in world.PERSON_ATTRIBUTES[name]:
        look = dataclasses.replace(base, **{name: value})
        picture = render([PEOPLE[2]], 0, appearances=[look], **PLAIN)
        assert picture.people[0].attributes()[name] == value
        assert set(picture.people[0].attributes()) == set(world.PERSON_ATTRIBUTES)
        seen.append(picture.image.astype(int))
    for index, image in enumerate(seen):
        for other in seen[:index]:
            assert (np.abs(image - other).max(-1) > 24).sum() > 30


def test_scenes_and_lights_are_visible() -> None:
    def of(**setting: str) -> np.ndarray:
        return render([PEOPLE[2]], 0, appearances=[Appearance()], **setting).image.astype(int)

    scenes = [of(scene=name, light="daylight") for name in world.PICTURE_ATTRIBUTES["scene"]]
    lights = [of(scene="studio", light=name) for name in world.PICTURE_ATTRIBUTES["light"]]
    for pictures in (scenes, lights):
        for index, image in enumerate(pictures):
            assert all(np.abs(image - other).mean() > 3 for other in pictures[:index])


def test_pose_is_read_from_the_yaw() -> None:
    rng = np.random.default_rng(0)
    looks = [world.random_appearance(rng) for _ in range(300)]
    assert {look.pose for look in looks} == set(world.PERSON_ATTRIBUTES["pose"])
    assert min(abs(abs(look.yaw) - world.POSE_YAW) for look in looks) > 0.03  # nobody on the border
    assert max(abs(look.yaw) for look in looks) > 0.65
    for name, values in world.PERSON_ATTRIBUTES.items():
        assert {getattr(look, name) for look in looks} == set(values)


def test_captions_stay_within_the_vocabulary_and_the_length() -> None:
    assert len(world.VOCABULARY) <= 250 and list(world.VOCABULARY) == sorted(set(world.VOCABULARY))
    for count in range(9):
        for seed in range(25):
            rng = np.random.default_rng([count, seed])
            people = [
                world.Person(PEOPLE[0], world.random_appearance(rng), np.zeros(4), np.zeros((5, 2)))
                for _ in range(count)
            ]
            scene, light = (str(rng.choice(world.PICTURE_ATTRIBUTES[key])) for key in ("scene", "light"))
            caption = world.caption_of(people, scene, light, rng)
            assert world.unknown_words(caption) == []
            assert words.token_count(caption) <= words.MAX_CAPTION_TOKENS
            assert caption == " ".join(caption.lower().split())
            if count > 1:
                counted = {f"{words.NUMBERS[count]} people", f"{words.NUMBERS[count]} friends"}
                assert any(phrase in caption for phrase in counted)
                assert caption.count("person") == count


def test_a_caption_says_nothing_untrue() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        look = world.random_appearance(rng)
        text = words.describe_person(look.attributes(), rng, detail=0.8)
        for table, name in ((words.HATS, "hat"), (words.BEARDS, "beard"), (words.GLASSES, "glasses")):
            said = {value for value, options in table.items() if any(option in text for option in options)}
            if look.beard == "beard":
                said.discard("stubble")
            assert said <= {getattr(look, name)}
        colors = {color for color in words.HAIR_COLORS if f"{color} {look.clothing}" in text}
        assert colors <= {look.clothing_color}


def test_unknown_words_ignores_case_punctuation_and_plurals() -> None:
    prompt = "A Photo of two friends' smiling faces at the CAFÉ, wearing T-shirts and Hats!"
    assert world.unknown_words(prompt) == ["faces"]
    assert world.unknown_words("dragon, Dragon and a dragon") == ["dragon", "Dragon"]
    assert world.unknown_words("") == []
    assert world.known_form("Beanies") == "beanie" and world.known_form("robot") is None


def test_fixed_prompts_count_people() -> None:
    prompts = [world.fixed_prompt(count) for count in range(1, 9)]
    assert prompts[:3] == ["one person", "two people", "three people"] and prompts[7] == "eight people"
    assert not any(world.unknown_words(prompt) for prompt in prompts)
    with pytest.raises(ValueError, match="`count`"):
        world.fixed_prompt(9)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"identities": range(9)}, "`identities`"),
        ({"identities": [-1]}, "`identity`"),
        ({"width": 100}, "`width`"),
        ({"height": 0}, "`height`"),
        ({"scene": "moon"}, "`scene`"),
        ({"light": "neon"}, "`light`"),
        ({"appearances": []}, "`appearances`"),
        ({"identities": [0, 1], "close_up": True}, "`close_up`"),
        ({"bboxes": [[0, 0, 50]]}, "`bboxes`"),
        ({"bboxes": [[0, 0, 50, 500]]}, "`bboxes`"),
        ({"bboxes": [[50, 0, 20, 60]]}, "`bboxes`"),
        ({"bboxes": [[0, 0, float("nan"), 60]]}, "`bboxes`"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        render(**{"identities": [0], "seed": 0, **arguments})


def test_an_unknown_look_is_named() -> None:
    with pytest.raises(ValueError, match="`hat` must be one of none, cap"):
        Appearance(hat="crown")


def test_a_contact_sheet_has_its_size() -> None:
    assert world.contact_sheet(rows=2, columns=2, size=64).shape == (128, 128, 3)
