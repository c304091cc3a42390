"""WithAnyonePipeline: FLUX.1 with faces.

What happens in one call:

    pipe() -> check_* -> find_faces (FaceAnalyzer) -> encode_faces -> FaceAdapter.encode -> FluxPipeline()

The faces reach the transformer as an argument, `joint_attention_kwargs["ip_hidden_states"]`, read by the
hooks that `FaceAdapter.attach` put after its blocks when the pipeline was built. The denoising loop is
FluxPipeline's own, so all that it offers (LoRA, negative prompts, callbacks, offloading, quantised
transformers, step caches) works unchanged.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    ModelMixin,
)
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from diffusers.pipelines.flux import FluxPipelineOutput
from diffusers.utils.torch_utils import get_module_execution_device
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer, SiglipVisionModel, T5EncoderModel, T5TokenizerFast
from transformers.image_processing_utils import BaseImageProcessor

from . import flow, layout
from .adapter import CONDITIONING_KEY, FaceAdapter
from .candidates import CandidateSearch
from .faces import Face, FaceAnalyzer, ImageSource
from .loading import LoadingMixin

logger = logging.getLogger(__name__)

Person = ImageSource | Face | Sequence[ImageSource | Face]

# The released demo's settings; its code's, where the paper (arXiv 2510.14975) names none. height and width
# None: FluxPipeline's own, 1024 px with FLUX.1's VAE.
RELEASED_SAMPLING: dict[str, Any] = {
    "height": None,
    "width": None,
    "num_inference_steps": 25,
    "guidance_scale": 4.0,
    "true_cfg_scale": 1.0,
    "true_cfg_min_sigma": 0.0,
    "faces_in_negative": True,
    "id_scale": 0.0,
    "siglip_scale": 1.0,
    "num_candidates": 1,
}


OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def slider_scales(similarity: float = 1.0, diversity: float = 0.0) -> tuple[float, float]:
    """(id_scale, siglip_scale) of two sliders.

        siglip_scale = similarity * (1 - diversity),   id_scale = similarity * diversity

    `similarity` in [0, 1.5] is the faces' total strength. `diversity` in [0, 1] is the share of the branch
    that sees the identity alone: 0 keeps more of the photo ("resemblance in form"), 1 frees hair, make-up,
    expression and style ("resemblance in spirit"). At similarity 1 it is the released demo's one slider,
    s = 1 - diversity.
    """
    similarity = _number("similarity", similarity, 0.0, 1.5)
    diversity = _number("diversity", diversity, 0.0, 1.0)
    return similarity * diversity, similarity * (1.0 - diversity)


def combine_photos(embeddings: np.ndarray) -> tuple[np.ndarray, int]:
    """One embedding for several photos of one person, and the index of the most typical photo.

        embedding = mean|e_p| * m / |m|,   m = mean(e_p / |e_p|),   typical = argmax_p cos(e_p, m)

    embeddings: (P, D) raw. The identity is an embedding's direction, and what differs between photos of a
    person (pose, light, expression) averages out of the mean direction. Unit vectors are averaged, since
    the norm says how clear a photo is, lest one sharp photo outvote the rest; the mean then gets the
    photos' mean norm, because the adapter was trained on raw embeddings and never saw shorter ones. Image
    features cannot be averaged so (a token stands for a place in one crop, and places of two crops do not
    agree), and more tokens than one photo's would be new to the adapter too, so they come from one photo:
    the one nearest to the mean.

    A single photo's embedding is returned as it is.
    """
    if len(embeddings) == 1:
        return embeddings[0], 0
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)  # (P, 1)
    units = embeddings / norms  # (P, D)
    mean = units.mean(axis=0)  # (D,)
    length = np.linalg.norm(mean)
    if length < 1e-6:
        raise ValueError("the photos' embeddings cancel out: they show different people; give one person's.")
    return (norms.mean() * mean / length).astype(embeddings.dtype), int(np.argmax(units @ mean))


@dataclass
class WithAnyonePipelineOutput(FluxPipelineOutput):
    """`images` as in FluxPipelineOutput; `bboxes`: each person's (x1, y1, x2, y2) in output pixels."""

    bboxes: list[layout.BBox] | None = None


class WithAnyonePipeline(LoadingMixin, FluxPipeline):
    """Pictures of particular people from a prompt and their photos, on FLUX.1.

    Components beyond FluxPipeline's; None where a pipeline goes without:

        face_adapter       FaceAdapter; attached to the transformer when the pipeline is built
        face_analyzer      FaceAnalyzer; finds and recognises the faces of photos
        image_encoder      SiglipVisionModel; sees the face crops, for the adapter's sig branch
        feature_extractor  SigLIP's image processor; prepares the crops

    timestep_shift: the noise schedule that the weights were made for, "released" (the released demo's) or
    "flux" (FLUX.1's own). Without effect where the scheduler does not shift by size, as FLUX.1 [schnell]'s.
    sampling_defaults: what an argument of the call that is None means; keys as in RELEASED_SAMPLING, whose
    values fill the rest.
    The VAE may be any class with AutoencoderKL's interface.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->image_encoder->transformer->vae"
    # Kept on the device while layers come and go: the adapter works inside the transformer's forward,
    # SigLIP's pooling head (torch's MultiheadAttention) reads the weights of a layer that it never calls.
    _exclude_from_cpu_offload = ["face_adapter", "image_encoder"]
    _optional_components = ["image_encoder", "feature_extractor", "face_adapter", "face_analyzer"]

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL | ModelMixin,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        text_encoder_2: T5EncoderModel,
        tokenizer_2: T5TokenizerFast,
        transformer: FluxTransformer2DModel,
        image_encoder: SiglipVisionModel | None = None,
        feature_extractor: BaseImageProcessor | None = None,
        face_adapter: FaceAdapter | None = None,
        face_analyzer: FaceAnalyzer | None = None,
        timestep_shift: str = "released",
        sampling_defaults: dict | None = None,
    ):
        super().__init__(
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            transformer=transformer,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )
        if timestep_shift not in flow.TIMESTEP_SHIFTS:
            allowed = ", ".join(map(repr, flow.TIMESTEP_SHIFTS))
            raise ValueError(f"`timestep_shift` is {timestep_shift!r}; use one of {allowed}.")
        defaults = dict(sampling_defaults or {})
        if unknown := sorted(defaults.keys() - RELEASED_SAMPLING.keys()):
            raise ValueError(f"`sampling_defaults` has {unknown}; known are {sorted(RELEASED_SAMPLING)}.")
        self.register_modules(face_adapter=face_adapter, face_analyzer=face_analyzer)
        self.register_to_config(
            timestep_shift=timestep_shift, sampling_defaults={**RELEASED_SAMPLING, **defaults}
        )
        if face_adapter is not None and transformer is not None:
            patch, own = face_adapter.config.pixels_per_token, self.vae_scale_factor * 2
            if patch != own:
                raise ValueError(
                    f"The `face_adapter` has `pixels_per_token` {patch}, but with this `vae` an image token "
                    f"is {own} pixels wide; use parts that belong together."
                )
            seen = getattr(getattr(image_encoder, "config", None), "hidden_size", None)
            expected = face_adapter.config.image_feature_dim
            if seen not in (None, expected) and "sig" in face_adapter.branches:
                raise ValueError(
                    f"The `face_adapter` expects image features {expected} wide, but this `image_encoder` "
                    f"gives {seen}; use the image encoder that the adapter was trained with."
                )
            self._attach_adapter()

    # Faces

    def find_faces(self, faces: Sequence[Person]) -> list[list[Face]]:
        """The face in every photo of every person: one list a person.

        faces: one entry a person, as in `__call__`. Of several faces in a photo the largest is taken, and
        logged.

        Raises:
            ValueError: an entry without a face, that is no photo, or that cannot be searched; it is named.
        """
        single = (str, bytes, os.PathLike, Image.Image, np.ndarray, Face)
        if isinstance(faces, single) or not isinstance(faces, Sequence):
            raise ValueError(
                f"`faces` is a {type(faces).__name__}; give a list with one entry a person, `faces=[photo]` "
                "for one."
            )
        if len(faces) == 0:
            raise ValueError("`faces` is empty; give a photo (or Face) a person, or None for no faces.")
        people = []
        for i, entry in enumerate(faces):
            if not isinstance(entry, (list, tuple)):
                people.append([self._find_face(entry, f"faces[{i}]")])
                continue
            if len(entry) == 0:
                raise ValueError(f"`faces[{i}]` is an empty list; give at least one photo of that person.")
            people.append([self._find_face(photo, f"faces[{i}][{p}]") for p, photo in enumerate(entry)])
        return people

    def _find_face(self, photo: ImageSource | Face, name: str) -> Face:
        if not isinstance(photo, Face):
            if self.face_analyzer is None:
                raise ValueError(
                    f"`{name}` is a photo, but this pipeline has no `face_analyzer` to find the face; load "
                    "it with one (`face_analyzer=FaceAnalyzer.from_pretrained(folder)`), or give a Face."
                )
            photo = self.face_analyzer.largest_face(photo, name)
        embedding = np.asarray(photo.embedding)
        wanted = embedding.size if self.face_adapter is None else self.face_adapter.config.embedding_dim
        if embedding.shape != (wanted,) or not np.isfinite(embedding).all() or not embedding.any():
            raise ValueError(
                f"`{name}` has an embedding of shape {embedding.shape}, not {wanted} finite numbers; use the "
                "face models that the adapter was trained with."
            )
        return photo

    @torch.no_grad()
    def encode_faces(
        self, faces: Sequence[Person], with_image_features: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What `FaceAdapter.encode` takes: embeddings (1, F, 512), image features (1, F, T, C) or None.

        faces: one entry for each of F people, as in `__call__`; `combine_photos` makes one person of
        several photos.
        with_image_features: False leaves out the image encoder, which the arc branch alone does not need.
        """
        embeddings, crops = [], []
        for i, photos in enumerate(self.find_faces(faces)):
            try:
                embedding, typical = combine_photos(np.stack([face.embedding for face in photos]))
            except ValueError as error:
                raise ValueError(f"`faces[{i}]`: {error}") from error
            embeddings.append(embedding)
            crops.append(photos[typical].face_crop)
        embeddings = torch.from_numpy(np.stack(embeddings))[None]  # (1, F, 512)
        if not with_image_features:
            return embeddings, None
        if self.image_encoder is None or self.feature_extractor is None:
            raise ValueError(
                "`siglip_scale` is not 0, but this pipeline has no `image_encoder` and `feature_extractor`; "
                "load it with them, or call it with `siglip_scale=0.0, id_scale=1.0`."
            )
        for i, crop in enumerate(crops):
            if not isinstance(crop, Image.Image):
                raise ValueError(
                    f"`faces[{i}]` has a `face_crop` of type {type(crop).__name__}, which the image encoder "
                    "cannot see; give a Face with a PIL image, or the photo."
                )
        pixels = self.feature_extractor(images=crops, return_tensors="pt").pixel_values  # (F, 3, H, W)
        pixels = pixels.to(get_module_execution_device(self.image_encoder), self.image_encoder.dtype)
        features = self.image_encoder(pixels).last_hidden_state  # (F, T, C)
        return embeddings, features[None]  # (1, F, T, C)

    # The call

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        faces: Sequence[Person] | None = None,
        bboxes: Sequence[Sequence[float]] | None = None,
        *,
        id_scale: float | None = None,
        siglip_scale: float | None = None,
        num_candidates: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        true_cfg_scale: float | None = None,
        true_cfg_min_sigma: float | None = None,
        negative_prompt: str | list[str] | None = None,
        faces_in_negative: bool | None = None,
        sigmas: Sequence[float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_images_per_prompt: int = 1,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
        max_sequence_length: int | None = None,
        **kwargs,
    ) -> WithAnyonePipelineOutput | tuple:
        """Make pictures of the people in `faces`.

        Arguments that are None take `config.sampling_defaults`. Those not told here, and `kwargs`, are
        FluxPipeline's.

        Args:
            prompt: a text, or a list of texts: a picture of each (times `num_images_per_prompt`), all with
                the same faces in the same boxes.
            faces: one entry a person: a photo (path, file's bytes, PIL image, RGB array), a `Face`, or a
                list of several photos of that person (see `combine_photos`). None: a picture by FLUX.1 alone.
            bboxes: one box (x1, y1, x2, y2) a person, in pixels of the output: where the face shall be.
                None: a default layout for 1 to 8 people.
            id_scale: strength of the branch that sees the identity alone; `slider_scales` makes both.
            siglip_scale: strength of the branch that sees the photo too. Both 0: a picture by FLUX.1 alone.
            num_candidates: how many candidates of each picture are drawn at once, up to that many times as
                much work; the likest faces go on (see `candidates`). Without faces there is nothing to choose
                by.
            height, width: pixels, multiples of 16 (twice the VAE's factor).
            true_cfg_scale: above 1, each step has a second pass with `negative_prompt` (None: an empty one),
                and goes from that pass's result towards and past the first's, this many times as far.
            true_cfg_min_sigma: share of noise, 0 to 1, below which steps go without that second pass: where
                details alone are left, guidance costs time and exaggerates them (arXiv 2404.07724).
            faces_in_negative: whether the faces act in that second pass too. If so, guidance sharpens what
                the prompt alone says; if not, the faces as well.
            sigmas: shares of noise before the timestep shift, in place of `num_inference_steps` even ones.

        Returns:
            WithAnyonePipelineOutput, or (images,) without `return_dict`.

        Raises:
            ValueError: what does not fit; the message names the argument and the remedy.
        """
        # 1. What None means.
        settings = {
            "height": height,
            "width": width,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "true_cfg_scale": true_cfg_scale,
            "true_cfg_min_sigma": true_cfg_min_sigma,
            "faces_in_negative": faces_in_negative,
            "id_scale": id_scale,
            "siglip_scale": siglip_scale,
            "num_candidates": num_candidates,
        }
        defaults = self.config.sampling_defaults
        settings = {name: defaults[name] if value is None else value for name, value in settings.items()}
        side = self.default_sample_size * self.vae_scale_factor
        settings |= {name: side for name in ("height", "width") if settings[name] is None}
        height, width, true_cfg_scale = (settings[name] for name in ("height", "width", "true_cfg_scale"))

        # 2. Check what FluxPipeline does not.
        self.check_settings(settings)
        self.check_face_inputs(faces, bboxes, joint_attention_kwargs, kwargs)
        _check_rest(prompt, num_images_per_prompt, output_type, sigmas)
        if guidance_scale is not None and not self.transformer.config.guidance_embeds:
            logger.warning("`guidance_scale` has no effect on this `transformer`: use `true_cfg_scale`.")
        if negative_prompt and true_cfg_scale <= 1:
            logger.warning("`negative_prompt` has no effect unless `true_cfg_scale` is more than 1.")
        id_scale, siglip_scale = settings.pop("id_scale"), settings.pop("siglip_scale")
        faces_in_negative = settings.pop("faces_in_negative")
        min_sigma, num_candidates = settings.pop("true_cfg_min_sigma"), settings.pop("num_candidates")

        # 3. Encode the faces, once for all steps.
        attention_kwargs = dict(joint_attention_kwargs or {})
        if faces is not None:
            # Finding faces comes first: it is also the check of what `faces` holds.
            faces = self.find_faces(faces)
            if bboxes is None:
                bboxes = layout.default_bboxes(len(faces), height, width)
            patch = self.face_adapter.config.pixels_per_token
            bboxes = layout.check_bboxes(bboxes, height, width, num_people=len(faces), pixels_per_token=patch)
        search = None
        if faces is not None and (id_scale > 0 or siglip_scale > 0):
            if num_candidates > 1:
                self._check_search(num_candidates, kwargs.get("latents"))
            self._attach_adapter()
            self.face_adapter.to(self._execution_device)
            embeddings, image_features = self.encode_faces(faces, with_image_features=siglip_scale > 0)
            attention_kwargs[CONDITIONING_KEY] = self.face_adapter.encode(
                embeddings,
                image_features,
                [bboxes],
                height,
                width,
                id_scale=id_scale,
                siglip_scale=siglip_scale,
            )
            if self._is_offloaded:
                self.face_adapter.put_encoding_aside()
            if num_candidates > 1:
                search = CandidateSearch(self, embeddings[0].numpy(), bboxes, height, width, num_candidates)

        # 4. Several candidates of each picture, where there is something to choose them by.
        if search is not None:
            num_images_per_prompt *= num_candidates
            if isinstance(generator, list):
                generator = [each for each in generator for _ in range(num_candidates)]

        # 5. True guidance: a negative prompt for every prompt; where it acts, and whether the faces do too.
        if true_cfg_scale > 1 and kwargs.get("negative_prompt_embeds") is None:
            negative_prompt = self._negative_prompts(negative_prompt, prompt, kwargs.get("prompt_embeds"))
        drop_faces = not faces_in_negative and CONDITIONING_KEY in attention_kwargs
        second_pass = contextlib.nullcontext()
        if true_cfg_scale > 1 and (drop_faces or min_sigma > 0):
            second_pass = _second_pass(self.transformer, drop_faces, min_sigma)

        # 6. Hand over to FluxPipeline.
        if max_sequence_length is None:
            max_sequence_length = min(512, getattr(self.tokenizer_2, "model_max_length", 512))
        callback, inputs = callback_on_step_end, list(callback_on_step_end_tensor_inputs or ())
        few = None
        if search is not None:
            callback, inputs = search.callback(callback, inputs), ["latents", *inputs]
            few = search.hook()
        with second_pass, _hooked(self.transformer, "withanyone_candidates", few):
            (images,) = super().__call__(
                prompt=prompt,
                negative_prompt=negative_prompt,
                sigmas=self._sigmas(sigmas, settings["num_inference_steps"], height, width),
                generator=generator,
                num_images_per_prompt=num_images_per_prompt,
                output_type=output_type if search is None else "latent",
                return_dict=False,
                joint_attention_kwargs=attention_kwargs,
                callback_on_step_end=callback,
                callback_on_step_end_tensor_inputs=inputs,
                max_sequence_length=max_sequence_length,
                **settings,
                **kwargs,
            )
        if search is not None:
            images, pictures = search.best(images)
            if output_type != "latent":
                images = self.image_processor.postprocess(pictures, output_type=output_type)
            self.maybe_free_model_hooks()
        return WithAnyonePipelineOutput(images=images, bboxes=bboxes) if return_dict else (images,)

    def decode_latents(self, latents: torch.Tensor, height: int, width: int, shrink: int = 1) -> torch.Tensor:
        """Packed latents (B, N, C) as pictures (B, 3, height, width), about [-1, 1]; with gradients.

        shrink: how many times smaller than that the pictures are, for previews; latents are averaged.
        """
        config = self.vae.config
        latents = self._unpack_latents(latents, height, width, self.vae_scale_factor)
        if shrink > 1:
            latents = torch.nn.functional.avg_pool2d(latents, shrink)
        latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
        latents = latents.to(get_module_execution_device(self.vae), self.vae.dtype)
        return self.vae.decode(latents, return_dict=False)[0]

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """ValueError where a value of `settings`, with the names of `sampling_defaults`, is out of range."""
        multiple = self.vae_scale_factor * 2
        for name in ("height", "width"):
            value = settings[name]
            if not _is_whole(value) or value < multiple:
                raise ValueError(f"`{name}` is {value!r}; give whole pixels, a multiple of {multiple}.")
            if value % multiple:
                below = value - value % multiple
                raise ValueError(
                    f"`{name}` is {value}; give a multiple of {multiple}, the nearest are {below} and "
                    f"{below + multiple}."
                )
        for name in ("num_inference_steps", "num_candidates"):
            _check_count(name, settings[name])
        for name in ("id_scale", "siglip_scale", "guidance_scale", "true_cfg_scale"):
            _number(name, settings[name], 0.0)
        _number("true_cfg_min_sigma", settings["true_cfg_min_sigma"], 0.0, 1.0)
        if not isinstance(settings["faces_in_negative"], (bool, np.bool_)):
            value = settings["faces_in_negative"]
            raise ValueError(f"`faces_in_negative` is {value!r}; give True or False.")

    def check_face_inputs(
        self,
        faces: Sequence[Person] | None,
        bboxes: Sequence[Sequence[float]] | None,
        joint_attention_kwargs: Mapping[str, Any] | None,
        flux_kwargs: Mapping[str, Any],
    ) -> None:
        """ValueError where `faces` do not go with the other arguments; what is in them is not looked at."""
        if faces is None:
            if bboxes is not None:
                raise ValueError("`bboxes` are given without `faces`; give a photo (or Face) for each box.")
            return
        if self.face_adapter is None:
            raise ValueError(
                "`faces` are given, but this pipeline has no `face_adapter`; load it with one "
                "(`face_adapter=FaceAdapter.from_single_file('withanyone.safetensors')`)."
            )
        if CONDITIONING_KEY in (joint_attention_kwargs or {}):
            raise ValueError(
                f"`joint_attention_kwargs` has `{CONDITIONING_KEY}`, which `faces` fill in; give one of them."
            )
        for name, value in flux_kwargs.items():
            if "ip_adapter_image" in name and value is not None:
                raise ValueError(
                    f"`{name}` is given together with `faces`, but diffusers' IP-Adapter and the face "
                    f"adapter enter the transformer at the same place; leave out `{name}` or `faces`."
                )
        if getattr(self.transformer, "encoder_hid_proj", None) is not None:
            raise ValueError(
                "`faces` are given, but diffusers' IP-Adapter is loaded and takes them for its own; call "
                "`pipe.unload_ip_adapter()`."
            )

    def _check_search(self, num_candidates: int, latents: torch.Tensor | None) -> None:
        """ValueError where candidates cannot be told apart, or do not differ."""
        if self.face_analyzer is None:
            raise ValueError(
                f"`num_candidates` is {num_candidates}, but this pipeline has no `face_analyzer` to tell "
                "which is likest; load it with one, or call it with `num_candidates=1`."
            )
        if latents is not None:
            raise ValueError(
                f"`num_candidates` is {num_candidates}, but `latents` say where the picture begins; call it "
                "with `num_candidates=1`."
            )

    def _negative_prompts(
        self, negative_prompt: str | list[str] | None, prompt: str | list[str] | None, prompt_embeds: Any
    ) -> str | list[str]:
        """A negative prompt for every prompt: one for all is repeated, none is an empty one."""
        prompts = prompt_embeds if prompt is None else prompt
        count = 1 if prompts is None or isinstance(prompts, str) else len(prompts)
        if isinstance(negative_prompt, list):
            if len(negative_prompt) != count:
                raise ValueError(
                    f"`negative_prompt` holds {len(negative_prompt)} texts for {count} prompts; give one for "
                    "each, or one text for all."
                )
            return negative_prompt
        negative_prompt = negative_prompt or ""
        return negative_prompt if isinstance(prompt, str) else [negative_prompt] * count

    def _sigmas(
        self, sigmas: Sequence[float] | None, num_inference_steps: int, height: int, width: int
    ) -> list[float] | None:
        """`sigmas` for FluxPipeline, such that the shift it adds leads to `timestep_shift`'s schedule."""
        config = self.scheduler.config
        if self.config.timestep_shift == "flux" or not config.get("use_dynamic_shifting", False):
            return None if sigmas is None else list(sigmas)
        exponential = config.get("time_shift_type", "exponential") == "exponential"
        if not exponential or config.get("use_flow_sigmas", False):
            raise ValueError(
                "`timestep_shift` is 'released', which needs a `scheduler` that shifts exponentially "
                "(`time_shift_type='exponential'`, no `use_flow_sigmas`); use FLUX.1's, or 'flux'."
            )
        line = {
            "pixels_per_token": self.vae_scale_factor * 2,
            "base_seq_len": config.get("base_image_seq_len", 256),
            "max_seq_len": config.get("max_image_seq_len", 4096),
            "base_shift": config.get("base_shift", 0.5),
            "max_shift": config.get("max_shift", 1.15),
        }
        mu, flux_mu = (flow.shift_mu(height, width, shift, **line) for shift in ("released", "flux"))
        if sigmas is None:
            return flow.pipeline_sigmas(num_inference_steps, mu, flux_mu)
        return flow.shift_sigmas(torch.as_tensor(sigmas, dtype=torch.float64), mu - flux_mu).tolist()

    # Where things run

    def _attach_adapter(self) -> None:
        """Attach the adapter to the transformer, unless it is already."""
        transformer = getattr(self.transformer, "_orig_mod", self.transformer)
        if transformer is not self.transformer and not self.face_adapter.is_attached(transformer):
            raise ValueError(
                "The `transformer` was compiled before the face adapter was attached and would run without "
                "faces; build the pipeline first, then compile."
            )
        self.face_adapter.attach(transformer)

    @property
    def _is_offloaded(self) -> bool:
        """Whether the transformer, or its layers, come to the device only when they are needed."""
        registries = (getattr(module, "_diffusers_hook", None) for module in self.transformer.modules())
        in_groups = any(r is not None and r.get_hook("group_offloading") is not None for r in registries)
        return in_groups or hasattr(self.transformer, "_hf_hook")

    def enable_group_offload(
        self, onload_device: torch.device, *args, exclude_modules: str | Sequence[str] | None = None, **kwargs
    ) -> None:
        """As DiffusionPipeline's; face adapter and image encoder stay whole and on the device."""
        exclude = [exclude_modules] if isinstance(exclude_modules, str) else list(exclude_modules or ())
        super().enable_group_offload(
            onload_device, *args, exclude_modules=[*exclude, *self._exclude_from_cpu_offload], **kwargs
        )


class _SecondPass(ModelHook):
    """Changes the pass that FluxPipeline calls "uncond": the faces taken out of the transformer's arguments;
    at little noise not run at all, the first pass's result in its place, which leaves that as it is."""

    _is_stateful = True  # so that the transformer's `cache_context` tells `passes` which pass it is

    def __init__(self, drop_faces: bool, min_sigma: float) -> None:
        super().__init__()
        self.passes = StateManager(BaseState)
        self.drop_faces, self.min_sigma = drop_faces, min_sigma
        self.first_result: Any = None

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self.passes.reset()
        return module

    def new_forward(self, module: torch.nn.Module, *args, **kwargs):
        is_second = self.passes.context.name == "uncond"
        is_guided = self.min_sigma == 0 or float(kwargs["timestep"].max()) >= self.min_sigma
        if is_second and not is_guided:
            return self.first_result
        if is_second and self.drop_faces:
            attention_kwargs = dict(kwargs["joint_attention_kwargs"])
            del attention_kwargs[CONDITIONING_KEY]
            kwargs["joint_attention_kwargs"] = attention_kwargs
        result = self.fn_ref.original_forward(*args, **kwargs)
        self.first_result = None if is_guided else result
        return result


@contextlib.contextmanager
def _second_pass(transformer: torch.nn.Module, drop_faces: bool, min_sigma: float) -> Iterator[None]:
    if hasattr(transformer, "_orig_mod"):
        name, value = ("faces_in_negative", False) if drop_faces else ("true_cfg_min_sigma", min_sigma)
        raise ValueError(
            f"`{name}` is {value}, which a `transformer` compiled as a whole cannot follow; use "
            "`pipe.transformer.compile_repeated_blocks(fullgraph=True)` in place of `torch.compile`."
        )
    with _hooked(transformer, "withanyone_second_pass", _SecondPass(drop_faces, min_sigma)):
        yield


@contextlib.contextmanager
def _hooked(transformer: torch.nn.Module, name: str, hook: ModelHook | None) -> Iterator[None]:
    """While it lasts, `transformer` has the hook; None: nothing happens."""
    if hook is None:
        yield
        return
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    registry.register_hook(hook, name)
    try:
        yield
    finally:
        registry.remove_hook(name, recurse=False)


def _check_rest(prompt: Any, num_images_per_prompt: Any, output_type: Any, sigmas: Any) -> None:
    """ValueError where FluxPipeline's own arguments would fail late, or without a word of what to do."""
    if isinstance(prompt, list) and not prompt:
        raise ValueError("`prompt` is an empty list; give a text, or a list of at least one.")
    _check_count("num_images_per_prompt", num_images_per_prompt)
    if output_type not in OUTPUT_TYPES:
        allowed = ", ".join(map(repr, OUTPUT_TYPES))
        raise ValueError(f"`output_type` is {output_type!r}; use one of {allowed}.")
    if sigmas is not None and not (len(sigmas) and all(0 < float(sigma) <= 1 for sigma in sigmas)):
        raise ValueError(f"`sigmas` are {list(sigmas)}; give at least one number above 0 and up to 1.")


def _check_count(name: str, value: Any) -> None:
    if not _is_whole(value) or value < 1:
        raise ValueError(f"`{name}` is {value!r}; give a whole number of at least 1.")


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _number(name: str, value: Any, low: float, high: float = math.inf) -> float:
    """`value` as a float within [low, high], or a ValueError."""
    is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high:
        wanted = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise ValueError(f"`{name}` is {value!r}; give a finite number {wanted}.")
    return float(value)
