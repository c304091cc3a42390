"""Face recognition with gradients: the warp to ArcFace's template, and the recogniser as a torch module.

The identity losses compare embeddings of a generated face with those of the target's; their gradients flow
through `align_face` (a differentiable warp) and through a frozen `Recognizer`, which is built from the same
ONNX file that `faces.FaceAnalyzer` runs, so there is one network, not two.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    import onnx

TEMPLATE_SIZE = 112
TEMPLATE = (
    (38.2946, 51.6963),
    (73.5318, 51.5014),
    (56.0252, 71.7366),
    (41.5493, 92.3655),
    (70.7299, 92.2041),
)
"""Where the five landmarks come to lie in an aligned face of 112 x 112 px: insightface's ArcFace template."""


# ----------------------------------------------------------------------------------------------------------
# Alignment
# ----------------------------------------------------------------------------------------------------------


def similarity_transform(kps: Tensor, size: int = TEMPLATE_SIZE) -> Tensor:
    """The rotation, scale and shift that bring landmarks closest to the template (Umeyama, 1991).

    In the plane this needs no SVD. With centred landmarks p and template points q as complex numbers, the
    minimiser of sum |a p - q|^2 is a = sum(conj(p) q) / sum |p|^2: its length is the scale, its angle the
    rotation.

    Args:
        kps: (B, 5, 2) landmarks in pixels. size: side of the aligned face.

    Returns:
        (B, 2, 3) matrices that take (x, y, 1) in the picture to the aligned face, differentiable in `kps`.

    Raises:
        ValueError: if the landmarks are not finite, or all in one point.
    """
    if kps.ndim != 3 or kps.shape[1:] != (5, 2):
        raise ValueError(f"`kps` has shape {tuple(kps.shape)}: give (B, 5, 2).")
    if not kps.is_floating_point() or kps.dtype in (torch.float16, torch.bfloat16):
        kps = kps.float()  # pixel coordinates need more than 8 bits of mantissa
    template = kps.new_tensor(TEMPLATE) * (size / TEMPLATE_SIZE)  # (5, 2)
    p_mean, q_mean = kps.mean(dim=1), template.mean(dim=0)  # (B, 2), (2,)
    p, q = kps - p_mean[:, None], template - q_mean  # (B, 5, 2), (5, 2)
    spread = p.square().sum(dim=(1, 2))  # (B,)
    if not bool((spread > 1e-6).all()):
        raise ValueError("`kps` are not finite, or lie in one point: no face can be aligned by them.")
    real = (p * q).sum(dim=(1, 2)) / spread
    imag = (p[..., 0] * q[:, 1] - p[..., 1] * q[:, 0]).sum(dim=1) / spread
    linear = torch.stack([torch.stack([real, -imag], -1), torch.stack([imag, real], -1)], dim=1)  # (B, 2, 2)
    shift = q_mean - (linear @ p_mean[..., None]).squeeze(-1)  # (B, 2)
    return torch.cat([linear, shift[..., None]], dim=2)  # (B, 2, 3)


def align_face(images: Tensor, kps: Tensor, size: int = TEMPLATE_SIZE) -> Tensor:
    """Warp faces to the template, differentiably; the same picture as insightface's `norm_crop`.

    Bilinear, with pixel centres at whole coordinates (as OpenCV has them), black outside the picture.

    Args:
        images: (B, 3, H, W) in [-1, 1]. kps: (B, 5, 2) landmarks in the images' pixels. size: side of the
        result.

    Returns:
        (B, 3, size, size) in [-1, 1], of the images' dtype.
    """
    if images.ndim != 4 or len(images) != len(kps):
        raise ValueError(
            f"`images` has shape {tuple(images.shape)} and `kps` {tuple(kps.shape)}: give (B, 3, H, W) and "
            "(B, 5, 2)."
        )
    dtype = images.dtype
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    # Where the landmarks are: a GPU would have to be waited for to check them.
    matrix = similarity_transform(kps.to(dtype=exact), size).to(images.device)  # (B, 2, 3)
    a, b = matrix[:, 0, 0], matrix[:, 1, 0]
    square = a * a + b * b
    inverse = torch.stack([torch.stack([a, b], -1), torch.stack([-b, a], -1)], dim=1) / square[:, None, None]
    steps = torch.arange(size, device=images.device, dtype=exact)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    points = torch.stack([x, y], dim=-1).reshape(1, -1, 2) - matrix[:, None, :, 2]  # (B, size * size, 2)
    points = points @ inverse.transpose(1, 2)  # pixels of the images
    extent = points.new_tensor([images.shape[3], images.shape[2]])
    grid = ((2 * points + 1) / extent - 1).reshape(-1, size, size, 2)
    # grid_sample pads with 0, which is grey here: shift black to 0 for the sampling.
    with torch.autocast(images.device.type, enabled=False):
        warped = F.grid_sample(
            images.to(exact) + 1, grid, mode="bilinear", padding_mode="zeros", align_corners=False
        )
    return (warped - 1).to(dtype)


# ----------------------------------------------------------------------------------------------------------
# The recogniser
# ----------------------------------------------------------------------------------------------------------


class Recognizer(nn.Module):
    """A recogniser's ONNX graph as a torch module: `from_onnx(path)`.

    Aligned faces (B, 3, 112, 112), RGB in [-1, 1], to raw embeddings (B, 512). Always in inference mode
    (batch statistics are the stored ones, dropout is off), its weights are buffers without gradients, and
    gradients flow to the input. It computes in the dtype it is cast to (`.to(torch.bfloat16)`), whatever
    precision the file was stored in.
    """

    def __init__(
        self, nodes: list[_Node], weights: dict[str, Tensor], input_name: str, output_name: str, size: int
    ):
        super().__init__()
        self.size = size
        self._nodes = nodes
        self._input_name, self._output_name = input_name, output_name
        self._buffer_of = {}  # the graph's names hold dots and slashes, which buffers' must not
        for i, (name, value) in enumerate(weights.items()):
            self._buffer_of[name] = f"weight_{i}"
            self.register_buffer(f"weight_{i}", value)

    def forward(self, aligned_faces: Tensor) -> Tensor:
        return self._run(aligned_faces)

    def hidden_states(self, aligned_faces: Tensor) -> tuple[list[Tensor], Tensor]:
        """The feature maps that end the residual blocks, (B, C, h, w) each, coarser from first to last, and
        the embeddings (B, 512) that they lead to."""
        maps: list[Tensor] = []
        embeddings = self._run(aligned_faces, maps)
        return maps, embeddings

    def _run(self, aligned_faces: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        if aligned_faces.ndim != 4 or aligned_faces.shape[1:] != (3, self.size, self.size):
            raise ValueError(
                f"`aligned_faces` has shape {tuple(aligned_faces.shape)}: give (B, 3, {self.size}, "
                f"{self.size}); `align_face` makes them."
            )
        values = {name: getattr(self, buffer) for name, buffer in self._buffer_of.items()}
        values[self._input_name] = aligned_faces.to(self.dtype)
        for node in self._nodes:
            result = values[node.output] = node.run(*(values[name] if name else None for name in node.inputs))
            if maps is not None and node.op == "Add" and result.ndim == 4:
                maps.append(result)
            for name in node.frees:
                del values[name]
        return values[self._output_name]  # (B, 512)

    @property
    def dtype(self) -> torch.dtype:
        return next(b.dtype for b in self.buffers() if b.is_floating_point())

    @classmethod
    def from_onnx(cls, path: str | os.PathLike) -> Recognizer:
        """Build from an insightface recogniser's ONNX file, in float32.

        Raises:
            ValueError: if the file is missing or damaged, is no recogniser, or uses an operator without an
                entry in this module's table; the message names it.
        """
        graph, input_name, size = _read_graph(Path(path))
        nodes, weights = _plan(graph)
        return cls(nodes, weights, input_name, graph.output[0].name, size).eval()


def _read_graph(path: Path) -> tuple[onnx.GraphProto, str, int]:
    """The graph of a recogniser's file, the name of its input, and the side of the faces it takes."""
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise ValueError(f"`path` {path} is not a file: give the recogniser's ONNX file.")
    try:
        graph = onnx.load(str(path)).graph
    except DecodeError as error:
        raise ValueError(f"`path` {path} is not an ONNX file, or is cut off ({error}).") from error
    constants = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    if len(inputs) != 1 or len(graph.output) != 1:
        raise ValueError(
            f"`path` {path} has {len(inputs)} inputs and {len(graph.output)} outputs: a recogniser has "
            "one of each (a file with several outputs is a detector)."
        )
    shape = [d.dim_value for d in inputs[0].type.tensor_type.shape.dim]
    if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3] or not shape[2]:
        raise ValueError(
            f"`path` {path} takes an input of shape {shape}: a recogniser takes (B, 3, 112, 112)."
        )
    unsupported = sorted({n.op_type for n in graph.node} - set(_OPS) - {"Constant"})
    if unsupported:
        raise ValueError(
            f"`path` {path} uses the operators {unsupported}, which have no torch counterpart here: "
            f"supported are {sorted(_OPS)}."
        )
    return graph, inputs[0].name, shape[2]


def _plan(graph: onnx.GraphProto) -> tuple[list[_Node], dict[str, Tensor]]:
    """The graph's steps in order, and the weights they use; what depends on constants alone is done here."""
    import onnx

    weights = {t.name: _tensor(onnx.numpy_helper.to_array(t)) for t in graph.initializer}
    nodes = []
    for node in graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Constant":
            weights[node.output[0]] = _tensor(onnx.numpy_helper.to_array(attributes["value"]))
            continue
        run = _OPS[node.op_type](attributes, weights, node.input)
        if all(name in weights for name in node.input):
            weights[node.output[0]] = run(*(weights[name] for name in node.input))
        else:
            # What a shape or axes are given by was read just now.
            inputs = node.input[:1] if node.op_type in ("Reshape", "ReduceMean") else node.input
            nodes.append(_Node(node.op_type, list(inputs), node.output[0], run))
    _plan_frees(nodes, graph.output[0].name)
    used = {name for node in nodes for name in node.inputs}
    return nodes, {name: value for name, value in weights.items() if name in used}


class _Node:
    """One step of the graph: `output = run(*inputs)`, after which `frees` are no longer needed."""

    def __init__(self, op: str, inputs: list[str], output: str, run: Callable[..., Tensor]):
        self.op, self.inputs, self.output, self.run = op, inputs, output, run
        self.frees: list[str] = []


def _plan_frees(nodes: list[_Node], output: str) -> None:
    """Let go of each intermediate value after its last use, so that inference holds few of them."""
    made = {node.output for node in nodes} - {output}
    for node in reversed(nodes):
        node.frees = sorted(made & set(node.inputs))
        made -= set(node.inputs)


def _tensor(array: np.ndarray) -> Tensor:
    """Floats of any precision as float32 (the module's dtype decides afterwards), the rest as it is."""
    tensor = torch.from_numpy(np.array(array))
    return tensor.float() if tensor.is_floating_point() else tensor


# ----------------------------------------------------------------------------------------------------------
# Operators: from a node's attributes and constants to a function of its input tensors
# ----------------------------------------------------------------------------------------------------------


def _padding(attributes: dict) -> tuple[int, int, int, int]:
    """(left, right, top, bottom) for F.pad, from ONNX's (top, left, bottom, right)."""
    if attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise ValueError(f"auto_pad {attributes['auto_pad']} is not supported: export with explicit pads.")
    top, left, bottom, right = attributes.get("pads", (0, 0, 0, 0))
    return left, right, top, bottom


def _conv(attributes: dict, constants: dict, inputs: list[str]):
    left, right, top, bottom = _padding(attributes)
    stride = attributes.get("strides", (1, 1))
    dilation = attributes.get("dilations", (1, 1))
    groups = attributes.get("group", 1)
    symmetric = (left, top) == (right, bottom)

    def run(x, weight, bias=None):
        if not symmetric:
            x = F.pad(x, (left, right, top, bottom))
        return F.conv2d(x, weight, bias, stride, (top, left) if symmetric else 0, dilation, groups)

    return run


def _batch_norm(attributes: dict, constants: dict, inputs: list[str]):
    eps = attributes.get("epsilon", 1e-5)
    return lambda x, weight, bias, mean, var: F.batch_norm(
        x, mean, var, weight, bias, training=False, eps=eps
    )


def _gemm(attributes: dict, constants: dict, inputs: list[str]):
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    trans_a, trans_b = attributes.get("transA", 0), attributes.get("transB", 0)

    def run(a, b, c=None):
        product = (a.T if trans_a else a) @ (b.T if trans_b else b)
        product = product if alpha == 1 else alpha * product
        return product if c is None else product + (c if beta == 1 else beta * c)

    return run


def _pool(pool: Callable[..., Tensor], fill: float):
    def build(attributes: dict, constants: dict, inputs: list[str]):
        pad = _padding(attributes)
        kernel, stride = attributes["kernel_shape"], attributes.get("strides", (1, 1))
        if attributes.get("ceil_mode", 0) or any(d != 1 for d in attributes.get("dilations", (1, 1))):
            raise ValueError("pooling with ceil_mode or dilations is not supported: export it without.")
        if fill == 0 and any(pad) and not attributes.get("count_include_pad", 0):
            raise ValueError(
                "average pooling that leaves its padding out is not supported: export it without."
            )
        return lambda x: pool(F.pad(x, pad, value=fill) if any(pad) else x, kernel, stride)

    return build


def _reshape(attributes: dict, constants: dict, inputs: list[str]):
    if inputs[1] not in constants:
        raise ValueError("Reshape to a computed shape is not supported: export with torch.flatten(x, 1).")
    shape = constants[inputs[1]].tolist()
    if inputs[0] in constants:
        return lambda x, _: x.reshape(shape)
    # The first axis is the batch, whatever it was when the file was written (-1, 0 for "as it is", or 1).
    return lambda x: x.reshape(
        len(x), *(x.shape[i] if n == 0 else n for i, n in enumerate(shape[1:], start=1))
    )


def _reduce_mean(attributes: dict, constants: dict, inputs: list[str]):
    axes = constants[inputs[1]].tolist() if len(inputs) > 1 else list(attributes["axes"])
    keep = bool(attributes.get("keepdims", 1))
    return lambda x, *_: x.mean(dim=axes, keepdim=keep)


def _cast(attributes: dict, constants: dict, inputs: list[str]):
    if attributes["to"] not in (1, 10, 11, 16):  # FLOAT, FLOAT16, DOUBLE, BFLOAT16
        raise ValueError(f"Cast to type {attributes['to']} is not supported: only casts between floats are.")
    return lambda x: x  # the module has one dtype


def _plain(function: Callable[..., Tensor]):
    return lambda attributes, constants, inputs: function


_OPS: dict[str, Callable[[dict, dict, list[str]], Callable[..., Tensor]]] = {
    "Add": _plain(torch.add),
    "AveragePool": _pool(F.avg_pool2d, 0.0),
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Conv": _conv,
    "Div": _plain(torch.div),
    "Dropout": _plain(lambda x, *_: x),
    "Flatten": lambda attributes, *_: lambda x: torch.flatten(x, attributes.get("axis", 1)),
    "Gemm": _gemm,
    "GlobalAveragePool": _plain(lambda x: x.mean(dim=(2, 3), keepdim=True)),
    "Identity": _plain(lambda x: x),
    "LeakyRelu": lambda attributes, *_: lambda x: F.leaky_relu(x, attributes.get("alpha", 0.01)),
    "MatMul": _plain(torch.matmul),
    "MaxPool": _pool(F.max_pool2d, float("-inf")),
    "Mul": _plain(torch.mul),
    "PRelu": _plain(lambda x, slope: F.prelu(x, slope.reshape(-1))),
    "ReduceMean": _reduce_mean,
    "Relu": _plain(F.relu),
    "Reshape": _reshape,
    "Sigmoid": _plain(torch.sigmoid),
    "Sub": _plain(torch.sub),
    "Transpose": lambda attributes, *_: lambda x: x.permute(*attributes["perm"]),
}
