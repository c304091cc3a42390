"""The trainer: one for all phases, on accelerate. `train_step` reads like section 4 of the method.

Only the adapter is trained; it alone is in the module that accelerate wraps, and in checkpoints.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from withanyone import FaceAdapter, WithAnyonePipeline, flow
from withanyone.arcface import Recognizer, align_face

from .catalogue import match_landmarks
from .checkpoints import (
    find_checkpoint,
    flatten_optimizer,
    load_checkpoint,
    restore_optimizer,
    save_checkpoint,
)
from .config import TrainConfig, dump_config
from .data import Batch, TrainDataset, make_loader, make_plan, open_data
from .losses import diffusion_loss, id_contrastive_loss, id_loss
from .references import draw_negatives
from .validation import validate

logger = logging.getLogger(__name__)

LOG = "log.jsonl"
MIN_READS = 200  # records read before the share of bad ones is judged
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class AdapterStep(nn.Module):
    """Adapter and transformer in one forward, as DistributedDataParallel needs it.

    The frozen transformer is kept out of the module tree: it has no parameters to wrap, sync or save.
    """

    def __init__(self, adapter: FaceAdapter, transformer: nn.Module) -> None:
        super().__init__()
        self.adapter = adapter
        self._frozen = (transformer,)

    def forward(self, faces: dict[str, Any], inputs: dict[str, Any]) -> Tensor:
        """Velocity (B, N, C) at `inputs` with the people of `faces` (arguments of `FaceAdapter.encode`)."""
        conditioning = self.adapter.encode(**faces)
        return self._frozen[0](
            **inputs, joint_attention_kwargs={"ip_hidden_states": conditioning}, return_dict=False
        )[0]


def make_adapter(config: TrainConfig, pipeline: WithAnyonePipeline) -> FaceAdapter:
    """The adapter of `init_from`, or a new one that fits the pipeline's transformer and image encoder."""
    if config.init_from:
        return FaceAdapter.from_pretrained(config.init_from).float()
    base = pipeline.transformer.config
    torch.manual_seed(config.seed)
    return FaceAdapter(
        hidden_size=base.num_attention_heads * base.attention_head_dim,
        num_blocks=base.num_layers + base.num_single_layers,
        inner_dim=config.adapter_inner_dim,
        image_feature_dim=pipeline.image_encoder.config.hidden_size,
        num_id_tokens=config.adapter_num_id_tokens,
        pixels_per_token=2 * pipeline.vae_scale_factor,
        branches=("arc", "sig") if config.branches == "both" else (config.branches,),
    )


def is_block_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon takes this parameter: the projections of the cross-attentions."""
    return parameter.ndim == 2 and name.startswith("ipa_")


def make_optimizers(
    config: TrainConfig, adapter: FaceAdapter
) -> list[tuple[torch.optim.Optimizer, list[str]]]:
    """Optimisers with the names of their parameters, in order."""
    named = [(name, p) for name, p in adapter.named_parameters() if p.requires_grad]
    adam_settings = {"lr": config.learning_rate, "betas": (config.adam_beta1, config.adam_beta2),
                     "weight_decay": config.weight_decay}  # fmt: skip
    if config.optimizer == "adamw8bit":
        import bitsandbytes

        optimizer = bitsandbytes.optim.AdamW8bit([p for _, p in named], **adam_settings)
        return [(optimizer, [name for name, _ in named])]
    if config.optimizer == "adamw":
        return [(torch.optim.AdamW([p for _, p in named], **adam_settings), [name for name, _ in named])]
    matrices = [(name, p) for name, p in named if is_block_matrix(name, p)]
    rest = [(name, p) for name, p in named if not is_block_matrix(name, p)]
    muon = torch.optim.Muon(
        [p for _, p in matrices],
        lr=config.muon_learning_rate,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    adam = torch.optim.AdamW([p for _, p in rest], **adam_settings)
    return [(muon, [name for name, _ in matrices]), (adam, [name for name, _ in rest])]


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """What the learning rates are multiplied by at `step`: linear warm-up, then constant or a cosine's
    half."""
    warmup = min(1.0, (step + 1) / max(1, config.lr_warmup_steps))
    if config.lr_scheduler == "constant":
        return warmup
    progress = min(1.0, step / config.max_train_steps)
    end = config.lr_end_share
    return warmup * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress)))


def sigmas_of(config: TrainConfig, uniform: Tensor, mu: float) -> Tensor:
    """Noise levels (B,) from uniform draws: as they are or logit-normal, then shifted by `mu`."""
    if config.sigma_sampling == "logit_normal":
        normal = torch.special.ndtri(uniform.double()).float()
        uniform = torch.sigmoid(config.sigma_logit_mean + config.sigma_logit_std * normal).clamp(
            1e-4, 1 - 1e-4
        )
    return flow.shift_sigmas(uniform, mu)


class Trainer:
    """One run of one phase.

    Args:
        config: its settings.
        pipeline: the frozen parts; by default loaded from `config.pretrained`. Its adapter is not used.
    """

    def __init__(self, config: TrainConfig, pipeline: WithAnyonePipeline | None = None) -> None:
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            cpu=config.cpu,
            log_with=config.report_to or None,
            project_dir=str(self.output_dir),
            # a batch whose scales are all on one branch leaves the other's parameters without a gradient
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=config.branches == "both")],
        )
        self.device = self.accelerator.device
        self._load_parts(pipeline)
        self._load_data()
        self.adapter = make_adapter(config, self.pipeline)
        self.adapter.train().requires_grad_(True)
        self.adapter.attach(self.pipeline.transformer)
        self.pipeline.register_modules(face_adapter=self.adapter)
        optimizers = make_optimizers(config, self.adapter)
        self.optimizer_names = [names for _, names in optimizers]
        self.model, *self.optimizers = self.accelerator.prepare(
            AdapterStep(self.adapter, self.pipeline.transformer), *(optimizer for optimizer, _ in optimizers)
        )
        self.base_rates = [[g["lr"] for g in o.param_groups] for o in self.optimizers]
        self.ema = None
        if config.ema_decay is not None:
            self.ema = {name: p.detach().clone() for name, p in self.adapter.named_parameters()}
        self.step = 0
        self.batch_number = 0  # the place in the data stream: global batches before the one at work
        self.reads = 0
        self.bad: Counter[str] = Counter()
        self.faces: Counter[str] = Counter()
        self._text: OrderedDict[tuple[str, int], tuple[Tensor, Tensor]] = OrderedDict()
        self._resume()

    # --- set-up ------------------------------------------------------------------------------------------

    def _load_parts(self, pipeline: WithAnyonePipeline | None) -> None:
        config = self.config
        dtype = DTYPES[config.frozen_dtype]
        if pipeline is None:
            pipeline = WithAnyonePipeline.from_pretrained(
                config.pretrained, face_adapter=None, dtype={"default": dtype, "vae": torch.float32}
            )
        for name in ("image_encoder", "feature_extractor", "face_analyzer"):
            if getattr(pipeline, name) is None:
                raise ValueError(f"`pretrained` {config.pretrained!r} has no `{name}`, which training needs.")
        self.pipeline = pipeline
        for name in ("transformer", "text_encoder", "text_encoder_2", "image_encoder", "vae"):
            # the VAE in full precision: its rounding would be part of the target
            part_dtype = torch.float32 if name == "vae" else dtype
            part = getattr(pipeline, name).to(self.device).eval().requires_grad_(False)
            if part.dtype != part_dtype:
                part.to(part_dtype)
        if config.gradient_checkpointing:
            pipeline.transformer.enable_gradient_checkpointing()
        self.recognizer = None
        if config.uses_identity_losses:
            self.recognizer = Recognizer.from_onnx(pipeline.face_analyzer.recognition_path)
            self.recognizer.to(self.device).eval().requires_grad_(False)

    def _load_data(self) -> None:
        config, accelerator = self.config, self.accelerator
        with accelerator.main_process_first():  # one process builds what is missing, the others open it
            self.catalogues, self.bank = open_data(config, self.pipeline.face_analyzer)
        analyzer = self.pipeline.face_analyzer
        self.dataset = TrainDataset(self.catalogues, self.bank, config, crop_size=analyzer.crop_size)
        self.plan = make_plan(self.dataset, config, accelerator.num_processes)

    def _prepare_crops(self, crops: list) -> Tensor:
        """Face crops as the image encoder takes them: (K, 3, h, w)."""
        return self.pipeline.feature_extractor(crops, return_tensors="pt").pixel_values

    # --- the step ----------------------------------------------------------------------------------------

    def train_step(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The loss of one batch (method section 4) and what is logged of it.

        x_t = (1 - t) x_1 + t x_0          v = x_0 - x_1
        L = L_diffusion + id_loss_weight L_ID + contrastive_loss_weight L_CL
        """
        config, device = self.config, self.device
        height, width = batch.size

        # 1. Clean latents x_1, noise x_0 and their mixture at t = sigma.
        pixels = batch.pixel_values.to(device)  # (B, 3, H, W)
        latents = self._encode_pixels(pixels)  # (B, N, C)
        noise = self._noise(batch, latents)
        sigma = sigmas_of(config, batch.uniform, self._mu(height, width)).to(device)  # (B,)
        noisy_latents = flow.noisy_latents(latents, noise, sigma)

        # 2. What the model sees besides: text, and each person's reference.
        prompt_embeds, pooled = self._encode_text(batch.prompts)
        faces = {
            "embeddings": batch.embeddings.to(device),
            "image_features": self._image_features(batch),
            "bboxes": batch.bboxes,
            "height": height,
            "width": width,
            "id_scale": batch.id_scale,
            "siglip_scale": batch.siglip_scale,
        }
        dtype = self.pipeline.transformer.dtype
        inputs = {
            "hidden_states": noisy_latents.to(dtype),
            "timestep": sigma.to(dtype),
            "encoder_hidden_states": prompt_embeds,
            "pooled_projections": pooled,
            "img_ids": self._image_ids(height, width, dtype),
            "txt_ids": torch.zeros(prompt_embeds.shape[1], 3, device=device, dtype=dtype),
        }
        if self.pipeline.transformer.config.guidance_embeds:
            inputs["guidance"] = torch.full((len(latents),), config.guidance, device=device, dtype=dtype)

        # 3. The velocity, and the clean estimate that follows from it.
        with self.accelerator.autocast():
            velocity = self.model(faces, inputs).float()  # (B, N, C)
        denoised = flow.denoised(noisy_latents, velocity, sigma)

        # 4. Losses.
        diffusion = diffusion_loss(velocity, flow.velocity(latents, noise))  # (B,)
        loss = diffusion.mean()
        logs = {"diffusion_loss": loss.item()}
        if config.uses_identity_losses:
            identity, contrastive, more = self._identity_losses(batch, pixels, denoised, sigma)
            loss = loss + config.id_loss_weight * identity + config.contrastive_loss_weight * contrastive
            logs.update(more, id_loss=identity.item(), id_contrastive_loss=contrastive.item())
        logs["loss"] = loss.item()
        return loss, logs

    def _identity_losses(
        self, batch: Batch, pixels: Tensor, denoised: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """L_ID and L_CL, means over the faces looked at on all processes (0 where there is none)."""
        config = self.config
        sample, face = self._pick_faces(batch, sigma)  # (K,) each
        negatives = self._negatives(batch) if config.contrastive_loss_weight > 0 else None
        count = torch.tensor([len(sample)], device=self.device, dtype=torch.float32)
        zero = denoised.sum() * 0
        identity = contrastive = zero
        if len(sample):
            kps = batch.kps[sample, face]  # (K, 5, 2)
            decoded, row = torch.unique(sample, return_inverse=True)
            with self.accelerator.autocast():
                pictures = self._decode(denoised[decoded], *batch.size)  # (S, 3, H, W)
            if config.id_landmarks == "estimate":
                sample, face, row, kps_estimate = self._detect_on(pictures, batch, sample, face, row)
            else:
                kps_estimate = kps
            kps = batch.kps[sample, face]
            count = torch.tensor([len(sample)], device=self.device, dtype=torch.float32)
        if len(sample):
            # coordinates need full precision: the warp stays outside of autocast
            aligned = align_face(pictures[row].float(), kps_estimate.to(self.device))  # (K, 3, 112, 112)
            aligned_target = align_face(pixels[sample], kps.to(self.device))
            with self.accelerator.autocast():
                generated = self.recognizer(aligned)  # (K, 512)
                with torch.no_grad():
                    target = self.recognizer(aligned_target)  # (K, 512)
            identity = id_loss(generated, target).sum()
            if negatives is not None:
                positive = target
                if config.contrastive_positive == "reference":
                    positive = batch.embeddings[sample, face].to(self.device)
                allowed = None
                if config.in_batch_negatives:
                    negatives, allowed = self._with_batch(
                        negatives, target, batch.identities[sample, face], sample
                    )
                contrastive = id_contrastive_loss(
                    generated, positive, negatives, config.contrastive_temperature, allowed
                ).sum()
        # processes see different numbers of faces: divide by the number of all, so that the mean over
        # processes is right
        total = self.accelerator.reduce(count, "sum").item() / self.accelerator.num_processes
        total = max(total, 1e-6) if total > 0 else 1.0
        logs = {"id_faces": float(count.item())}
        return identity / total, contrastive / total, logs

    def _pick_faces(self, batch: Batch, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(sample, face) of the faces the identity losses look at: noise low enough, landmarks known, at most
        `id_faces_per_step` of them, in the random order of `batch.priority`."""
        known = torch.isfinite(batch.kps).all(-1).all(-1)  # (B, F)
        low = (sigma.cpu() <= self.config.id_loss_max_sigma)[:, None]  # (B, 1)
        self.faces["seen"] += int(batch.face_mask.sum())
        self.faces["without_landmarks"] += int((batch.face_mask & ~known).sum())
        usable = batch.face_mask & known & low
        order = torch.where(usable, batch.priority, torch.inf).flatten().argsort(stable=True)
        order = order[: min(int(usable.sum()), self.config.id_faces_per_step)]
        return order // usable.shape[1], order % usable.shape[1]

    def _detect_on(
        self, pictures: Tensor, batch: Batch, sample: Tensor, face: Tensor, row: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Landmarks found on the estimate itself (not GT-aligned): the faces found, and where."""
        images = (
            ((pictures.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu()
        )
        found = [self.pipeline.face_analyzer.detect(image.numpy()) for image in images]
        kps = []
        for s, f, r in zip(sample.tolist(), face.tolist(), row.tolist(), strict=True):
            boxes = np.array([d.bbox for d in found[r]], np.float32).reshape(-1, 4)
            points = np.array([d.kps for d in found[r]], np.float32).reshape(-1, 5, 2)
            kps.append(match_landmarks(np.array([batch.bboxes[s][f]], np.float32), boxes, points)[0])
        kps = torch.from_numpy(np.stack(kps))  # (K, 5, 2)
        keep = torch.isfinite(kps).all(-1).all(-1)
        self.faces["not_found_on_estimate"] += int((~keep).sum())
        return sample[keep], face[keep], row[keep], kps[keep]

    def _negatives(self, batch: Batch) -> Tensor:
        """(M, 512) embeddings of people who are nowhere in the global batch; the same on every process."""
        identities = torch.full((len(batch.face_mask), self.config.max_faces), -1, dtype=torch.int64)
        identities[:, : batch.identities.shape[1]] = batch.identities
        identities = self.accelerator.gather(identities.to(self.device)).cpu().numpy()
        rng = np.random.default_rng([self.config.seed, 2, self.batch_number])
        rows = draw_negatives(self.bank, identities, self.config.num_negatives, rng)
        return torch.from_numpy(np.ascontiguousarray(self.bank.embeddings[rows])).to(self.device)

    def _with_batch(
        self, negatives: Tensor, target: Tensor, identities: Tensor, sample: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The batch's other people as further negatives: (M + K, 512), and who is somebody else (K, M + K).

        An unidentified face counts as somebody else only within one picture.
        """
        identities, sample = identities.to(self.device), sample.to(self.device)
        known = (identities >= 0)[:, None] & (identities >= 0)[None]
        other = known & (identities[:, None] != identities[None])
        together = (sample[:, None] == sample[None]) & ~torch.eye(
            len(sample), dtype=torch.bool, device=self.device
        )
        other = other | (together & ~(known & (identities[:, None] == identities[None])))
        bank = torch.ones(len(target), len(negatives), dtype=torch.bool, device=self.device)
        return torch.cat([negatives, target]), torch.cat([bank, other], dim=1)

    # --- parts of the step -------------------------------------------------------------------------------

    @torch.no_grad()
    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] as packed latents (B, N, C): the distribution's mode."""
        vae = self.pipeline.vae
        latents = vae.encode(pixels.to(vae.dtype)).latent_dist.mode()
        latents = (latents.float() - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
        return self.pipeline._pack_latents(latents, *latents.shape)

    def _decode(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Packed latents (B, N, C) as pictures (B, 3, H, W), with gradients."""
        vae = self.pipeline.vae
        latents = self.pipeline._unpack_latents(latents, height, width, self.pipeline.vae_scale_factor)
        latents = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        return vae.decode(latents.to(vae.dtype), return_dict=False)[0]

    def _noise(self, batch: Batch, latents: Tensor) -> Tensor:
        """Every sample's own noise, whatever the batch it is in."""
        noise = [
            torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(seed))
            for seed in batch.noise_seeds
        ]
        return torch.stack(noise).to(latents)

    def _mu(self, height: int, width: int) -> float:
        if self.config.timestep_shift == "none":
            return 0.0
        scheduler = self.pipeline.scheduler.config
        return flow.shift_mu(
            height,
            width,
            self.config.timestep_shift,
            pixels_per_token=self.adapter.config.pixels_per_token,
            base_seq_len=scheduler.get("base_image_seq_len", 256),
            max_seq_len=scheduler.get("max_image_seq_len", 4096),
            base_shift=scheduler.get("base_shift", 0.5),
            max_shift=scheduler.get("max_shift", 1.15),
        )

    def _image_ids(self, height: int, width: int, dtype: torch.dtype) -> Tensor:
        side = self.adapter.config.pixels_per_token
        return self.pipeline._prepare_latent_image_ids(1, height // side, width // side, self.device, dtype)

    def _text_length(self, prompts: list[str]) -> int:
        """Text tokens of a batch: the full length, or the first of `text_lengths` that holds every
        caption."""
        tokenizer = self.pipeline.tokenizer_2
        full = min(512, tokenizer.model_max_length)
        if not self.config.text_lengths:
            return full
        longest = max(len(ids) for ids in tokenizer(prompts).input_ids)
        return min((n for n in self.config.text_lengths if n >= longest), default=full)

    @torch.no_grad()
    def _encode_text(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """(B, L, C) and pooled (B, C) embeddings; captions seen lately are kept."""
        length = self._text_length(prompts)
        keys = [(prompt, length) for prompt in prompts]
        missing = [key for key in dict.fromkeys(keys) if key not in self._text]
        if missing:
            embeds, pooled, _ = self.pipeline.encode_prompt(
                prompt=[prompt for prompt, _ in missing],
                prompt_2=None,
                device=self.device,
                max_sequence_length=length,
            )
            self._text.update({key: (embeds[i], pooled[i]) for i, key in enumerate(missing)})
        rows = [self._text[key] for key in keys]
        for key in keys:
            self._text.move_to_end(key)
        while len(self._text) > self.config.text_cache_size:
            self._text.popitem(last=False)
        return torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])

    @torch.no_grad()
    def _image_features(self, batch: Batch) -> Tensor | None:
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

    # --- the run -----------------------------------------------------------------------------------------

    def train(self) -> Path:
        """Runs from where the output folder is to `max_train_steps`; returns the finished adapter's
        folder."""
        config, accelerator = self.config, self.accelerator
        if accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            (self.output_dir / "config.yaml").write_text(dump_config(config))
            self._truncate_log()
        if config.report_to:
            settings = {k: str(v) for k, v in dataclasses.asdict(config).items()}
            accelerator.init_trackers("withanyone", config=settings)
        trainable = sum(p.numel() for p in self.adapter.parameters() if p.requires_grad)
        logger.info(
            "%.2f M parameters to train, step %d of %d", trainable / 1e6, self.step, config.max_train_steps
        )
        batches = self._batches()
        last_save, self._clock = time.monotonic(), deque([(time.monotonic(), self.step)], maxlen=20)
        averages: dict[str, float] = {}
        while self.step < config.max_train_steps:
            logs = self._optimizer_step(batches)
            self.step += 1
            for name, value in logs.items():
                averages[name] = (
                    value if name not in averages else averages[name] + 0.05 * (value - averages[name])
                )
            self._log(logs)
            if self.step % config.log_steps == 0:
                self._report(averages)
            due = (
                config.checkpointing_minutes
                and time.monotonic() - last_save > 60 * config.checkpointing_minutes
            )
            if self._agree(self.step % config.checkpointing_steps == 0 or bool(due)):
                self.save()
                last_save = time.monotonic()
            if config.validation_steps and self.step % config.validation_steps == 0:
                self._validate()
        self.save()
        folder = self.export()
        if config.report_to:
            accelerator.end_training()
        return folder

    def _batches(self) -> Iterator[Batch]:
        """This process's batches from where the run stands, for ever."""
        start = self.step * self.config.gradient_accumulation_steps
        loader = make_loader(
            self.dataset,
            self.plan,
            start=start,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            num_workers=self.config.dataloader_num_workers,
            prepare=self._prepare_crops,
        )
        for number, batch in enumerate(loader, start):
            self.batch_number = number
            self._count_reads(batch)
            yield batch

    def _optimizer_step(self, batches: Iterator[Batch]) -> dict[str, float]:
        """One update of the adapter, over `gradient_accumulation_steps` batches; means of what is logged."""
        config, accelerator = self.config, self.accelerator
        factor = learning_rate_factor(config, self.step)
        for optimizer, rates in zip(self.optimizers, self.base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        sums: Counter[str] = Counter()
        for _ in range(config.gradient_accumulation_steps):
            with accelerator.accumulate(self.model):
                loss, logs = self.train_step(next(batches))
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.adapter.parameters(), config.max_grad_norm)
                    logs["grad_norm"] = float(norm) * config.gradient_accumulation_steps
                for optimizer in self.optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            sums.update(logs)
        self._update_ema()
        logs = {name: value / config.gradient_accumulation_steps for name, value in sums.items()}
        if accelerator.num_processes > 1:
            means = accelerator.reduce(torch.tensor(list(logs.values()), device=self.device), "mean")
            logs = dict(zip(logs, means.tolist(), strict=True))
        if not math.isfinite(logs["loss"]):
            raise FloatingPointError(
                f"the loss is {logs['loss']} at step {self.step}: lower the learning rate."
            )
        return {**logs, "learning_rate": config.learning_rate * factor}

    @torch.no_grad()
    def _update_ema(self) -> None:
        if self.ema is not None:
            decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
            for name, parameter in self.adapter.named_parameters():
                self.ema[name].lerp_(parameter.detach(), 1 - decay)

    def _count_reads(self, batch: Batch) -> None:
        self.reads += len(batch.positions) + len(batch.bad)
        self.bad.update(batch.bad)
        damaged = sum(n for reason, n in self.bad.items() if reason != "reference_dropped")
        if self.reads >= MIN_READS and damaged > self.config.max_bad_share * self.reads:
            raise ValueError(
                f"`shards`: {damaged} of {self.reads} records read were damaged, more than `max_bad_share` "
                f"({self.config.max_bad_share:.1%}): {dict(self.bad)}."
            )

    def _agree(self, mine: bool) -> bool:
        """The main process's answer on every process: clocks differ."""
        if self.accelerator.num_processes == 1:
            return mine
        answer = [mine]
        broadcast_object_list(answer)
        return answer[0]

    # --- log ---------------------------------------------------------------------------------------------

    def _log(self, logs: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            with (self.output_dir / LOG).open("a") as stream:
                stream.write(json.dumps({"step": self.step, **logs}) + "\n")
        if self.config.report_to:
            self.accelerator.log(logs, step=self.step)

    def _truncate_log(self) -> None:
        """Drops the lines of steps after the checkpoint that the run goes on from."""
        path = self.output_dir / LOG
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= self.step]
            path.write_text("".join(line + "\n" for line in kept))

    def _report(self, averages: dict[str, float]) -> None:
        now = time.monotonic()
        begin, first = self._clock[0]
        self._clock.append((now, self.step))
        speed = (self.step - first) / max(now - begin, 1e-9)
        left = (self.config.max_train_steps - self.step) / max(speed, 1e-9)
        values = " ".join(f"{k} {v:.4g}" for k, v in averages.items() if k != "learning_rate")
        logger.info(
            "step %d/%d  %s  %.2f steps/s  %d:%02d left%s",
            self.step, self.config.max_train_steps, values, speed, left // 60, left % 60,
            f"  passed over: {dict(self.bad)}" if self.bad else "",
        )  # fmt: skip

    # --- keeping -----------------------------------------------------------------------------------------

    def save(self) -> None:
        """A checkpoint of this step, if there is none."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            tensors = {"adapter": self.adapter.state_dict()}
            if self.ema is not None:
                tensors["ema"] = self.ema
            for k, (optimizer, names) in enumerate(zip(self.optimizers, self.optimizer_names, strict=True)):
                tensors[f"optimizer_{k}"] = flatten_optimizer(optimizer.optimizer, names)
            state = {
                "config": dataclasses.asdict(self.config),
                "reads": self.reads,
                "bad": dict(self.bad),
                "faces": dict(self.faces),
            }
            root = self.output_dir / "checkpoints"
            save_checkpoint(root, self.step, tensors, state, self.config.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        folder = find_checkpoint(self.output_dir / "checkpoints", self.config.resume_from_checkpoint)
        if folder is None:
            return
        tensors, state = load_checkpoint(folder)
        self.adapter.load_state_dict(tensors["adapter"], strict=True)
        if self.ema is not None:
            self.ema = {n: t.to(self.device) for n, t in tensors.get("ema", tensors["adapter"]).items()}
        for k, (optimizer, names) in enumerate(zip(self.optimizers, self.optimizer_names, strict=True)):
            restore_optimizer(optimizer.optimizer, names, tensors[f"optimizer_{k}"])
        self.step, self.reads = state["step"], state["reads"]
        self.bad, self.faces = Counter(state["bad"]), Counter(state["faces"])
        mine = json.loads(json.dumps(dataclasses.asdict(self.config)))
        changed = [k for k, v in mine.items() if state["config"].get(k, v) != v]
        if changed:
            logger.warning("settings changed since the checkpoint: %s", ", ".join(changed))
        logger.info("going on from %s", folder)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The adapter with its moving average inside the block, with its own weights after it."""
        if self.ema is None:
            yield
            return
        own = {name: p.detach().clone() for name, p in self.adapter.named_parameters()}
        try:
            self.adapter.load_state_dict(self.ema, strict=True)
            yield
        finally:
            self.adapter.load_state_dict(own, strict=True)

    def export(self) -> Path:
        """Writes the averaged adapter in diffusers' layout (OUT/adapter) and in the released one."""
        folder = self.output_dir / "adapter"
        if self.accelerator.is_main_process:
            with self.averaged_weights():
                export = FaceAdapter.from_config(self.adapter.config)
                export.load_state_dict(self.adapter.state_dict(), strict=True)
            export.to(DTYPES[self.config.export_dtype])
            export.save_pretrained(folder)
            both = len(export.branches) == 2
            export.save_single_file(
                self.output_dir / ("withanyone.safetensors" if both else "ipa.safetensors")
            )
            logger.info(
                "%s: faces seen %s; finished adapter in %s", self.output_dir, dict(self.faces), folder
            )
        self.accelerator.wait_for_everyone()
        return folder

    def _validate(self) -> None:
        if self.accelerator.is_main_process and self.config.validation_cases:
            out = self.output_dir / "samples" / f"step_{self.step:08d}.png"
            self.adapter.eval()
            with self.averaged_weights(), self.accelerator.autocast():
                scores = validate(
                    self.pipeline, self.config.validation_cases, self.config.validation_count, out
                )
            self.adapter.train()
            logger.info("validation at step %d: %s", self.step, {k: round(v, 4) for k, v in scores.items()})
            with (self.output_dir / "validation.jsonl").open("a") as stream:
                stream.write(json.dumps({"step": self.step, **scores}) + "\n")
            if self.config.report_to:
                self.accelerator.log({f"validation/{k}": v for k, v in scores.items()}, step=self.step)
        self.accelerator.wait_for_everyone()
