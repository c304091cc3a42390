"""The torch recogniser equals the ONNX file, `align_face` insightface's warp, and both have gradients."""

from __future__ import annotations

import warnings
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from insightface.utils import face_align
from torch import Tensor, nn

from tests import tiny_faces
from withanyone.arcface import TEMPLATE, Recognizer, align_face, similarity_transform
from withanyone.faces import FaceAnalyzer


def insightface_matrix(kps: np.ndarray, size: int = 112) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of a scikit-image method it calls
        return face_align.estimate_norm(kps, size)


def insightface_crop(image: np.ndarray, kps: np.ndarray, size: int = 112) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return face_align.norm_crop(image, kps, size)


def random_kps(rng: np.random.Generator, size: float = 112, wobble: float = 3) -> np.ndarray:
    """(5, 2) float32: the template turned, scaled, moved, and not quite of its shape."""
    angle, scale = rng.uniform(-np.pi, np.pi), rng.uniform(0.3, 3)
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = np.array(TEMPLATE) + rng.normal(scale=wobble, size=(5, 2))
    return ((points - 56) @ turn.T + size / 2 + rng.uniform(-20, 20, 2)).astype(np.float32)


def to_tensor(image: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (1, 3, H, W) in [-1, 1]"""
    return torch.from_numpy(image.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]


# ----------------------------------------------------------------------------------------------------------
# Alignment
# ----------------------------------------------------------------------------------------------------------


def test_transform_undoes_any_similarity_of_the_template():
    rng = np.random.default_rng(0)
    kps = np.stack([random_kps(rng, wobble=0) for _ in range(20)])
    matrix = similarity_transform(torch.from_numpy(kps))
    points = torch.cat([torch.from_numpy(kps), torch.ones(20, 5, 1)], dim=2)  # (20, 5, 3)
    moved = points @ matrix.transpose(1, 2)
    assert (moved - torch.tensor(TEMPLATE)).abs().max() < 1e-3


@pytest.mark.parametrize("size", [112, 224])
def test_transform_equals_insightface(size):
    rng = np.random.default_rng(1)
    kps = [random_kps(rng, size, wobble=6) for _ in range(20)]
    kps += [k * (-1, 1) for k in kps[:4]]  # mirrored: a similarity must not reflect
    kps = np.stack(kps).astype(np.float32)
    ours = similarity_transform(torch.from_numpy(kps).double(), size).numpy()
    theirs = np.stack([insightface_matrix(k, size) for k in kps])
    np.testing.assert_allclose(ours[:, :, :2], theirs[:, :, :2], atol=1e-5)
    np.testing.assert_allclose(ours[:, :, 2], theirs[:, :, 2], atol=2e-3)


@pytest.mark.parametrize(
    "kps", [torch.zeros(1, 5, 2), torch.full((2, 5, 2), 7.0), torch.full((1, 5, 2), float("nan"))]
)
def test_landmarks_that_align_nothing_are_refused(kps):
    with pytest.raises(ValueError, match="`kps`.*no face"):
        similarity_transform(kps)
    with pytest.raises(ValueError, match="`kps` has shape"):
        similarity_transform(kps[0])
    with pytest.raises(ValueError, match="`images` has shape"):
        align_face(torch.zeros(3, 3, 32, 32), kps[:1])


@pytest.mark.parametrize("smooth", [0, 2, 6])
def test_align_face_is_insightfaces_crop_within_what_interpolation_explains(smooth):
    """OpenCV rounds the result to whole values, and before version 5 positions to 1/32 px; that is all.

    So a pixel differs by at most half a value, plus the rounding of its position times the picture's steepest
    step in x and in y (the black beyond the edge belongs to the picture).
    """
    rng = np.random.default_rng(2)
    image = rng.integers(0, 256, (150, 180, 3)).astype(np.float32)
    if smooth:
        blurred = F.avg_pool2d(to_tensor(image), 2 * smooth + 1, 1, smooth)
        image = ((blurred + 1) * 127.5)[0].permute(1, 2, 0).numpy()
    image = image.round().astype(np.uint8)
    framed = np.pad(image.astype(np.float32), ((2, 2), (2, 2), (0, 0)))
    steepest = sum(np.abs(np.diff(framed, axis=axis)).max() for axis in (0, 1))
    position = 0 if int(cv2.__version__.split(".")[0]) >= 5 else 1 / 64
    for _ in range(12):
        kps = random_kps(rng, 165)
        theirs = insightface_crop(image, kps).astype(np.float32)  # (112, 112, 3)
        ours = align_face(to_tensor(image), torch.from_numpy(kps)[None])[0].permute(1, 2, 0).numpy()
        assert np.abs((ours + 1) * 127.5 - theirs).max() <= 0.52 + steepest * position


def test_black_lies_outside_the_picture():
    white = torch.ones(1, 3, 40, 40)
    kps = torch.tensor(TEMPLATE)[None] - 200  # the whole face is outside
    assert torch.equal(align_face(white, kps), torch.full((1, 3, 112, 112), -1.0))


def test_each_picture_of_a_batch_is_aligned_by_its_own_landmarks():
    rng = np.random.default_rng(3)
    images = torch.rand(3, 3, 90, 120) * 2 - 1
    kps = torch.from_numpy(np.stack([random_kps(rng, 100) for _ in range(3)]))
    together = align_face(images, kps)
    assert together.shape == (3, 3, 112, 112)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], align_face(images[i : i + 1], kps[i : i + 1]))


def test_half_precision_pictures_are_aligned_with_exact_positions():
    rng = np.random.default_rng(4)
    images = (torch.rand(1, 3, 600, 600) * 2 - 1).bfloat16()
    kps = torch.from_numpy(random_kps(rng, 600))[None]
    half = align_face(images, kps)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, align_face(images.float(), kps).bfloat16())


def test_align_face_has_the_right_gradient():
    torch.manual_seed(0)
    rng = np.random.default_rng(5)
    images = torch.rand(2, 3, 9, 11, dtype=torch.float64, requires_grad=True)
    kps = torch.from_numpy(np.stack([random_kps(rng, 10, 0.3) / 8 for _ in range(2)])).double()
    assert torch.autograd.gradcheck(lambda x: align_face(x, kps, size=14), images, eps=1e-4)


# ----------------------------------------------------------------------------------------------------------
# The recogniser
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_faces.write_pack(tmp_path_factory.mktemp("faces") / "pack")


def run_onnx(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def export(net: nn.Module, path: Path, opset: int = 17, **options) -> Path:
    tiny_faces.export_recognizer(net, path, opset, **options)
    return path


def test_recognizer_equals_onnxruntime_on_the_pack(pack):
    faces = tiny_faces.painted_batch(range(5))
    recognizer = Recognizer.from_onnx(pack / "recognition.onnx")
    embeddings = recognizer(faces)
    assert embeddings.shape == (5, 512)
    assert relative(embeddings, run_onnx(pack / "recognition.onnx", faces)) < 1e-4
    torch.testing.assert_close(embeddings[3:4], recognizer(faces[3:4]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("opset", [11, 13, 17, 18])
def test_recognizer_equals_onnxruntime_on_a_narrow_iresnet(opset, tmp_path):
    net = tiny_faces.iresnet((2, 1, 2, 1), width=8)
    path = export(net, tmp_path / "narrow.onnx", opset)
    faces = tiny_faces.painted_batch(range(3))
    recognizer = Recognizer.from_onnx(path)
    assert relative(recognizer(faces), run_onnx(path, faces)) < 1e-4
    assert relative(recognizer(faces), net(faces)) < 1e-4


@pytest.mark.slow
def test_recognizer_equals_onnxruntime_on_an_iresnet_100(tmp_path):
    """The architecture and layout of antelopev2's glintr100, with random weights: 260 MB, 24 GFLOP a face."""
    net = tiny_faces.iresnet((3, 13, 30, 3), width=64, people=4)
    path = export(net, tmp_path / "glintr100.onnx", opset=11)
    assert path.stat().st_size > 240e6
    faces = tiny_faces.painted_batch(range(2))
    recognizer = Recognizer.from_onnx(path)
    embeddings = recognizer(faces)
    assert 0.1 < float(embeddings.std()) < 10  # random weights that neither vanish nor explode
    assert relative(embeddings, run_onnx(path, faces)) < 1e-4
    # Gradients through a hundred layers, along one direction.
    image = faces[:1].clone().requires_grad_()
    loss = F.cosine_similarity(recognizer(image), embeddings[1:2]).sum()
    (gradient,) = torch.autograd.grad(loss, image)
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0


class OddNet(nn.Module):
    """Operators that a ResNet does not use, and a recogniser might."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, dilation=2)
        self.depthwise = nn.Conv2d(8, 8, 5, padding=2, groups=8)
        self.scale = nn.Parameter(1 + torch.rand(1, 8, 1, 1))
        self.to_embedding = nn.Parameter(torch.randn(8, 512))
        self.linear = nn.Linear(512, 512)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv(x), 0.2)
        x = F.max_pool2d(x, 3, 2, 1) - F.avg_pool2d(x, 2, 2)
        gate = torch.sigmoid(x.mean(dim=(2, 3), keepdim=True))
        x = self.depthwise(x) * gate / self.scale
        x = F.adaptive_avg_pool2d(F.relu(x), 1) + x.mean(dim=(2, 3), keepdim=True)  # (B, 8, 1, 1)
        x = x.permute(0, 2, 3, 1).reshape(-1, 8)
        return self.linear(x @ self.to_embedding)


def odd_net() -> nn.Module:
    torch.manual_seed(0)
    return OddNet().eval().requires_grad_(False)


@pytest.mark.parametrize("opset", [13, 18])
def test_operators_beyond_a_resnet_equal_onnxruntime(opset, tmp_path):
    path = export(odd_net(), tmp_path / "odd.onnx", opset)
    faces = tiny_faces.painted_batch(range(3))
    used = {node.op_type for node in onnx.load(path).graph.node}
    assert {"LeakyRelu", "MaxPool", "AveragePool", "Sub", "ReduceMean", "Sigmoid", "Div", "MatMul"} <= used
    assert relative(Recognizer.from_onnx(path)(faces), run_onnx(path, faces)) < 1e-4


def handmade(path: Path, nodes: list, weights: dict[str, np.ndarray], shape=("batch", 3, 112, 112)) -> Path:
    """An ONNX file from nodes (operator, inputs, output, attributes); its input is "x", its output "y"."""
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(op, inputs, [output], **options) for op, inputs, output, options in nodes],
        "handmade",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (shape[0], 512))],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path
    )
    return path


def test_uneven_padding_half_precision_weights_and_constants(tmp_path):
    """What exporters and shrinkers of files write: weights in 16 bits with a cast, constants as nodes."""
    rng = np.random.default_rng(0)
    weights = {
        "kernel": rng.normal(size=(4, 3, 8, 8)).astype(np.float16),
        "project": rng.normal(size=(512, 4 * 15 * 15)).astype(np.float16),
        "shape": np.array([-1, 4 * 15 * 15]),
    }
    two = onnx.numpy_helper.from_array(np.float32(2), "two")
    nodes = [
        ("Cast", ["kernel"], "kernel32", {"to": onnx.TensorProto.FLOAT}),
        ("Cast", ["project"], "project32", {"to": onnx.TensorProto.FLOAT}),
        ("Constant", [], "two", {"value": two}),
        ("Conv", ["x", "kernel32"], "a", {"strides": [8, 8], "pads": [3, 5, 6, 4], "kernel_shape": [8, 8]}),
        ("Mul", ["a", "two"], "b", {}),
        ("Identity", ["b"], "c", {}),
        ("Dropout", ["c"], "d", {}),
        ("Reshape", ["d", "shape"], "e", {}),
        ("Gemm", ["e", "project32"], "y", {"transB": 1, "alpha": 0.5}),
    ]
    path = handmade(tmp_path / "handmade.onnx", nodes, weights)
    faces = tiny_faces.painted_batch(range(3))
    recognizer = Recognizer.from_onnx(path)
    assert relative(recognizer(faces), run_onnx(path, faces)) < 1e-4
    assert recognizer.dtype == torch.float32


def test_file_of_a_fixed_batch_takes_any_batch(tmp_path):
    project = np.random.default_rng(0).normal(size=(3, 512)).astype(np.float32)
    weights = {"w": project, "shape": np.array([1, 3])}
    nodes = [
        ("GlobalAveragePool", ["x"], "a", {}),
        ("Reshape", ["a", "shape"], "b", {}),
        ("MatMul", ["b", "w"], "y", {}),
    ]
    path = handmade(tmp_path / "fixed.onnx", nodes, weights, (1, 3, 112, 112))
    faces = tiny_faces.painted_batch(range(3))
    one_by_one = torch.cat([run_onnx(path, face[None]) for face in faces])
    assert relative(Recognizer.from_onnx(path)(faces), one_by_one) < 1e-4


@pytest.mark.parametrize("kind", ["pack", "iresnet", "odd"])
def test_gradients_equal_finite_differences(kind, pack, tmp_path):
    """In float64, along random directions: the derivative of a projection of the embedding."""
    if kind == "pack":
        path = pack / "recognition.onnx"
    else:
        net = odd_net() if kind == "odd" else tiny_faces.iresnet((1, 1, 1, 1), width=8)
        path = export(net, tmp_path / "net.onnx")
    recognizer = Recognizer.from_onnx(path).double()
    torch.manual_seed(0)
    image = tiny_faces.painted_batch([3]).double() + 0.05 * torch.randn(1, 3, 112, 112, dtype=torch.float64)
    image.requires_grad_()
    projection = torch.randn(512, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((recognizer(image) @ projection).sum(), image)
    for _ in range(3):
        direction = torch.randn_like(image)
        direction *= 1e-6 / direction.norm()  # too short to cross many kinks of the ReLUs
        with torch.no_grad():
            change = (recognizer(image + direction) - recognizer(image - direction)) @ projection / 2
        assert float((gradient * direction).sum()) == pytest.approx(float(change), rel=1e-4)


def test_gradient_flows_from_embedding_to_picture(pack):
    """The identity loss's path: picture -> aligned face -> embedding -> cosine."""
    recognizer = Recognizer.from_onnx(pack / "recognition.onnx")
    box = (30, 20, 90, 100)
    target = to_tensor(np.asarray(tiny_faces.paint_face(tiny_faces.blank(), box, 1)))
    picture = to_tensor(np.asarray(tiny_faces.paint_face(tiny_faces.blank(), box, 2))).requires_grad_()
    kps = torch.from_numpy(tiny_faces.kps_of(box))[None]
    wanted = recognizer(align_face(target, kps))

    def loss(image: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(recognizer(align_face(image, kps)), wanted).mean()

    before = loss(picture)
    (gradient,) = torch.autograd.grad(before, picture)
    assert gradient[..., :10, :].abs().max() == 0  # far above the face nothing matters
    with torch.no_grad():
        assert loss(picture - 2 * gradient / gradient.norm()) < before - 0.01


def test_weights_are_frozen_and_the_module_has_one_mode(pack):
    recognizer = Recognizer.from_onnx(pack / "recognition.onnx")
    faces = tiny_faces.painted_batch(range(3))
    assert list(recognizer.parameters()) == []
    assert not any(buffer.requires_grad for buffer in recognizer.buffers())
    assert torch.equal(recognizer.eval()(faces), recognizer.train()(faces))
    other = Recognizer.from_onnx(pack / "recognition.onnx")
    other.load_state_dict({name: torch.zeros_like(w) for name, w in other.state_dict().items()})
    other.load_state_dict(recognizer.state_dict())
    assert torch.equal(other(faces), recognizer(faces))


def test_it_computes_in_the_dtype_it_is_cast_to(pack):
    recognizer = Recognizer.from_onnx(pack / "recognition.onnx")
    faces = tiny_faces.painted_batch(range(4))
    exact = recognizer(faces)
    half = recognizer.to(torch.bfloat16)(faces)
    assert half.dtype == torch.bfloat16
    assert F.cosine_similarity(half.float(), exact).min() > 0.99


def test_hidden_states_are_the_feature_maps_on_the_way(tmp_path):
    net = tiny_faces.iresnet((2, 1, 2, 1), width=8)
    recognizer = Recognizer.from_onnx(export(net, tmp_path / "narrow.onnx"))
    faces = tiny_faces.painted_batch(range(3))
    maps, embeddings = recognizer.hidden_states(faces)
    assert torch.equal(embeddings, recognizer(faces))
    x = net.prelu(net.bn1(net.conv1(faces)))
    for block, found in zip(net.blocks, maps, strict=True):
        x = block(x)
        assert relative(found, x) < 1e-4


def test_detected_embedding_equals_the_differentiable_one(pack):
    """FaceAnalyzer and the torch path see the same face, but for the warp's rounding to whole values."""
    analyzer = FaceAnalyzer.from_pretrained(pack)
    recognizer = Recognizer.from_onnx(analyzer.recognition_path)
    image = tiny_faces.blank(200, 160)
    for i, box in enumerate(((20, 20, 80, 100), (110, 60, 180, 150))):
        image = tiny_faces.paint_face(image, box, i)
    for face in analyzer.detect(image):
        aligned = align_face(to_tensor(np.asarray(image)), torch.from_numpy(face.kps)[None])
        cosine = F.cosine_similarity(recognizer(aligned), torch.from_numpy(face.embedding)[None])
        assert float(cosine) > 0.999


def test_files_that_are_no_recogniser_are_refused(pack, tmp_path):
    with pytest.raises(ValueError, match="is not a file"):
        Recognizer.from_onnx(tmp_path / "none.onnx")
    data = (pack / "recognition.onnx").read_bytes()
    for name, content in (("text.onnx", b"\xffno model"), ("cut.onnx", data[: len(data) // 2])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is not an ONNX file"):
            Recognizer.from_onnx(tmp_path / name)
    with pytest.raises(ValueError, match="9 outputs.*detector"):
        Recognizer.from_onnx(pack / "detection.onnx")
    recognizer = Recognizer.from_onnx(pack / "recognition.onnx")
    for shape in ((3, 112, 112), (1, 3, 96, 96), (1, 1, 112, 112)):
        with pytest.raises(ValueError, match="`aligned_faces` has shape.*align_face"):
            recognizer(torch.zeros(shape))


def test_unknown_operators_are_named(tmp_path):
    weights = {"w": np.zeros((3, 512), np.float32)}
    nodes = [
        ("Softplus", ["x"], "a", {}),
        ("GlobalAveragePool", ["a"], "b", {}),
        ("Flatten", ["b"], "c", {}),
        ("MatMul", ["c", "w"], "y", {}),
    ]
    path = handmade(tmp_path / "soft.onnx", nodes, weights)
    with pytest.raises(ValueError, match=r"operators \['Softplus'\].*supported are.*'Conv'"):
        Recognizer.from_onnx(path)
