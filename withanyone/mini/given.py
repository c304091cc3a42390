"""People given by their faces while the base learns: what a FLUX of this size needs to draw somebody at all.

A base that only ever saw captions draws faces in general; no adapter can then make a frozen base of a few
million numbers draw one in particular. So in a part of the base's batches every person is given by the face
in the picture itself, through an adapter that learns along. In the other batches no face is given, which is
what the base does without an adapter. The phases of `train/` go on with this adapter on the frozen base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import SiglipVisionModel

from withanyone import FaceAdapter, slider_scales
from withanyone.arcface import Recognizer, align_face
from withanyone.conditioning import FaceConditioning
from withanyone.layout import token_mask

from .latents import to_tensor
from .pictures import Bucket, read_shard
from .vision import face_crop

INNER_DIM = 256
SIMILARITY = (0.9, 1.1)
CORNER_SHARE = 0.6  # samples at diversity 0 or 1, one branch alone
NOISE = 0.02  # of a face's height: boxes and landmarks are moved as a detector's are


@dataclass(frozen=True)
class FaceModels:
    """What turns a photo of a face into the adapter's input, frozen."""

    recognizer: Recognizer
    image_encoder: SiglipVisionModel

    @classmethod
    def from_pretrained(cls, folder: Path, device: torch.device | str = "cpu") -> FaceModels:
        """The pipeline folder's own recogniser and image encoder, in fp32."""
        recognizer = Recognizer.from_onnx(folder / "face_analyzer" / "recognition.onnx").eval()
        encoder = SiglipVisionModel.from_pretrained(folder / "image_encoder", dtype=torch.float32).eval()
        return cls(recognizer.requires_grad_(False).to(device), encoder.requires_grad_(False).to(device))


def new_adapter(transformer: FluxTransformer2DModel, image_feature_dim: int) -> FaceAdapter:
    """An untrained adapter that fits `transformer`."""
    config = transformer.config
    return FaceAdapter(
        hidden_size=config.num_attention_heads * config.attention_head_dim,
        num_blocks=config.num_layers + config.num_single_layers,
        inner_dim=INNER_DIM,
        image_feature_dim=image_feature_dim,
    )


@torch.no_grad()
def encode_faces(path: Path, cache: Path, models: FaceModels) -> dict[str, Tensor]:
    """Faces of a picture shard as the adapter takes them, kept in `cache`.

    `embeddings` (N, P, 512) fp16, `features` (N, P, 49, 128) fp16, `bboxes` (N, P, 4) fp32 and `count` (N,),
    P the most people of a picture.
    """
    kept = cache / f"faces_{path.name}"
    if not kept.exists():
        shard, _ = read_shard(path, "pixels", "bboxes", "kps", "identities")
        rng = np.random.default_rng((int(path.stem.split("_")[1]), 0xFACE))
        count = (shard["identities"] >= 0).sum(axis=1)
        most = max(1, int(count.max()))
        rows, places = np.nonzero(np.arange(most)[None] < count[:, None])
        embeddings, features = [], []
        for start in range(0, len(rows), 50):
            crops, aligned = [], []
            for row, place in zip(rows[start : start + 50], places[start : start + 50], strict=True):
                image, bbox, kps = (shard[name][row] for name in ("pixels", "bboxes", "kps"))
                bbox, kps = bbox[place], kps[place]
                height = bbox[3] - bbox[1]
                crops.append(face_crop(image, bbox + rng.normal(0, NOISE * height, 4)))
                moved = torch.from_numpy(kps + rng.normal(0, NOISE * height, kps.shape).astype(np.float32))
                aligned.append(align_face(to_tensor(image[None]), moved[None]))
            device = models.image_encoder.device
            embeddings.append(models.recognizer(torch.cat(aligned).to(device)).half().cpu())
            seen = models.image_encoder(to_tensor(np.stack(crops)).to(device)).last_hidden_state
            features.append(seen.half().cpu())
        found = {"embeddings": torch.cat(embeddings), "features": torch.cat(features)}
        tensors = {}
        for name, values in found.items():
            tensors[name] = values.new_zeros(len(count), most, *values.shape[1:])
            tensors[name][rows, places] = values
        tensors["bboxes"] = torch.from_numpy(shard["bboxes"][:, :most].copy())
        tensors["count"] = torch.from_numpy(count)
        cache.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(".partial")
        save_file(tensors, partial)
        partial.replace(kept)
    with safe_open(kept, framework="pt") as file:
        return {name: file.get_tensor(name) for name in ("embeddings", "features", "bboxes", "count")}


@dataclass(frozen=True)
class GivenFaces:
    """The people of a batch, F the most of a picture: arguments of `FaceAdapter.encode_masked`.

    Embeddings and features lie where the models are, the rest on the CPU.
    """

    embeddings: Tensor  # (B, F, 512)
    features: Tensor  # (B, F, 49, 128)
    face_mask: Tensor  # (B, T, F) bool, of `token_mask`
    count: list[int]  # of B pictures
    kps: Tensor  # (B, F, 5, 2): true landmarks, zeros where nobody is

    @classmethod
    def of_rows(cls, shard: Mapping[str, Tensor], rows: Sequence[int]) -> GivenFaces:
        """Pictures `rows` of a shard's `faces_of_shard`."""
        index = torch.as_tensor(rows)
        count = shard["count"][index].tolist()
        most = max(1, *count)
        there = index.to(shard["embeddings"].device)
        embeddings, features = (shard[name][there][:, :most].float() for name in ("embeddings", "features"))
        face_mask, kps = shard["face_mask"][index][..., :most], shard["kps"][index][:, :most]
        return cls(embeddings, features, face_mask, count, kps)

    def encode(self, adapter: FaceAdapter, scales: tuple[Tensor, Tensor] | None = None) -> FaceConditioning:
        """The conditioning at `scales` (id_scale, siglip_scale), (B,) each; None: the pipeline's default."""
        id_scale, siglip_scale = scales or (None, None)
        return adapter.encode_masked(
            self.embeddings, self.features, self.face_mask, self.count,
            id_scale=id_scale, siglip_scale=siglip_scale,
        )  # fmt: skip


def faces_of_shard(
    path: Path, cache: Path, models: FaceModels, kps: np.ndarray, bucket: Bucket
) -> dict[str, Tensor]:
    """What `GivenFaces.of_rows` takes of a picture shard: `encode_faces`, landmarks `kps` (N, P, 5, 2) and
    `face_mask` (N, T, P) bool, the tokens under each face; what is large lies where the models are."""
    faces = encode_faces(path, cache, models)
    most = faces["bboxes"].shape[1]
    boxes = [
        rows[:number] for rows, number in zip(faces["bboxes"].tolist(), faces["count"].tolist(), strict=True)
    ]
    mask = token_mask(boxes, bucket.height, bucket.width)
    device = models.image_encoder.device
    return {
        **faces,
        "embeddings": faces["embeddings"].to(device),
        "features": faces["features"].to(device),
        "kps": torch.from_numpy(kps)[:, :most],
        "face_mask": F.pad(mask, (0, most - mask.shape[-1])),
    }


def draw_scales(batch_size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """(id_scale, siglip_scale), (B,) each: random places of the two sliders, all of them seen."""
    pairs = []
    for similarity, corner, side, between in zip(
        rng.uniform(*SIMILARITY, batch_size), *rng.random((3, batch_size)), strict=True
    ):
        pairs.append(slider_scales(similarity, float(side < 0.5) if corner < CORNER_SHARE else between))
    id_scale, siglip_scale = torch.tensor(pairs).T
    return id_scale, siglip_scale


# How a face looks


def perceptual_loss(recognizer: Recognizer, pictures: Tensor, targets: Tensor, kps: Tensor) -> Tensor:
    """How far faces are from their targets as a recogniser sees them, part by part and as a whole: ().

    A perceptual loss on clean estimates (as arXiv 2411.04873 has by the decoder), by the network that tells
    people apart: of each feature map the squared distance in units of the targets' variance, of the embedding
    1 - cos; the mean of all.

    pictures, targets: (K, 3, H, W) in [-1, 1]; one face of each is looked at, at landmarks kps (K, 5, 2).
    """
    maps, embeddings = recognizer.hidden_states(align_face(pictures, kps))
    with torch.no_grad():
        target_maps, target_embeddings = recognizer.hidden_states(align_face(targets, kps))
    losses = [1 - F.cosine_similarity(embeddings.float(), target_embeddings.float(), dim=-1).mean()]
    for found, wanted in zip(maps, target_maps, strict=True):
        found, wanted = found.float(), wanted.float()
        variance = wanted.var(dim=(0, 2, 3), keepdim=True)
        losses.append(((found - wanted).square() / (variance + 1e-3 * variance.mean())).mean())
    return torch.stack(losses).mean()
