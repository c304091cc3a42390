"""The bench's judges: face models, CLIP, an aesthetic score, and judges that know a world; each by name.

    pack:FOLDER             insightface pack (buffalo_l, antelopev2): finds the faces, and recognises them
    onnx:FILE               recogniser of aligned 112 px faces, RGB: ArcFace, AuraFace, ...
    adaface:FILE            the same, BGR, as AdaFace's released models
    facenet:FILE            FaceNet as ONNX: the box cut out at 160 px, RGB, no landmarks
    clip:FOLDER_OR_ID       CLIP-I and CLIP-T by transformers (released: openai/clip-vit-base-patch16)
    aesthetic:FOLDER        aesthetic-predictor-v2.5: SigLIP, and its head as head.safetensors
    module:attribute        a list of judges made by calling attribute() of an installed module

`NAME=` before any of these names it in results. Recognisers are averaged, as the paper averages ArcFace,
FaceNet and AdaFace; one named `coach` (the recogniser of training) is shown beside and never averaged. The
first pack finds the faces for all. A judge that cannot be loaded is absent: the result says so in a line of
its own, and its columns stay empty; nothing stands in for it.

FaceNet: facenet-pytorch, the library of the released evaluation, asks for torch < 2.3, numpy < 2 and
torchvision and is no longer kept, so its network comes as an ONNX file (`torch.onnx.export` of
InceptionResnetV1(pretrained="vggface2") from an environment of its own).
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.metadata
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from ..faces import Face, FaceAnalyzer

if TYPE_CHECKING:
    from .cases import Case

logger = logging.getLogger(__name__)

COACH = "coach"  # recogniser of this name: shown beside the judges, never averaged with them
#: The judges of the released evaluation, under the folder of `--judges-folder`.
PAPER = (
    "arcface=pack:buffalo_l",
    "facenet=facenet:facenet.onnx",
    "adaface=adaface:adaface.onnx",
    "clip:openai/clip-vit-base-patch16",
    "aesthetic:aesthetic-predictor-v2-5",
)
#: Sets of judges by name.
SETS: dict[str, tuple[str, ...]] = {"paper": PAPER, "mini": ("withanyone.mini.benching:judges",)}


# ---- what a judge is -------------------------------------------------------------------------------------


@runtime_checkable
class FaceJudge(Protocol):
    """A recogniser. `version` tells what exactly judged: kind, file, hash."""

    name: str
    version: dict[str, str]

    def embed(self, image: np.ndarray, faces: Sequence[Face]) -> np.ndarray:
        """(H, W, 3) uint8 RGB and its K faces -> (K, D) raw embeddings."""
        ...


@runtime_checkable
class PictureJudge(Protocol):
    """Scores whole pictures. `features` is computed once a picture and kept; `score` compares features."""

    name: str
    version: dict[str, str]
    metrics: tuple[str, ...]

    def features(self, image: Image.Image) -> np.ndarray:
        """(D,) of one picture."""
        ...

    def score(self, made: np.ndarray, target: np.ndarray | None, prompt: str) -> dict[str, float]:
        """Values of `metrics`; one that needs a target is left out where there is none."""
        ...


@dataclass(frozen=True)
class Truth:
    """What the world knows of one person of a case, as values by attribute.

    asked: what the prompt says; target: what the target shows; reference: what the photo shows.
    """

    asked: Mapping[str, str]
    target: Mapping[str, str]
    reference: Mapping[str, str]


@runtime_checkable
class AttributeJudge(Protocol):
    """Reads what a picture shows of each person, and knows what should be there."""

    name: str
    version: dict[str, str]
    world: str  # results of different worlds are never ranked together

    def read(self, image: np.ndarray, bboxes: Sequence[Sequence[float]]) -> list[dict[str, str]]:
        """Values by attribute for the person of every box."""
        ...

    def truth(self, case: Case) -> list[Truth] | None:
        """One a person; None for cases of another world."""
        ...


@dataclass(frozen=True)
class Finder:
    """The face detector that all judges use, and its version."""

    analyzer: FaceAnalyzer
    version: dict[str, str]


@dataclass
class Panel:
    """The judges of one run; `absent` has the reason for each that could not be loaded."""

    finder: Finder
    recognizers: list[FaceJudge] = field(default_factory=list)
    pictures: list[PictureJudge] = field(default_factory=list)
    attributes: list[AttributeJudge] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def scoring(self) -> list[str]:
        """Names of the recognisers that are averaged; the coach alone where there is no other."""
        names = [judge.name for judge in self.recognizers]
        return [name for name in names if name != COACH] or names

    def versions(self) -> dict[str, dict[str, str]]:
        """{name: version} of every judge, and of the detector as `finder`; {name: {"absent": why}}."""
        present = [*self.recognizers, *self.pictures, *self.attributes]
        out = {"finder": self.finder.version} | {judge.name: judge.version for judge in present}
        return out | {name: {"absent": why} for name, why in self.absent.items()}

    def fingerprint(self, *judges: str) -> str:
        """Hash of what decides the named judges' answers (all of them without names)."""
        versions = self.versions()
        chosen = {name: versions[name] for name in (judges or versions)}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


# ---- recognisers -----------------------------------------------------------------------------------------


def file_hash(path: str | Path) -> str:
    """First 16 hexadecimal digits of the file's SHA-256."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


class PackJudge:
    """The recogniser of a face pack; `finds`: the pack found the faces, so it has embedded them already."""

    def __init__(self, name: str, analyzer: FaceAnalyzer) -> None:
        self.name, self.analyzer, self.finds = name, analyzer, False
        path = analyzer.recognition_path
        self.version = {"kind": "pack", "pack": analyzer.pack, "file": path.name, "sha256": file_hash(path)}

    def embed(self, image: np.ndarray, faces: Sequence[Face]) -> np.ndarray:
        if self.finds:
            return np.array([face.embedding for face in faces], np.float32).reshape(-1, 512)
        return self.analyzer.embed([self.analyzer.align(image, face.kps) for face in faces])


def finder_of(analyzer: FaceAnalyzer) -> Finder:
    """A pack's detector, with its version."""
    path = analyzer.detection_path
    settings = {
        "det_size": str([list(size) for size in analyzer.det_size]),
        "det_thresh": str(analyzer.det_thresh),
        "enlarge": str(analyzer.enlarge),
    }
    version = {"kind": "detector", "pack": analyzer.pack, "file": path.name, "sha256": file_hash(path)}
    return Finder(analyzer, version | settings)


@dataclass(frozen=True)
class FaceInput:
    """What a recogniser's network is given: `aligned` by landmarks to ArcFace's template, or the box cut out;
    square pixels of `size`, (value - 127.5) / `scale`, channels turned to BGR or not."""

    aligned: bool
    size: int
    scale: float
    bgr: bool = False


INPUTS = {
    "onnx": FaceInput(aligned=True, size=112, scale=127.5),
    "adaface": FaceInput(aligned=True, size=112, scale=127.5, bgr=True),
    # facenet-pytorch: fixed_image_standardization (x - 127.5) / 128, the detector's box at 160 px, no margin
    "facenet": FaceInput(aligned=False, size=160, scale=128.0),
}


class OnnxJudge:
    """Any recogniser as an ONNX file: one picture in (B, 3, S, S) or (B, S, S, 3), one vector out."""

    def __init__(self, name: str, kind: str, path: Path, finder: FaceAnalyzer) -> None:
        self.name, self._input, self._finder = name, INPUTS[kind], finder
        self._session, self._channels_last = _open_onnx(path, self._input.size)
        self.version = {"kind": kind, "file": path.name, "sha256": file_hash(path)}

    def embed(self, image: np.ndarray, faces: Sequence[Face]) -> np.ndarray:
        rows = [self._run(self._square(image, face)) for face in faces]
        return np.stack(rows) if rows else np.empty((0, 1), np.float32)

    def _square(self, image: np.ndarray, face: Face) -> np.ndarray:
        """(S, S, 3) uint8 RGB of one face."""
        if self._input.aligned:
            return self._finder.align(image, face.kps)
        box = [float(value) for value in face.bbox]
        low = [max(0.0, box[0]), max(0.0, box[1])]
        high = [min(float(image.shape[1]), box[2]), min(float(image.shape[0]), box[3])]
        cut = Image.fromarray(image).resize(
            (self._input.size, self._input.size), Image.Resampling.BILINEAR, box=(*low, *high)
        )
        return np.asarray(cut)

    def _run(self, square: np.ndarray) -> np.ndarray:
        """(D,) of one square; one at a time, so that no face depends on its company."""
        pixels = square[:, :, ::-1] if self._input.bgr else square
        pixels = (pixels.astype(np.float32) - 127.5) / self._input.scale  # (S, S, 3)
        batch = pixels[None] if self._channels_last else np.moveaxis(pixels, 2, 0)[None]
        name = self._session.get_inputs()[0].name
        return self._session.run(None, {name: np.ascontiguousarray(batch)})[0].reshape(-1)


def _open_onnx(path: Path, size: int):
    """The session, and whether it takes channels last; ValueError for what is no recogniser of `size` px."""
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as ort

    if not path.is_file():
        raise ValueError(f"`{path}` is not a file: give the recogniser's ONNX file")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except (
        ort.InvalidProtobuf,
        ort.InvalidGraph,
        ort.Fail,
        ort.InvalidArgument,
        ort.NotImplemented,
    ) as error:
        raise ValueError(f"`{path}` is not a readable ONNX model ({error})") from error
    inputs, outputs = session.get_inputs(), session.get_outputs()
    shape = list(inputs[0].shape)
    if len(inputs) != 1 or len(outputs) < 1 or len(shape) != 4:
        raise ValueError(
            f"`{path}` has {len(inputs)} inputs, the first of shape {shape}: one picture is taken"
        )
    channels_last = shape[3] == 3
    sides = shape[1:3] if channels_last else shape[2:4]
    fixed = [side for side in sides if isinstance(side, int)]
    if (shape[1] != 3 and not channels_last) or any(side != size for side in fixed):
        raise ValueError(f"`{path}` takes pictures of shape {shape}: (B, 3, {size}, {size}) is needed")
    return session, channels_last


# ---- whole pictures --------------------------------------------------------------------------------------


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


class ClipJudge:
    """CLIP-I: cosine of the picture with the target; CLIP-T: cosine of the picture with the prompt."""

    metrics = ("clip_i", "clip_t")

    def __init__(self, name: str, where: str, device: str) -> None:
        import torch
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

        self.name, self._torch, self._device = name, torch, device
        self._model = CLIPModel.from_pretrained(where).eval().to(device)
        self._processor = CLIPImageProcessor.from_pretrained(where)
        self._tokenizer = CLIPTokenizerFast.from_pretrained(where)
        self._prompts: dict[str, np.ndarray] = {}
        self.version = _transformers_version("clip", where, self._model)

    def features(self, image: Image.Image) -> np.ndarray:
        pixels = self._processor(images=image, return_tensors="pt").pixel_values.to(self._device)
        with self._torch.no_grad():
            vision = self._model.vision_model(pixel_values=pixels).pooler_output
            return self._model.visual_projection(vision)[0].float().cpu().numpy()

    def _text(self, prompt: str) -> np.ndarray:
        if prompt not in self._prompts:
            length = self._model.config.text_config.max_position_embeddings
            words = self._tokenizer([prompt], truncation=True, max_length=length, return_tensors="pt")
            with self._torch.no_grad():
                text = self._model.text_model(**words.to(self._device)).pooler_output
                self._prompts[prompt] = self._model.text_projection(text)[0].float().cpu().numpy()
        return self._prompts[prompt]

    def score(self, made: np.ndarray, target: np.ndarray | None, prompt: str) -> dict[str, float]:
        out = {"clip_t": float(_unit(made) @ _unit(self._text(prompt)))}
        return out if target is None else {"clip_i": float(_unit(made) @ _unit(target))} | out


class AestheticJudge:
    """aesthetic-predictor-v2.5: SigLIP's pooled embedding at length 1 through linear layers; 1 to 10.

    FOLDER holds a SigLIP vision model of transformers (google/siglip-so400m-patch14-384) and
    `head.safetensors` with the released head's names, `scoring_head.0.weight`, `scoring_head.0.bias`,
    `scoring_head.2.weight` and so on (odd numbers are dropouts). The head is released as a pickle; convert it
    once, where that is allowed: `save_file(torch.load(file, weights_only=True), "head.safetensors")`.
    """

    metrics = ("aesthetic",)

    def __init__(self, name: str, where: str, device: str) -> None:
        import torch
        from safetensors.torch import load_file
        from transformers import SiglipImageProcessor, SiglipVisionModel

        self.name, self._torch, self._device = name, torch, device
        head = Path(where) / "head.safetensors"
        if not head.is_file():
            raise ValueError(f"`{where}` has no head.safetensors: the head of aesthetic-predictor-v2.5")
        self._model = SiglipVisionModel.from_pretrained(where).eval().to(device)
        self._processor = SiglipImageProcessor.from_pretrained(where)
        weights = {name.removeprefix("layers."): value.float() for name, value in load_file(head).items()}
        numbers = sorted({int(name.split(".")[1]) for name in weights if name.startswith("scoring_head.")})
        wanted = {f"scoring_head.{n}.{part}" for n in numbers for part in ("weight", "bias")}
        if not numbers or set(weights) != wanted:
            raise ValueError(
                f"`{head}` has the names {sorted(weights)}; scoring_head.N.weight|bias are needed"
            )
        self._layers = [
            (weights[f"scoring_head.{n}.weight"].to(device), weights[f"scoring_head.{n}.bias"].to(device))
            for n in numbers
        ]
        self.version = _transformers_version("aesthetic", where, self._model) | {"head": file_hash(head)}

    def features(self, image: Image.Image) -> np.ndarray:
        pixels = self._processor(images=image, return_tensors="pt").pixel_values.to(self._device)
        with self._torch.no_grad():
            hidden = self._model(pixel_values=pixels).pooler_output[0].float()
            hidden = hidden / hidden.norm()
            for weight, bias in self._layers:
                hidden = weight @ hidden + bias
        return hidden.cpu().numpy()  # (1,)

    def score(self, made: np.ndarray, target: np.ndarray | None, prompt: str) -> dict[str, float]:
        return {"aesthetic": float(made[0])}


def _transformers_version(kind: str, where: str, model: Any) -> dict[str, str]:
    """The model's name or folder, the Hub's commit or the weights' hash, and transformers' version."""
    commit = getattr(model.config, "_commit_hash", None)
    files = sorted(Path(where).glob("*.safetensors")) if Path(where).is_dir() else []
    exact = {"commit": str(commit)} if commit else {file.name: file_hash(file) for file in files}
    version = importlib.metadata.version("transformers")
    return {"kind": kind, "model": Path(where).name if files else where, "transformers": version} | exact


# ---- loading ---------------------------------------------------------------------------------------------

KINDS = ("pack", "onnx", "adaface", "facenet", "clip", "aesthetic")


@dataclass(frozen=True)
class Spec:
    """One judge as typed: `[NAME=]KIND:WHERE`."""

    name: str
    kind: str
    where: str

    @classmethod
    def parse(cls, text: str) -> Spec:
        """ValueError for what is none, with the kinds there are."""
        label, has_name, rest = text.partition("=")
        if ":" in label or not has_name:
            label, has_name, rest = "", "", text
        kind, colon, where = rest.partition(":")
        if not colon or not where or not kind:
            raise ValueError(
                f"`judges` has {text!r}: give NAME=KIND:WHERE with a kind of {', '.join(KINDS)}, "
                f"module:attribute, or one of the sets {', '.join(SETS)}."
            )
        if kind not in KINDS and "." not in kind:
            close = difflib.get_close_matches(kind, KINDS, 1)
            hint = f"Did you mean {close[0]!r}? " if close else ""
            raise ValueError(
                f"`judges` has {text!r} of the unknown kind {kind!r}. {hint}Available: {', '.join(KINDS)}, "
                "or module:attribute."
            )
        own = kind if kind in ("clip", "aesthetic") else Path(where).stem
        if "." in kind:
            own = rest  # a module's judges have names of their own; this one is for its absence
        return cls(label if has_name else own, kind, where)


def expand(specs: Sequence[str], folder: str | Path | None = None) -> list[str]:
    """Sets by their members; relative files and folders of the set `paper` under `folder`."""
    out: list[str] = []
    for text in specs:
        members = SETS.get(text)
        if members is None:
            out.append(text)
            continue
        for member in members:
            spec = Spec.parse(member)
            if folder is not None and spec.kind in KINDS:
                local = Path(folder) / (Path(spec.where).name if spec.kind == "clip" else spec.where)
                if spec.kind != "clip" or local.is_dir():
                    member = f"{spec.name}={spec.kind}:{local}"
            out.append(member)
    return out


def load_panel(
    specs: Sequence[str], *, device: str = "cpu", strict: bool = False, folder: str | Path | None = None
) -> Panel:
    """The judges that were named; one that cannot be loaded is absent, and said so in log and results.

    Raises:
        ValueError: a name that is none, two judges of one name, no pack that could find faces, no recogniser
            at all, or (with `strict`) an absent judge.
    """
    parsed = [Spec.parse(text) for text in expand(specs, folder)]
    absent: dict[str, str] = {}
    loaded: list[object] = []
    finder: Finder | None = None
    # Recognisers without a detector last: the first pack finds their faces.
    for spec in sorted(parsed, key=lambda spec: spec.kind in INPUTS):
        try:
            parts = _load(spec, finder, device)
        except (ValueError, OSError, ImportError) as error:
            absent[spec.name] = " ".join(str(error).split())
            continue
        for part in parts:
            if isinstance(part, Finder):
                finder = finder or part
            elif isinstance(part, Absent):
                absent[part.name] = part.reason
            else:
                loaded.append(part)
    for name, why in absent.items():
        logger.warning("judge %s is absent: %s", name, why)
    if strict and absent:
        raise ValueError(f"`judges`: {'; '.join(f'{name} is absent: {why}' for name, why in absent.items())}")
    if finder is None:
        raise ValueError(
            "`judges` has no face pack that could be loaded, so no face can be found: give pack:FOLDER, such "
            f"as insightface's buffalo_l. Absent: {absent or 'none'}."
        )
    panel = Panel(finder, absent=absent)
    for part in loaded:
        if isinstance(part, PackJudge):
            part.finds = part.analyzer is finder.analyzer
        if isinstance(part, AttributeJudge):
            panel.attributes.append(part)
        elif isinstance(part, PictureJudge):
            panel.pictures.append(part)
        elif isinstance(part, FaceJudge):
            panel.recognizers.append(part)
        else:
            raise ValueError(f"`judges`: {part!r} is no judge: see withanyone.bench.judges for what one has.")
    names = [part.name for part in (*panel.recognizers, *panel.pictures, *panel.attributes)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"`judges` has several of one name: {', '.join(twice)}; name them NAME=KIND:WHERE.")
    if not panel.recognizers:
        raise ValueError(f"`judges` has no recogniser that could be loaded; absent: {absent or 'none'}.")
    return panel


@dataclass(frozen=True)
class Absent:
    """A judge that a set offers but that is not there, and why."""

    name: str
    reason: str


def _load(spec: Spec, finder: Finder | None, device: str) -> list[object]:
    """The parts of one spec: a Finder and a judge of a pack, else one judge, or a module's list."""
    if spec.kind == "pack":
        analyzer = FaceAnalyzer.from_pretrained(spec.where)
        return [finder_of(analyzer), PackJudge(spec.name, analyzer)]
    if spec.kind == "clip":
        return [ClipJudge(spec.name, spec.where, device)]
    if spec.kind == "aesthetic":
        return [AestheticJudge(spec.name, spec.where, device)]
    if spec.kind in INPUTS:
        if finder is None:
            raise ValueError("it needs a face pack beside it to find the faces")
        return [OnnxJudge(spec.name, spec.kind, Path(spec.where).expanduser(), finder.analyzer)]
    module = importlib.import_module(spec.kind)
    if not hasattr(module, spec.where):
        raise ValueError(f"`judges`: the module {spec.kind} has no {spec.where!r}")
    return list(getattr(module, spec.where)())
