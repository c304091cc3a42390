"""Faces in photos: finding them and recognising them.

`FaceAnalyzer` runs a folder of insightface ONNX models (`antelopev2`, `buffalo_l`, or a pack of one's own in
the same format) and is a component of the pipeline. Images are RGB at this module's border; what insightface
wants (BGR) stays inside. This is the only module that imports insightface and onnxruntime.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import os
import shutil
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from PIL import Image

# diffusers loads a component of ours if a base class that it knows is visible in the component's module.
from transformers import FeatureExtractionMixin

from .photos import ImageSource, load_image

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Face:
    """One face found in a photo; coordinates are pixels of that photo.

    Attributes:
        bbox: (4,) float32, x1, y1, x2, y2, as the detector gave it (it may reach over the photo's edge).
        kps: (5, 2) float32: left eye, right eye, nose, left and right mouth corner as seen in the photo.
        det_score: the detector's confidence in [0, 1].
        embedding: (512,) float32, the recogniser's raw output: the adapter was trained with it unnormalised.
        face_crop: the square crop that the image encoder sees.
    """

    bbox: np.ndarray
    kps: np.ndarray
    det_score: float
    embedding: np.ndarray
    face_crop: Image.Image

    @property
    def normed_embedding(self) -> np.ndarray:
        """(512,) the embedding at length 1: the dot product of two is their cosine similarity."""
        return self.embedding / np.linalg.norm(self.embedding)


def crop_face(image: Image.Image, bbox: Sequence[float], size: int) -> Image.Image:
    """The square crop the released models were trained on, `size` x `size`.

    The box is cut to whole pixels, its shorter side widened to the longer on both sides, without a margin,
    clipped to the photo, and resized by Lanczos.
    """
    x1, y1, x2, y2 = (int(v) for v in bbox)
    wider = (y2 - y1) - (x2 - x1)
    if wider > 0:
        x1, x2 = x1 - wider // 2, x2 + wider - wider // 2
    else:
        y1, y2 = y1 - (-wider) // 2, y2 + (-wider) - (-wider) // 2
    box = (max(0, x1), max(0, y1), min(image.width, x2), min(image.height, y2))
    return image.crop(box).resize((size, size), Image.Resampling.LANCZOS)


# ----------------------------------------------------------------------------------------------------------
# The analyser
# ----------------------------------------------------------------------------------------------------------

CONFIG_NAME = "face_analyzer.json"

_WHERE_TO_GET = (
    "insightface's own packs (antelopev2, buffalo_l) are at "
    "https://github.com/deepinsight/insightface/releases/tag/model-zoo, for non-commercial research only: "
    "unpack one and give its folder."
)


class FaceAnalyzer(FeatureExtractionMixin):
    """Finds faces in photos and recognises them, with a folder of insightface ONNX models.

    Args:
        folder: holds `*.onnx`: a detector in SCRFD's output layout with five key points, and a recogniser
            (square input, one output of 512 numbers). Other models of a pack are not kept in memory.
        det_size: (width, height) in multiples of 32 to which a photo is scaled for the detector; or several
            such sizes, tried in order until one finds a face (a face that fills the photo is found at a
            smaller size more easily). The released models were used with 640 x 640.
        det_thresh: detections of a lower score are dropped; 0.4 as released.
        crop_size: side of `Face.face_crop` in pixels; 512 as released.
        enlarge: whether photos smaller than `det_size` are enlarged to it, as insightface does. False leaves
            them at their own scale, for detectors trained on small pictures.
        pack: name of the models, for logs and tables; by default the folder's name.
        providers: onnxruntime's execution providers in order of preference; by default CUDA or CoreML where
            the installed onnxruntime offers it, else the CPU.

    May be called from several threads.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        det_size: Sequence[int] | Sequence[Sequence[int]] = ((640, 640), (320, 320)),
        det_thresh: float = 0.4,
        crop_size: int = 512,
        enlarge: bool = True,
        pack: str | None = None,
        providers: Sequence[str] | None = None,
    ):
        super().__init__()
        self.folder = _find_models(Path(folder))
        self.det_size = _check_det_size(det_size)
        if not 0 < det_thresh < 1:
            raise ValueError(f"`det_thresh` is {det_thresh}: give a number between 0 and 1.")
        if not isinstance(crop_size, int) or crop_size < 1:
            raise ValueError(f"`crop_size` is {crop_size!r}: give a positive number of pixels.")
        self.det_thresh = float(det_thresh)
        self.crop_size = crop_size
        self.enlarge = bool(enlarge)
        self.pack = pack or self.folder.name
        self._lock = threading.Lock()
        self._detector, self._recognizer = _load_models(self.folder, providers)

    def __repr__(self) -> str:
        return f"FaceAnalyzer({self.pack!r}, folder={str(self.folder)!r}, {self._settings()})"

    def _settings(self) -> dict:
        return {
            "pack": self.pack,
            "det_size": [list(size) for size in self.det_size],
            "det_thresh": self.det_thresh,
            "crop_size": self.crop_size,
            "enlarge": self.enlarge,
        }

    @property
    def providers(self) -> list[str]:
        """The execution providers that are active, in order (not merely the installed ones)."""
        return self._recognizer.session.get_providers()

    @property
    def detection_path(self) -> Path:
        return Path(self._detector.model_file)

    @property
    def recognition_path(self) -> Path:
        """The recogniser's ONNX file; `arcface.Recognizer.from_onnx` makes a torch module of it."""
        return Path(self._recognizer.model_file)

    def detect(self, image: ImageSource, max_faces: int | None = None) -> list[Face]:
        """Find and recognise the faces of a photo, largest first; [] where there are none.

        Args:
            image: anything that `load_image` reads; RGB.
            max_faces: keep the largest ones only.
        """
        if max_faces is not None and max_faces < 1:
            raise ValueError(f"`max_faces` is {max_faces}: give at least 1, or None for all faces.")
        image = load_image(image, "image")
        bgr = np.ascontiguousarray(np.asarray(image)[:, :, ::-1])  # (H, W, 3)
        with self._lock:
            bboxes, kps = self._find(bgr)  # (n, 5), (n, 5, 2)
            x1, y1, x2, y2 = bboxes[:, :4].T
            width = np.minimum(x2, image.width) - np.maximum(x1, 0)
            height = np.minimum(y2, image.height) - np.maximum(y1, 0)
            inside = (width >= 1) & (height >= 1)
            order = np.argsort(-((x2 - x1) * (y2 - y1)), kind="stable")
            order = order[inside[order]][:max_faces]
            aligned = [self._norm_crop(bgr, kps[i]) for i in order]
            embeddings = self._recognize(aligned)  # (n, 512)
        return [
            Face(
                bbox=bboxes[i, :4].astype(np.float32),
                kps=kps[i].astype(np.float32),
                det_score=float(bboxes[i, 4]),
                embedding=embedding,
                face_crop=crop_face(image, bboxes[i, :4], self.crop_size),
            )
            for i, embedding in zip(order, embeddings, strict=True)
        ]

    def largest_face(self, image: ImageSource, name: str = "photo") -> Face:
        """The largest face of a photo of one person; says so in the log where there are several.

        Raises:
            ValueError: if there is no face; names the photo by `name`.
        """
        label = f"`{name}`" + (f" ({os.fspath(image)})" if isinstance(image, (str, os.PathLike)) else "")
        image = load_image(image, name)
        faces = self.detect(image)
        if not faces:
            raise ValueError(
                f"{label}: no face found in the {image.width} x {image.height} photo: give a photo in which "
                "the face is seen from the front or half from the side, sharp, lit, and not cut off "
                f"(models: {self.pack})."
            )
        if len(faces) > 1:
            box = [round(float(v)) for v in faces[0].bbox]
            logger.warning("%s shows %d faces: the largest is taken, at %s.", label, len(faces), box)
        return faces[0]

    def align(self, image: ImageSource, kps: np.ndarray) -> np.ndarray:
        """(112, 112, 3) uint8 RGB: the face with landmarks `kps` (5, 2), warped to ArcFace's template."""
        rgb = np.asarray(load_image(image, "image"))
        kps = np.asarray(kps, dtype=np.float32)
        if kps.shape != (5, 2) or not np.isfinite(kps).all():
            raise ValueError(f"`kps` has shape {kps.shape}: give five finite points, (5, 2).")
        with self._lock:
            return self._norm_crop(rgb, kps)

    def embed(self, aligned_faces: Sequence[np.ndarray]) -> np.ndarray:
        """(N, 512) float32 raw embeddings of faces as `align` gives them, each (112, 112, 3) uint8 RGB."""
        faces = [np.asarray(face) for face in aligned_faces]
        size = self._recognizer.input_size[0]
        for i, face in enumerate(faces):
            if face.shape != (size, size, 3) or face.dtype != np.uint8:
                raise ValueError(
                    f"`aligned_faces[{i}]` is {face.dtype} of shape {face.shape}: give uint8 ({size}, "
                    f"{size}, 3), RGB."
                )
        with self._lock:
            return self._recognize([face[:, :, ::-1] for face in faces])

    def _find(self, bgr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n, 5) boxes with scores, (n, 5, 2) key points, at the first detection size that finds a face."""
        height, width = bgr.shape[:2]
        for size in self.det_size:
            photo = bgr
            if not self.enlarge and width <= size[0] and height <= size[1]:
                # Own scale: insightface scales the photo to fit the canvas, so make both of one size.
                size = (-(-width // 32) * 32, -(-height // 32) * 32)
                photo = np.zeros((size[1], size[0], 3), np.uint8)
                photo[:height, :width] = bgr
            bboxes, kps = self._detector.detect(photo, input_size=size, det_thresh=self.det_thresh)
            if len(bboxes):
                return bboxes, kps
        return np.empty((0, 5), np.float32), np.empty((0, 5, 2), np.float32)

    def _norm_crop(self, image: np.ndarray, kps: np.ndarray) -> np.ndarray:
        """insightface's similarity warp to the template, at the recogniser's input size."""
        from insightface.utils import face_align

        with warnings.catch_warnings():  # insightface 2.1 calls a method that scikit-image has renamed
            warnings.simplefilter("ignore", FutureWarning)
            return face_align.norm_crop(image, kps.astype(np.float32), self._recognizer.input_size[0])

    def _recognize(self, aligned: list[np.ndarray]) -> np.ndarray:
        """(N, 512) from N aligned BGR faces."""
        if not aligned:
            return np.empty((0, 512), np.float32)
        fixed_batch = isinstance(self._recognizer.input_shape[0], int)
        step = 1 if fixed_batch else len(aligned)
        parts = [self._recognizer.get_feat(aligned[i : i + step]) for i in range(0, len(aligned), step)]
        return np.concatenate(parts).astype(np.float32)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Copy the two models in use, and the settings as `face_analyzer.json`, into a folder."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        sources = (self.detection_path, self.recognition_path)
        others = {path.name for path in folder.glob("*.onnx")} - {source.name for source in sources}
        if others and not folder.samefile(self.folder):
            raise ValueError(
                f"`save_directory` {folder} holds other models ({sorted(others)}), which would be taken for "
                "these: give another folder, or delete them."
            )
        for source in sources:
            target = folder / source.name
            if not (target.exists() and target.samefile(source)):
                shutil.copyfile(source, target)
        (folder / CONFIG_NAME).write_text(json.dumps(self._settings(), indent=2) + "\n")
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        **settings,
    ) -> FaceAnalyzer:
        """Load from a folder (one written by `save_pretrained`, or an unpacked insightface pack) or a Hub id.

        `settings` (see the class) override what the folder's `face_analyzer.json` says.
        """
        folder = Path(pretrained_model_name_or_path).expanduser()
        if not folder.is_dir():
            folder = _download(
                str(pretrained_model_name_or_path), subfolder, revision, token, cache_dir, local_files_only
            )
        if subfolder:
            folder = folder / subfolder
        saved = {}
        if (folder / CONFIG_NAME).is_file():
            saved = _read_config(folder / CONFIG_NAME)
        return cls(folder, **{**saved, **settings})


def _check_det_size(det_size: Sequence[int] | Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    sizes = list(det_size) if isinstance(det_size, Sequence) else []
    sizes = [sizes] if sizes and not isinstance(sizes[0], Sequence) else sizes
    for size in sizes:
        if not isinstance(size, Sequence) or len(size) != 2 or any(v < 32 or v % 32 for v in size):
            sizes = []
            break
    if not sizes:
        raise ValueError(
            f"`det_size` is {det_size}: give (width, height), or several such, in multiples of 32."
        )
    return tuple((int(width), int(height)) for width, height in sizes)


def _read_config(path: Path) -> dict:
    known = {"pack", "det_size", "det_thresh", "crop_size", "enlarge"}
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): save the analyser again.") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"{path} holds a {type(config).__name__}, not settings by name: save the analyser again."
        )
    unknown = set(config) - known
    if unknown:
        raise ValueError(f"{path} has unknown settings {sorted(unknown)}: known are {sorted(known)}.")
    return config


def _download(repo_id, subfolder, revision, token, cache_dir, local_files_only) -> Path:
    if repo_id.count("/") != 1 or repo_id.startswith((".", "/", "~")):
        raise ValueError(f"`{repo_id}` is neither a folder nor a Hub id (owner/name). {_WHERE_TO_GET}")
    prefix = f"{subfolder}/" if subfolder else ""
    try:
        return Path(
            snapshot_download(
                repo_id,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=[f"{prefix}*.onnx", f"{prefix}*.json"],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"`{repo_id}` is no folder here, and could not be had from the Hub ({error}). {_WHERE_TO_GET}"
        ) from error


def _find_models(folder: Path) -> Path:
    """The folder that holds the ONNX files: `folder`, or the one that an archive unpacked into it.

    antelopev2's archive unpacks to antelopev2/antelopev2.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        raise ValueError(f"`{folder}` is not a folder. {_WHERE_TO_GET}")
    for candidate in (folder, folder / folder.name, folder / "antelopev2", folder / "buffalo_l"):
        if any(candidate.glob("*.onnx")):
            return candidate
    raise ValueError(
        f"`{folder}` holds no *.onnx file: a detection and a recognition model are needed. {_WHERE_TO_GET}"
    )


def _load_models(folder: Path, providers: Sequence[str] | None):
    """insightface's detector and recogniser over the ONNX files of `folder`."""
    import onnxruntime

    available = onnxruntime.get_available_providers()
    unknown = [p for p in providers or () if p not in available]
    if unknown:
        raise ValueError(
            f"`providers` has {unknown}, which the installed onnxruntime does not offer: it has {available}. "
            "For CUDA install onnxruntime-gpu in place of onnxruntime."
        )
    files = sorted(folder.glob("*.onnx"))
    for file in files:
        if file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs"):
            raise ValueError(f"{file} is a Git LFS pointer, not the model itself: run `git lfs pull`.")
    app = _insightface(folder, [file.name for file in files], providers)
    if "recognition" not in app.models:
        raise ValueError(
            f"`{folder}` has no recognition model among {[f.name for f in files]}: a recogniser with a "
            f"square input and one output is needed. {_WHERE_TO_GET}"
        )
    detector, recognizer = app.det_model, app.models["recognition"]
    if not getattr(detector, "use_kps", False):
        raise ValueError(
            f"{detector.model_file} gives no key points: a detector with five key points is needed."
        )
    active = recognizer.session.get_providers()
    wanted = list(providers or [p for p in ("CUDAExecutionProvider",) if p in available] or active)
    if wanted[0] == active[0]:
        logger.info("Face models of %s run on %s (onnxruntime offers %s).", folder, active, available)
    else:  # onnxruntime falls back to the CPU by itself, where a CUDA library is missing, say
        logger.warning(
            "Face models of %s run on %s, not on %s, which did not start.", folder, active, wanted[0]
        )
    return detector, recognizer


def _insightface(folder: Path, files: list[str], providers: Sequence[str] | None):
    """insightface's FaceAnalysis over `folder`; what it prints goes to the log."""
    import onnxruntime
    from google.protobuf.message import DecodeError
    from insightface.app import FaceAnalysis
    from onnxruntime.capi import onnxruntime_pybind11_state as ort

    damage = (ort.InvalidProtobuf, ort.InvalidGraph, ort.Fail, ort.InvalidArgument, ort.NotImplemented)
    options = onnxruntime.SessionOptions()
    # Threads that wait for the next call sleep instead of taking processor time from torch.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            app = FaceAnalysis(
                name=str(folder),
                allowed_modules=["detection", "recognition"],
                providers=list(providers) if providers else None,
                sess_options=options,
            )
    except (AssertionError, KeyError) as error:
        raise ValueError(
            f"`{folder}` has no detection model among {files}: a detector in SCRFD's layout is needed. "
            f"{_WHERE_TO_GET}"
        ) from error
    except (*damage, DecodeError) as error:
        raise ValueError(
            f"`{folder}` has a damaged model among {files} ({error}): copy or download it again."
        ) from error
    for line in printed.getvalue().splitlines():
        logger.debug("insightface: %s", line)
    return app
