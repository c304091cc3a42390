"""The parts that are not trained: pixels to latents and back, captions and face crops to embeddings."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from withanyone import WithAnyonePipeline, flow
from withanyone.arcface import Recognizer
from withanyone.precision import computes_bfloat16, dtype_name

from .cache import TensorCache, module_stamp
from .config import TrainConfig
from .examples import Batch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NEEDED = ("image_encoder", "feature_extractor", "face_analyzer")


def precision_of(config: TrainConfig) -> tuple[str, torch.dtype]:
    """`mixed_precision` and `frozen_dtype` on this machine: `auto` is bfloat16 where that is worth it."""
    device = "cpu" if config.cpu or not torch.cuda.is_available() else "cuda"
    mixed = config.mixed_precision
    if mixed == "auto":
        mixed = "bf16" if computes_bfloat16(device) else "no"
    return mixed, DTYPES[dtype_name(config.frozen_dtype, device)]


def load_pipeline(config: TrainConfig) -> WithAnyonePipeline:
    """The pipeline of `config.pretrained` without its adapter; the VAE in full precision."""
    dtype = precision_of(config)[1]
    return WithAnyonePipeline.from_pretrained(
        config.pretrained, face_adapter=None, dtype={"default": dtype, "vae": torch.float32}
    )


class FrozenParts:
    """A pipeline's frozen parts on one device, and what training asks of them.

    With `cache_latents` and `cache_text` what was computed once is kept on disk, under the networks' own
    stamps.
    """

    def __init__(self, pipeline: WithAnyonePipeline, config: TrainConfig, device: torch.device) -> None:
        for name in NEEDED:
            if getattr(pipeline, name) is None:
                raise ValueError(f"`pretrained` {config.pretrained!r} has no `{name}`, which training needs.")
        self.pipeline, self.config, self.device = pipeline, config, device
        dtype = precision_of(config)[1]
        for name in ("transformer", "text_encoder", "text_encoder_2", "image_encoder", "vae"):
            # the VAE in full precision: its rounding would be part of the target
            part_dtype = torch.float32 if name == "vae" else dtype
            part = getattr(pipeline, name).to(device).eval().requires_grad_(False)
            if part.dtype != part_dtype:
                part.to(part_dtype)
        if config.gradient_checkpointing:
            pipeline.transformer.enable_gradient_checkpointing()
        self.recognizer = None
        if config.uses_identity_losses:
            self.recognizer = Recognizer.from_onnx(pipeline.face_analyzer.recognition_path)
            self.recognizer.to(device).eval().requires_grad_(False)
        self._text: OrderedDict[tuple[str, int], tuple[Tensor, Tensor]] = OrderedDict()
        self._latents = self._texts = None
        if config.cache_latents:
            self._latents = TensorCache(Path(config.cache_path) / f"latents_{module_stamp(pipeline.vae)}")
        if config.cache_text:
            stamp = module_stamp(pipeline.text_encoder, pipeline.text_encoder_2)
            self._texts = TensorCache(Path(config.cache_path) / f"text_{stamp}")

    # --- pictures ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor, keys: Sequence[str] = ()) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] as packed latents (B, N, C): the distribution's mode.

        `keys` (B) name the pictures in the cache on disk.
        """
        if self._latents is None:
            return self._encode_pixels(pixels)
        kept = [self._latents.get(key) for key in keys]
        missing = [i for i, entry in enumerate(kept) if entry is None]
        if missing:
            for i, latents in zip(missing, self._encode_pixels(pixels[missing]), strict=True):
                kept[i] = {"latents": latents}
                self._latents.put(keys[i], kept[i])
        return torch.stack([entry["latents"].to(pixels.device) for entry in kept])

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        vae = self.pipeline.vae
        latents = vae.encode(pixels.to(vae.dtype)).latent_dist.mode()
        latents = (latents.float() - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
        return self.pipeline._pack_latents(latents, *latents.shape)

    def decode(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Packed latents (B, N, C) as pictures (B, 3, H, W), with gradients."""
        return self.pipeline.decode_latents(latents, height, width)

    @property
    def pixels_per_token(self) -> int:
        return 2 * self.pipeline.vae_scale_factor

    def mu(self, height: int, width: int) -> float:
        """The schedule's shift at this size, by `timestep_shift`."""
        if self.config.timestep_shift == "none":
            return 0.0
        scheduler = self.pipeline.scheduler.config
        return flow.shift_mu(
            height,
            width,
            self.config.timestep_shift,
            pixels_per_token=self.pixels_per_token,
            base_seq_len=scheduler.get("base_image_seq_len", 256),
            max_seq_len=scheduler.get("max_image_seq_len", 4096),
            base_shift=scheduler.get("base_shift", 0.5),
            max_shift=scheduler.get("max_shift", 1.15),
        )

    def image_ids(self, height: int, width: int, dtype: torch.dtype) -> Tensor:
        """Where each image token stands: (N, 3)."""
        side = self.pixels_per_token
        return self.pipeline._prepare_latent_image_ids(1, height // side, width // side, self.device, dtype)

    # --- captions ----------------------------------------------------------------------------------------

    def text_length(self, prompts: list[str]) -> int:
        """Text tokens of a batch: the full length, or the first of `text_lengths` that holds every
        caption."""
        tokenizer = self.pipeline.tokenizer_2
        full = min(512, tokenizer.model_max_length)
        if not self.config.text_lengths:
            return full
        longest = max(len(ids) for ids in tokenizer(prompts).input_ids)
        return min((n for n in self.config.text_lengths if n >= longest), default=full)

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """(B, L, C) and pooled (B, C) embeddings; captions seen lately are kept in memory."""
        length = self.text_length(prompts)
        keys = [(prompt, length) for prompt in prompts]
        missing = [key for key in dict.fromkeys(keys) if key not in self._text]
        if missing:
            self._text.update(zip(missing, self._captions(missing), strict=True))
        rows = [self._text[key] for key in keys]
        for key in keys:
            self._text.move_to_end(key)
        while len(self._text) > self.config.text_cache_size:
            self._text.popitem(last=False)
        return torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])

    def _captions(self, keys: list[tuple[str, int]]) -> list[tuple[Tensor, Tensor]]:
        """Embeddings of captions, from disk where they are kept there."""
        kept = [self._texts.get(f"{n} {text}") if self._texts else None for text, n in keys]
        missing = [i for i, entry in enumerate(kept) if entry is None]
        if missing:
            embeds, pooled, _ = self.pipeline.encode_prompt(
                prompt=[keys[i][0] for i in missing],
                prompt_2=None,
                device=self.device,
                max_sequence_length=keys[0][1],
            )
            for row, i in enumerate(missing):
                kept[i] = {"embeds": embeds[row], "pooled": pooled[row]}
                if self._texts:
                    self._texts.put(f"{keys[i][1]} {keys[i][0]}", kept[i])
        return [(entry["embeds"].to(self.device), entry["pooled"].to(self.device)) for entry in kept]

    # --- face crops --------------------------------------------------------------------------------------

    def prepare_crops(self, crops: list) -> Tensor:
        """Face crops as the image encoder takes them: (K, 3, h, w)."""
        return self.pipeline.feature_extractor(crops, return_tensors="pt").pixel_values

    @torch.no_grad()
    def image_features(self, batch: Batch) -> Tensor | None:
        """(B, F, T, C) image features of the references; None where no sample uses the sig branch."""
        if not (batch.siglip_scale > 0).any():
            return None
        features = None if batch.features is None else batch.features.to(self.device)
        if batch.crop_pixels is None:
            return features
        encoder = self.pipeline.image_encoder
        fresh = encoder(
            batch.crop_pixels.to(self.device, encoder.dtype)
        ).last_hidden_state.float()  # (K, T, C)
        if features is None:
            features = fresh.new_zeros(*batch.face_mask.shape, *fresh.shape[1:])
        features[(batch.face_mask & batch.has_crops[:, None]).to(self.device)] = fresh
        return features
