"""Faces are found and recognised; packs are saved and loaded, and what they lack is named."""

from __future__ import annotations

import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from tests import tiny_faces
from tests.pictures import assert_same, noise
from withanyone import faces as faces_module
from withanyone.faces import Face, FaceAnalyzer, crop_face

BOXES = [(20, 30, 100, 130), (130, 40, 150, 64), (150, 100, 240, 220)]  # one for each stride of the detector


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_faces.write_pack(tmp_path_factory.mktemp("faces") / "pack")


@pytest.fixture(scope="module")
def analyzer(pack: Path) -> FaceAnalyzer:
    return FaceAnalyzer.from_pretrained(pack)


@pytest.fixture(scope="module")
def group() -> Image.Image:
    picture = tiny_faces.blank(256, 256)
    for identity, box in enumerate(BOXES):
        picture = tiny_faces.paint_face(picture, box, identity)
    return picture


def assert_found(found: list[Face], boxes: list, atol: float) -> None:
    """The same faces, largest first."""
    largest_first = sorted(boxes, key=lambda b: -(b[2] - b[0]) * (b[3] - b[1]))
    assert len(found) == len(boxes)
    for face, box in zip(found, largest_first, strict=True):
        np.testing.assert_allclose(face.bbox, box, atol=atol)
        np.testing.assert_allclose(face.kps, tiny_faces.kps_of(box), atol=atol)


def test_faces_are_found_where_they_are_largest_first(analyzer, group):
    found = analyzer.detect(group)
    assert_found(found, BOXES, atol=0.05)
    for face in found:
        assert face.bbox.shape == (4,) and face.kps.shape == (5, 2) and face.embedding.shape == (512,)
        assert {face.bbox.dtype, face.kps.dtype, face.embedding.dtype} == {np.dtype(np.float32)}
        assert 0.4 <= face.det_score <= 1
        assert face.face_crop.size == (64, 64) and face.face_crop.mode == "RGB"
        assert np.linalg.norm(face.normed_embedding) == pytest.approx(1, abs=1e-5)


def test_max_faces_keeps_the_largest(analyzer, group):
    first, *_ = analyzer.detect(group)
    (only,) = analyzer.detect(group, max_faces=1)
    assert np.array_equal(only.bbox, first.bbox) and np.array_equal(only.embedding, first.embedding)
    with pytest.raises(ValueError, match="`max_faces` is 0"):
        analyzer.detect(group, max_faces=0)


def test_a_face_holds_no_more_than_it_says(analyzer, group):
    """insightface's own faces answer None to a misspelt attribute, and can be written to."""
    face = analyzer.detect(group)[0]
    with pytest.raises(AttributeError):
        _ = face.embeding
    with pytest.raises(AttributeError):
        face.det_score = 1.0


def test_images_are_rgb_at_the_border(analyzer, pack, group):
    """The recogniser sees R, G, B: by hand, from the aligned face, through onnxruntime alone."""
    session = onnxruntime.InferenceSession(pack / "recognition.onnx", providers=["CPUExecutionProvider"])
    for face in analyzer.detect(np.asarray(group)):
        aligned = analyzer.align(group, face.kps)  # (112, 112, 3), RGB
        blob = aligned.transpose(2, 0, 1)[None].astype(np.float32) / 127.5 - 1
        by_hand = session.run(None, {"input.1": blob})[0][0]
        np.testing.assert_allclose(face.embedding, by_hand, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(analyzer.embed([aligned])[0], by_hand, rtol=1e-4, atol=1e-4)
        # The test could tell: with red and blue exchanged it is another embedding.
        assert np.abs(analyzer.embed([aligned[..., ::-1]])[0] - by_hand).max() > 0.1


def test_embeddings_of_one_batch_equal_those_one_by_one(analyzer):
    aligned = [noise(112, 112, seed=i) for i in range(5)]
    together = analyzer.embed(aligned)
    assert together.shape == (5, 512)
    np.testing.assert_allclose(
        together, np.concatenate([analyzer.embed([face]) for face in aligned]), rtol=1e-4, atol=1e-4
    )
    assert analyzer.embed([]).shape == (0, 512)
    with pytest.raises(ValueError, match=r"`aligned_faces\[1\]`.*\(100, 112, 3\)"):
        analyzer.embed([aligned[0], noise(100, 112)])


def test_the_painted_identities_can_be_told_apart(analyzer):
    """The pack that other tests lean on: another picture of an identity is nearer than anyone else's."""
    boxes = ((30, 20, 90, 100), (50, 40, 112, 120))
    first, second = (
        np.stack(
            [
                analyzer.detect(tiny_faces.paint_face(tiny_faces.blank(), box, i))[0].normed_embedding
                for i in range(8)
            ]
        )
        for box in boxes
    )
    assert ((first @ second.T).argmax(axis=1) == np.arange(8)).all()


def test_no_face_gives_an_empty_list_and_a_clear_error(analyzer, tmp_path):
    assert analyzer.detect(tiny_faces.blank(200, 120)) == []
    assert analyzer.detect(noise(128, 128)) == []
    path = tmp_path / "garden.png"
    tiny_faces.blank(200, 120).save(path)
    with pytest.raises(ValueError, match=r"`faces\[1\]` \(.*garden.png\): no face found.*give a photo"):
        analyzer.largest_face(path, "faces[1]")


def test_of_several_faces_the_largest_is_taken_and_said_so(analyzer, group, caplog):
    with caplog.at_level(logging.WARNING):
        face = analyzer.largest_face(group, "faces[0]")
    np.testing.assert_allclose(face.bbox, BOXES[2], atol=0.05)
    assert "`faces[0]`" in caplog.text and "3 faces" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        analyzer.largest_face(tiny_faces.paint_face(tiny_faces.blank(), (30, 20, 90, 100)))
    assert not caplog.records


@pytest.mark.parametrize("enlarge", [False, True])
@pytest.mark.parametrize("width, height", [(128, 128), (97, 131), (192, 160), (300, 500), (1600, 900)])
def test_boxes_are_in_the_photos_pixels_at_any_size(pack, enlarge, width, height):
    analyzer = FaceAnalyzer.from_pretrained(pack, enlarge=enlarge)
    box = (0.25 * width, 0.2 * height, 0.75 * width, 0.8 * height)
    box = tuple(round(v) for v in box)
    found = analyzer.detect(tiny_faces.paint_face(tiny_faces.blank(width, height), box))
    scale = max(width, height) / 256
    if not enlarge and scale <= 1:
        assert_found(found, [box], atol=0.05)  # at its own scale: exact
    else:
        assert_found(found, [box], atol=1.5 * max(1, scale))  # one pixel and a half of what the detector sees


def test_further_detection_sizes_are_tried_only_when_nothing_was_found(pack):
    near = tiny_faces.paint_face(tiny_faces.blank(320, 320), (40, 30, 280, 300))
    far = tiny_faces.paint_face(tiny_faces.blank(320, 320), (100, 100, 122, 126))
    small = FaceAnalyzer.from_pretrained(pack, det_size=(64, 64), enlarge=True)
    both = FaceAnalyzer.from_pretrained(pack, det_size=((64, 64), (320, 320)), enlarge=True)
    assert len(small.detect(near)) == 1 and small.detect(far) == []
    assert np.array_equal(both.detect(near)[0].bbox, small.detect(near)[0].bbox)
    assert_found(both.detect(far), [(100, 100, 122, 126)], atol=0.05)


def released_square(bbox, width, height):
    """The released rule, written anew: the shorter side is widened on both sides, an odd pixel at the end."""
    low, high = np.trunc(bbox[:2]).astype(int), np.trunc(bbox[2:]).astype(int)
    missing = (high - low).max() - (high - low)
    low, high = low - missing // 2, high + (missing + 1) // 2
    return tuple(np.maximum(low, 0)) + tuple(np.minimum(high, (width, height)))


@pytest.mark.parametrize(
    "bbox, expected",
    [
        ((20, 10, 40, 30), (20, 10, 40, 30)),  # square already
        ((20, 10, 40, 50), (10, 10, 50, 50)),  # tall
        (
            (20.9, 10.2, 61.7, 30.9),
            (20, 0, 61, 41),
        ),  # wide: cut to whole pixels, an odd pixel goes to the end
        ((-6.5, 20, 30, 80), (0, 20, 42, 80)),  # over the left edge: clipped, so no longer square
        ((70, 40, 100, 90), (60, 40, 96, 80)),  # over the right and lower edges
    ],
)
def test_face_crop_is_the_released_square(bbox, expected):
    image = Image.fromarray(noise(80, 96))
    assert released_square(np.array(bbox, float), 96, 80) == expected
    by_hand = image.crop(expected).resize((32, 32), Image.Resampling.LANCZOS)
    assert_same(crop_face(image, bbox, 32), np.asarray(by_hand))


def test_face_crop_of_a_detection_is_cut_from_the_photo_as_given(analyzer, group):
    face = analyzer.detect(group)[0]
    box = released_square(face.bbox.astype(float), 256, 256)
    assert_same(face.face_crop, np.asarray(group.crop(box).resize((64, 64), Image.Resampling.LANCZOS)))


def test_one_analyzer_serves_several_threads(analyzer, group):
    pictures = [
        tiny_faces.paint_face(tiny_faces.blank(128 + 32 * (i % 3)), (30, 20, 90, 100), i) for i in range(12)
    ]
    alone = [analyzer.detect(picture) for picture in pictures]
    start = threading.Barrier(4)

    def work(offset: int) -> list[bool]:
        start.wait()
        order = pictures[offset:] + pictures[:offset]
        expected = alone[offset:] + alone[:offset]
        return [
            np.array_equal(analyzer.detect(picture)[0].embedding, faces[0].embedding)
            for picture, faces in zip(order, expected, strict=True)
        ]

    with ThreadPoolExecutor(4) as pool:
        assert all(all(result) for result in pool.map(work, (0, 3, 6, 9)))


# ----------------------------------------------------------------------------------------------------------
# Packs: saving, loading, what may be missing
# ----------------------------------------------------------------------------------------------------------


def same_faces(a: FaceAnalyzer, b: FaceAnalyzer, image: Image.Image) -> bool:
    found = list(zip(a.detect(image), b.detect(image), strict=True))
    return bool(found) and all(
        np.array_equal(x.bbox, y.bbox) and np.array_equal(x.embedding, y.embedding) for x, y in found
    )


def test_saved_and_loaded_it_finds_the_same_faces(pack, group, tmp_path):
    settings = {"det_size": (224, 224), "det_thresh": 0.3, "crop_size": 48, "enlarge": True, "pack": "mine"}
    first = FaceAnalyzer.from_pretrained(pack, **settings)
    first.save_pretrained(tmp_path / "saved")
    second = FaceAnalyzer.from_pretrained(tmp_path / "saved")
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == [
        "detection.onnx", "face_analyzer.json", "recognition.onnx",
    ]  # fmt: skip
    assert (second.det_size, second.det_thresh, second.crop_size) == (((224, 224),), 0.3, 48)
    assert (second.enlarge, second.pack) == (True, "mine")
    assert same_faces(first, second, group)
    second.save_pretrained(tmp_path / "saved")  # onto itself
    assert same_faces(first, FaceAnalyzer.from_pretrained(tmp_path / "saved"), group)


def without(pack: Path, folder: Path, name: str) -> Path:
    """A copy of the pack without one of its files."""
    folder.mkdir(parents=True)
    for path in pack.iterdir():
        if path.name != name:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_bare_pack_gets_the_released_settings(pack, tmp_path):
    bare = FaceAnalyzer.from_pretrained(without(pack, tmp_path / "buffalo_x", "face_analyzer.json"))
    assert bare.det_size[0] == (640, 640)
    assert (bare.det_thresh, bare.crop_size, bare.enlarge, bare.pack) == (0.4, 512, True, "buffalo_x")


def test_other_models_of_a_pack_are_left_out(pack, analyzer, group, tmp_path):
    """antelopev2 brings five models; two of them are used, kept in memory, and saved."""
    folder = without(pack, tmp_path / "pack", "")
    (folder / "w600k.onnx").write_bytes((pack / "recognition.onnx").read_bytes())  # a second recogniser
    loaded = FaceAnalyzer.from_pretrained(folder)
    assert (loaded.detection_path.name, loaded.recognition_path.name) == (
        "detection.onnx",
        "recognition.onnx",
    )
    loaded.save_pretrained(tmp_path / "saved")
    assert len(list((tmp_path / "saved").glob("*.onnx"))) == 2


def test_models_are_not_saved_among_others(pack, analyzer, tmp_path):
    """The folder would be loaded with whichever detector comes first by name."""
    (tmp_path / "another.onnx").write_bytes((pack / "detection.onnx").read_bytes())
    with pytest.raises(ValueError, match=r"`save_directory`.*another.onnx"):
        analyzer.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["another.onnx"]


def test_nested_folder_of_the_antelopev2_archive_is_found(pack, analyzer, group, tmp_path):
    without(pack, tmp_path / "antelopev2" / "antelopev2", "face_analyzer.json")
    found = FaceAnalyzer.from_pretrained(tmp_path / "antelopev2", det_size=(256, 256), enlarge=False)
    assert same_faces(found, analyzer, group)


def test_missing_models_are_named_and_where_to_get_them(pack, tmp_path):
    cases = {
        "no detection model": without(pack, tmp_path / "a", "detection.onnx"),
        "no recognition model": without(pack, tmp_path / "b", "recognition.onnx"),
        r"no \*.onnx": tmp_path,
    }
    for reason, folder in cases.items():
        with pytest.raises(ValueError, match=reason) as error:
            FaceAnalyzer.from_pretrained(folder)
        assert str(folder) in str(error.value)
        assert "non-commercial" in str(error.value) and "antelopev2" in str(error.value)
    for name in ("antelopev2", "./nowhere", "/no/such/folder"):
        with pytest.raises(ValueError, match="neither a folder nor a Hub id.*antelopev2"):
            FaceAnalyzer.from_pretrained(name)


def test_damaged_models_and_lfs_pointers_are_named(pack, tmp_path):
    folder = without(pack, tmp_path / "cut", "recognition.onnx")
    data = (pack / "recognition.onnx").read_bytes()
    (folder / "recognition.onnx").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"damaged model.*recognition.onnx"):
        FaceAnalyzer.from_pretrained(folder)
    (folder / "recognition.onnx").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )
    with pytest.raises(ValueError, match=r"recognition.onnx is a Git LFS pointer.*git lfs pull"):
        FaceAnalyzer.from_pretrained(folder)


@pytest.mark.parametrize(
    "setting, reason",
    [
        ({"det_size": (100, 100)}, "multiples of 32"),
        ({"det_size": ()}, "`det_size`"),
        ({"det_size": 640}, "`det_size`"),
        ({"det_size": ((640, 640), (320,))}, "`det_size`"),
        ({"det_thresh": 0}, "`det_thresh`"),
        ({"det_thresh": float("nan")}, "`det_thresh`"),
        ({"crop_size": 0}, "`crop_size`"),
        ({"crop_size": 64.5}, "`crop_size`"),
        ({"providers": ["NoSuchProvider"]}, "CPUExecutionProvider.*onnxruntime-gpu"),
    ],
)
def test_bad_settings_are_named(pack, setting, reason):
    with pytest.raises(ValueError, match=reason):
        FaceAnalyzer.from_pretrained(pack, **setting)


def test_bad_settings_file_is_named(pack, tmp_path):
    folder = without(pack, tmp_path / "pack", "face_analyzer.json")
    (folder / "face_analyzer.json").write_text(json.dumps({"det_tresh": 0.3}))
    with pytest.raises(ValueError, match=r"face_analyzer.json.*det_tresh.*det_thresh"):
        FaceAnalyzer.from_pretrained(folder)
    for text in ("{", "[1]"):
        (folder / "face_analyzer.json").write_text(text)
        with pytest.raises(ValueError, match=r"face_analyzer.json"):
            FaceAnalyzer.from_pretrained(folder)


def test_from_the_hub_only_models_and_settings_are_fetched(pack, analyzer, group, monkeypatch, tmp_path):
    asked = {}

    def snapshot_download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(pack.parent)

    monkeypatch.setattr(faces_module, "snapshot_download", snapshot_download)
    loaded = FaceAnalyzer.from_pretrained("someone/faces", subfolder="pack", revision="v1")
    assert (asked["repo_id"], asked["revision"]) == ("someone/faces", "v1")
    assert asked["allow_patterns"] == ["pack/*.onnx", "pack/*.json"]
    assert same_faces(loaded, analyzer, group)
    assert same_faces(FaceAnalyzer.from_pretrained(pack.parent, subfolder="pack"), analyzer, group)


def test_hub_id_without_a_network_is_an_error_that_says_so(tmp_path):
    with pytest.raises(ValueError, match="someone/faces.*could not be had from the Hub"):
        FaceAnalyzer.from_pretrained("someone/faces", cache_dir=tmp_path, local_files_only=True)


def test_loading_prints_nothing_and_logs_the_active_providers(pack, capfd, caplog):
    with caplog.at_level(logging.INFO):
        analyzer = FaceAnalyzer.from_pretrained(pack, providers=["CPUExecutionProvider"])
    assert capfd.readouterr().out == ""
    assert analyzer.providers == ["CPUExecutionProvider"]
    assert "run on ['CPUExecutionProvider']" in caplog.text


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_a_provider_that_is_offered_but_does_not_start_is_reported(pack, monkeypatch, caplog):
    """onnxruntime-gpu on a machine whose CUDA libraries are missing runs on the CPU without an error."""
    offered = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: offered)
    with caplog.at_level(logging.WARNING):
        analyzer = FaceAnalyzer.from_pretrained(pack)
    assert analyzer.providers == ["CPUExecutionProvider"]
    assert "not on CUDAExecutionProvider" in caplog.text


class PipelineWithFaces(DiffusionPipeline):
    def __init__(self, face_analyzer: FaceAnalyzer):
        super().__init__()
        self.register_modules(face_analyzer=face_analyzer)


def test_it_is_a_component_of_a_pipeline(analyzer, group, tmp_path):
    PipelineWithFaces(analyzer).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["face_analyzer"] == ["withanyone.faces", "FaceAnalyzer"]
    loaded = PipelineWithFaces.from_pretrained(tmp_path)
    assert isinstance(loaded.face_analyzer, FaceAnalyzer)
    assert same_faces(loaded.face_analyzer, analyzer, group)
    assert PipelineWithFaces.from_pipe(loaded).face_analyzer is loaded.face_analyzer
    assert "FaceAnalyzer" in repr(loaded) and "tiny" in repr(loaded.face_analyzer)
