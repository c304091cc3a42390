"""The face pack: renderings, networks, losses, exact resume, ONNX as insightface reads it, shipped models."""

import argparse
import json
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from withanyone.arcface import Recognizer as OnnxRecognizer
from withanyone.faces import FaceAnalyzer
from withanyone.mini import detection, facepack, recognition
from withanyone.mini.detection import FaceDetector, Scene
from withanyone.mini.faceset import (
    FaceBank,
    FaceSet,
    align_crop,
    crops_of_shard,
    mirrored_traits,
    plan_round,
    scenes_of_shard,
    trait_rows,
)
from withanyone.mini.loop import TrainingLoop, learning_rate, step_rng
from withanyone.mini.muon import MuonAdamW, hidden_matrices
from withanyone.mini.pictures import render_shard
from withanyone.mini.world import RANGES, make_identity, render
from withanyone.precision import orthogonalized


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def scenes():
    pictures = [render(list(range(count)), count, width=128, height=128) for count in (0, 1, 2)]
    return [
        Scene(
            picture.image,
            np.array([person.bbox for person in picture.people], np.float32).reshape(-1, 4),
            np.array([person.kps for person in picture.people], np.float32).reshape(-1, 5, 2),
        )
        for picture in pictures
    ]


# ---- renderings


def test_a_round_shows_every_identity_once():
    plan = plan_round(range(100, 400), seed=3, number=2)
    people = [identity for spec in plan for identity in spec.identities]
    assert sorted(people) == list(range(100, 400))
    assert {len(spec.identities) for spec in plan} >= {0, 1, 2, 3, 4}
    assert plan == plan_round(range(100, 400), seed=3, number=2)
    assert plan != plan_round(range(100, 400), seed=3, number=1)


def test_aligned_crop_holds_what_insightface_aligns():
    from insightface.utils.face_align import norm_crop

    picture = render([5], 11, width=192, height=192)
    kps = picture.people[0].kps
    inner = align_crop(picture.image, kps)[8:-8, 8:-8].astype(int)
    difference = np.abs(inner - norm_crop(picture.image, kps, 112).astype(int))
    assert np.quantile(difference, 0.999) <= 3


def test_a_face_set_goes_on_where_it_stopped(tmp_path):
    one, two = FaceSet(tmp_path / "a", "train", 4), FaceSet(tmp_path / "b", "train", 4)
    one.render(2, picture_rounds=1)
    two.render(1, picture_rounds=1)
    before = (two.round_folder(0) / "faces.npy").stat().st_mtime_ns
    FaceSet(tmp_path / "b", "train", 4).render(2, picture_rounds=1)
    assert (two.round_folder(0) / "faces.npy").stat().st_mtime_ns == before
    for first, second in zip(one.faces(2), two.faces(2), strict=True):
        assert np.array_equal(first, second)
    crops, labels = one.faces(2)
    assert crops.shape[1:] == (128, 128, 3) and sorted(set(labels)) == [0, 1, 2, 3]
    for scene, people in zip(one.scenes(1), one.people(1), strict=True):
        assert len(scene.bboxes) == len(scene.kps) == len(people)
    with pytest.raises(ValueError, match="another set"):
        FaceSet(tmp_path / "a", "judge", 4)


def test_face_sets_stay_in_their_split(tmp_path):
    with pytest.raises(ValueError, match="`split`.*train"):
        FaceSet(tmp_path / "x", "everyone", 4)
    with pytest.raises(ValueError, match="`identities`"):
        FaceSet(tmp_path / "y", "test", len(RANGES["test"]) + 1)
    assert not set(FaceSet(tmp_path / "z", "judge", 5).identities) & set(RANGES["train"])


def test_a_bank_reads_faces_of_rounds_and_of_picture_shards(tmp_path):
    faces = FaceSet(tmp_path / "faces", "train", 3)
    faces.render(1)
    shard = render_shard(tmp_path / "pictures", 1, "train", size=2)  # pairs at 192 px
    folder = crops_of_shard(shard, tmp_path / "crops")
    assert crops_of_shard(shard, tmp_path / "crops") == folder
    bank = FaceBank([*faces.folders(1), folder])
    scenes = scenes_of_shard(shard)
    shown = sum(len(scene.bboxes) for scene in scenes)
    assert len(bank) == 3 + shown and set(bank.identities[3:]) <= set(RANGES["train"])
    chosen = np.array([2, 3])
    assert np.array_equal(bank[chosen][0], np.load(faces.round_folder(0) / "faces.npy")[2])
    assert np.array_equal(bank[chosen][1], align_crop(scenes[0].image, scenes[0].kps[0]))


def test_traits_tell_people_apart():
    table = trait_rows(range(200))
    distances = np.linalg.norm(table[:, None] - table[None], axis=-1) + 99 * np.eye(200)
    assert np.isfinite(table).all() and distances.min() > 1
    assert np.array_equal(trait_rows([7]), table[[7]])


def test_mirroring_people_twice_gives_them_back():
    rows = trait_rows(range(60))
    mirrored = mirrored_traits(rows)
    assert np.array_equal(mirrored_traits(mirrored), rows)
    changed = np.flatnonzero((mirrored != rows).any(0))
    assert len(changed) == 4 + 3 + 2  # asymmetries, places of three moles, place and slope of the scar
    marked = [make_identity(identity) for identity in range(60)]
    places = [person.moles[0][0] if person.moles else 0.0 for person in marked]
    assert np.allclose(rows[:, -15], places) and np.allclose(mirrored[:, -15], np.negative(places))


def test_the_recogniser_s_faces_grow_with_the_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(facepack, "render_shard", partial(render_shard, size=2))
    pictures = facepack.TrainingPictures("train", 3, rounds=1, shards=1, last_shard=3, steps_a_shard=10)
    bank_at = pictures.bank_at(argparse.Namespace(runs=tmp_path, workers=1))
    sizes = [len(bank_at(step)) for step in (0, 9, 10, 20, 90)]
    assert sizes[0] == sizes[1] < sizes[2] < sizes[3] == sizes[4]


# ---- the training loop


def _train(folder, stop=None, steps=6):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loop = TrainingLoop(folder, steps, {"model": model}, optimizer, {"kind": "tiny"})
    for step in loop:
        if step == stop:
            loop.save()
            break
        _, generator = step_rng(1, step)
        loss = model(torch.randn(4, 3, 8, 8, generator=generator)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loop.log(loss=loss.item())
    return model.state_dict()


def test_a_stopped_run_ends_like_one_in_one_go(tmp_path):
    whole = _train(tmp_path / "whole")
    _train(tmp_path / "parts", stop=3)
    parts = _train(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_run_with_other_settings_is_not_continued(tmp_path):
    _train(tmp_path / "run", stop=2)
    with pytest.raises(ValueError, match="steps: 6 there, 7 now"):
        _train(tmp_path / "run", steps=7)


def test_learning_rate_rises_then_falls():
    rates = [learning_rate(step, 1000, 1e-3) for step in range(1000)]
    assert np.argmax(rates) in (99, 100) and rates[0] < 1e-4 and rates[-1] < 2e-5
    assert all(b < a for a, b in zip(rates[100:], rates[101:], strict=False))


def test_orthogonalized_updates_have_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((24, 60), (60, 24)):
        values = torch.linalg.svdvals(orthogonalized(torch.randn(shape)))
        assert values.min() > 0.5 and values.max() < 1.4


def test_the_optimiser_s_two_halves_step_by_the_learning_rate():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3, groups=32))
    matrices = hidden_matrices(model)
    assert [id(p) for p in matrices] == [id(model[0].weight)]
    others = [p for p in model.parameters() if p is not model[0].weight]
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = MuonAdamW(matrices, others, 1e-2)
    model(torch.randn(2, 8, 8, 8)).square().sum().backward()
    optimizer.step()
    for old, new in zip(before, model.parameters(), strict=True):
        change = (new - old).square().mean().sqrt()
        assert 0.1e-2 < change <= 1.01e-2  # as large as AdamW's steps, or 0 where there is no gradient


# ---- recognisers


def test_margins_lower_the_own_class_only():
    cosines = torch.linspace(-0.95, 0.95, 12).reshape(3, 4)
    labels = torch.tensor([1, 0, 3])
    own = F.one_hot(labels, 4).bool()
    for logits in (recognition.cosface_logits, recognition.arcface_logits):
        assert torch.allclose(logits(cosines, labels, 20.0, 0.0), 20 * cosines, atol=1e-4)
        margined = logits(cosines, labels, 20.0, 0.3)
        assert torch.equal(margined[~own], 20 * cosines[~own])
        assert (margined[own] < 20 * cosines[own]).all()
    theta = cosines[own].arccos()
    inside = theta < np.pi - 0.3
    found = recognition.arcface_logits(cosines, labels, 20.0, 0.3)[own]
    assert torch.allclose(found[inside], 20 * torch.cos(theta + 0.3)[inside])


def test_prototypes_hold_the_own_identity_once():
    torch.manual_seed(0)
    people = np.random.default_rng(1).normal(size=(20, 6)).astype(np.float32)
    prototypes = recognition.TraitPrototypes(people)
    batch = people[[4, 7, 4, 0]]
    directions, right = prototypes(batch, np.random.default_rng(0))
    assert len(directions) == 20 and right[0] == right[2]
    spread = torch.from_numpy(people)
    own = prototypes.network((torch.from_numpy(batch) - spread.mean(0)) / (spread.std(0) + 1e-6))
    assert torch.allclose(directions[right], own, atol=1e-5)
    same = ((directions[:, None] - own[None]).abs().amax(-1) < 1e-5).sum(0)  # no negative is one's own
    assert same.tolist() == [1, 1, 1, 1]


def test_augmented_faces_are_reproducible_and_in_range():
    picture = render([8], 1)
    crops = np.stack([align_crop(picture.image, picture.people[0].kps)] * 8)
    first = recognition.augment(crops, np.random.default_rng(4))
    assert torch.equal(first, recognition.augment(crops, np.random.default_rng(4)))
    assert first.shape == (8, 3, 112, 112) and first.min() >= -1 and first.max() <= 1
    plain = recognition.centre_faces(crops)
    assert 0.005 < (first - plain).abs().mean() < 0.5


def test_pair_cosines_on_a_case_done_by_hand():
    embeddings = torch.tensor([[2.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    pairs = recognition.PairCosines.of(embeddings, np.array([7, 7, 9]))
    assert pairs.same.tolist() == [1.0] and pairs.different.tolist() == [0.0, 0.0]
    assert pairs.accuracy(0.5) == 1.0 and pairs.accuracy(-0.1) == 0.5 and pairs.accuracy(1.0) == 0.5
    assert pairs.accuracy(pairs.best_threshold()) == 1.0
    assert recognition.rank_one(embeddings, np.array([7, 7, 9])) == pytest.approx(2 / 3)


@pytest.fixture(scope="module")
def tiny_pack(tmp_path_factory):
    """An untrained pack with batch statistics of its own, and its networks."""
    torch.manual_seed(0)
    recognizer = recognition.Recognizer((16, 16, 16), (1, 1, 1))
    detector = FaceDetector((8, 8, 8, 8, 8), 8)
    with torch.no_grad():
        for module in (*recognizer.modules(), *detector.modules()):
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2.0)
        for head in detector.heads:  # some scores above the threshold, boxes of positive size
            head[-1].weight.normal_(0, 0.3)
            head[-1].bias.view(2, 15)[:, 1:5] = 0.6
            head[-1].bias.view(2, 15)[:, 0] = 0.0
    folder = tmp_path_factory.mktemp("pack")
    recognition.export_recognizer(recognizer, folder / "recognition.onnx")
    detection.export_detector(detector, folder / "detection.onnx")
    (folder / "face_analyzer.json").write_text(json.dumps(facepack.PACK_SETTINGS))
    return folder, recognizer.eval(), detector.eval()


def test_insightface_gives_the_network_s_embedding(tiny_pack):
    folder, recognizer, _ = tiny_pack
    faces = np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3), dtype=np.uint8)
    found = FaceAnalyzer.from_pretrained(folder).embed(list(faces))
    with torch.no_grad():
        expected = recognizer(recognition.to_tensor(faces.astype(np.float32)))
    assert np.abs(found - expected.numpy()).max() < 1e-4 * expected.abs().max()


def test_both_recognisers_survive_onnx_and_back(tmp_path):
    torch.manual_seed(1)
    faces = torch.rand(2, 3, 112, 112) * 2 - 1
    for build in (recognition.Recognizer, recognition.JudgeRecognizer):
        network = build((16, 16, 16), (1, 1, 1))
        path = recognition.export_recognizer(network, tmp_path / "network.onnx")
        with torch.no_grad():
            expected, found = network(faces), OnnxRecognizer.from_onnx(path)(faces)
        assert expected.shape == (2, 512)
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


# ---- detector


def test_targets_read_back_are_the_faces(scenes):
    """A network that says exactly its targets finds exactly the faces."""

    class Oracle:
        def __call__(self, pictures):
            targets = detection.make_targets(self.faces, pictures.shape[-1])
            score = [torch.where(t.positive, 9.0, -9.0)[..., None] for t in targets]
            return [torch.cat([s, t.boxes, t.landmarks], -1) for s, t in zip(score, targets, strict=True)]

    for size in (96, 256):
        fitted = [detection.fit(scene, size) for scene in scenes]
        oracle = Oracle()
        oracle.faces = [tuple(rest) for _, *rest in fitted]
        found = detection.detect(oracle, np.stack([picture for picture, *_ in fitted]), 0.5)
        for (_, bboxes, kps, _), (found_bboxes, found_kps, _) in zip(fitted, found, strict=True):
            order = np.argsort(found_bboxes[:, 0])
            expected = np.argsort(bboxes[:, 0])
            assert np.allclose(found_bboxes[order], bboxes[expected], atol=1e-3)
            assert np.allclose(found_kps[order], kps[expected], atol=1e-3)


def test_insightface_decodes_the_detector_as_we_do(tiny_pack, scenes):
    folder, _, detector = tiny_pack
    picture = scenes[2].image
    analyzer = FaceAnalyzer.from_pretrained(folder, det_size=(128, 128), det_thresh=0.5)
    bboxes, kps, scores = detection.detect(detector, picture[None], 0.5)[0]
    assert len(scores) > 1
    found = {round(face.det_score, 5): face for face in analyzer.detect(picture)}
    matched = [(i, found[round(float(s), 5)]) for i, s in enumerate(scores) if round(float(s), 5) in found]
    assert matched
    for index, face in matched:
        assert np.allclose(face.bbox, bboxes[index], atol=1e-2)
        assert np.allclose(face.kps, kps[index], atol=1e-2)


def test_mirroring_twice_changes_nothing_and_keeps_left_left(scenes):
    scene = scenes[2]
    mirrored = detection.mirror(scene)
    for kps in (scene.kps, mirrored.kps):
        assert (kps[:, 0, 0] < kps[:, 1, 0]).all() and (kps[:, 3, 0] < kps[:, 4, 0]).all()
    again = detection.mirror(mirrored)
    assert np.array_equal(again.image, scene.image)
    assert np.allclose(again.bboxes, scene.bboxes) and np.allclose(again.kps, scene.kps)


def test_placed_boxes_follow_the_pixels():
    image = np.zeros((64, 96, 3), np.uint8)
    image[16:32, 48:72] = 255
    scene = Scene(image, np.array([[48, 16, 72, 32]], np.float32), np.full((1, 5, 2), 48, np.float32))
    canvas, bboxes, _, cut = detection.place(scene, 2.0, (-40.0, 8.0), 128)
    rows, columns = np.nonzero(canvas[..., 0] > 127)
    assert np.allclose(bboxes[0], [56, 40, 104, 72]) and not cut[0]
    box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert np.abs(bboxes[0] - box).max() <= 1
    assert detection.place(scene, 2.0, (-130.0, 8.0), 128)[3].tolist() == [True]


def test_detection_losses_fall_to_zero_at_the_targets(scenes):
    targets = detection.make_targets([tuple(detection.fit(scene, 128)[1:]) for scene in scenes], 128)
    assert sum(int(t.positive.sum()) for t in targets) > 0
    assert not any((t.positive & t.ignored).any() for t in targets)
    scores = [torch.where(t.positive, 20.0, -20.0)[..., None] for t in targets]
    perfect = [torch.cat([s, t.boxes, t.landmarks], -1) for s, t in zip(scores, targets, strict=True)]
    losses = detection.detection_loss(perfect, targets)
    assert set(losses) == set(detection.LOSS_WEIGHTS)
    assert all(value < 1e-4 for value in losses.values())
    worse = detection.detection_loss([output + 0.3 for output in perfect], targets)
    assert worse["box"] > 0.05 and worse["kps"] > 0.05


def test_counting_found_and_false_faces():
    count = detection.DetectionCount()
    bboxes = np.array([[0, 0, 30, 40], [50, 50, 60, 62]], np.float32)
    kps = np.zeros((2, 5, 2), np.float32)
    count.add(bboxes, kps, bboxes[[0, 0]], kps + np.array([3, 4]))  # the second is a duplicate: false
    count.add(bboxes, kps, bboxes[[1]], kps[[1]])  # a small face: not asked for, not false
    figures = count.figures()
    assert figures["recall"] == 0.5 and figures["faces"] == 2
    assert figures["pictures_with_false_face"] == 0.5
    assert figures["kps_error_median"] == pytest.approx(5 / 40)


def test_a_step_of_training_runs_on_rendered_faces(tmp_path, scenes):
    faces = FaceSet(tmp_path / "faces", "train", 4)
    faces.render(3)
    bank = FaceBank(faces.folders(3))
    others = trait_rows(range(100, 140))
    builds = {"cosface": recognition.Recognizer, "arcface": recognition.JudgeRecognizer}
    for loss, build in builds.items():
        network = build((16, 16, 16), (1, 1, 1))
        before = [parameter.clone() for parameter in network.parameters()]
        settings = recognition.RecognizerSettings(steps=2, batch_size=4, loss=loss)
        recognition.train_recognizer(network, lambda step: bank, others, bank, tmp_path / loss, settings)
        assert all(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    detector = FaceDetector((8, 8, 8, 8, 8), 8)
    settings = detection.DetectorSettings(steps=2, batch_size=2, sizes=(96,))
    detection.train_detector(detector, scenes, scenes, tmp_path / "det", settings)
    assert detection.evaluate(detector, scenes, 96)["pictures"] == 3


# ---- figures and the shipped models


def test_intervals_hold_their_figure():
    low, high = facepack.share_interval(995, 1000)
    assert low < 0.995 < high < 1 and low > 0.985
    low, high = facepack.bootstrap(np.arange(101.0), lambda v: float(np.median(v)))
    assert low < 50 < high


def test_every_command_takes_its_arguments():
    for name, (add_arguments, run) in facepack.COMMANDS.items():
        parser = argparse.ArgumentParser(name)
        add_arguments(parser)
        assert parser.parse_args([]).threads == 1 and callable(run)


def test_the_shipped_pack_finds_and_recognises_drawn_people():
    analyzer = FaceAnalyzer.from_pretrained(facepack.PACK)
    first = RANGES["validation"].start + 5000
    embeddings, labels = [], []
    for identity in range(first, first + 8):
        for seed in (1, 2):
            faces = analyzer.detect(render([identity], seed + 10 * identity).image)
            assert len(faces) == 1
            embeddings.append(faces[0].embedding)
            labels.append(identity)
    figures = recognition.PairCosines.of(torch.from_numpy(np.stack(embeddings)), np.array(labels))
    threshold = json.loads(facepack.FIGURES.read_text())["recognizer"]["threshold"]
    assert figures.accuracy(threshold) > 0.8  # eight pairs; the figure itself is in faces.json
    assert analyzer.detect(render([], 3).image) == []


def test_shipped_figures_are_of_at_least_five_hundred_test_people():
    figures = json.loads(facepack.FIGURES.read_text())
    assert figures["recognizer"]["identities"] >= 500
    assert figures["recognizer"]["verification"] > 0.95
    assert ("judge" in figures) == facepack.JUDGE.exists()
    assert figures["detector"]["faces"] > 1000
