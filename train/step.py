"""One step of training: a batch to its loss. `TrainStep.__call__` reads like section 4 of the method."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from withanyone import FaceAdapter, flow
from withanyone.arcface import align_face

from .catalogue import match_landmarks
from .config import TrainConfig
from .examples import Batch
from .frozen import FrozenParts
from .losses import diffusion_loss, id_contrastive_loss, id_loss
from .references import ReferenceBank, draw_negatives


class AdapterStep(nn.Module):
    """Adapter and transformer in one forward, as DistributedDataParallel and FSDP need it.

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


def sigmas_of(config: TrainConfig, uniform: Tensor, mu: float) -> Tensor:
    """Noise levels (B,) from uniform draws: as they are or logit-normal, then shifted by `mu`."""
    if config.sigma_sampling == "logit_normal":
        normal = torch.special.ndtri(uniform.double()).float()
        uniform = torch.sigmoid(config.sigma_logit_mean + config.sigma_logit_std * normal).clamp(
            1e-4, 1 - 1e-4
        )
    return flow.shift_sigmas(uniform, mu)


def draw_noise(batch: Batch, latents: Tensor) -> Tensor:
    """Every sample's own noise, whatever the batch it is in: as `latents` (B, N, C)."""
    noise = [
        torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(seed))
        for seed in batch.noise_seeds
    ]
    return torch.stack(noise).to(latents)


class TrainStep:
    """The loss of a batch, by the frozen parts and the (wrapped) `AdapterStep`.

    `faces` counts the faces seen, those without landmarks, and those not found on the estimate.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Any,  # accelerate's Accelerator, which train/trainer.py owns
        frozen: FrozenParts,
        model: nn.Module,
        bank: ReferenceBank | None,
    ) -> None:
        self.config, self.accelerator, self.frozen = config, accelerator, frozen
        self.model, self.bank, self.device = model, bank, frozen.device
        self.faces: Counter[str] = Counter()

    def __call__(self, batch: Batch, batch_number: int = 0) -> tuple[Tensor, dict[str, float]]:
        """The loss of one batch (method section 4) and what is logged of it.

        x_t = (1 - t) x_1 + t x_0          v = x_0 - x_1
        L = L_diffusion + id_loss_weight L_ID + contrastive_loss_weight L_CL

        `batch_number` is the batch's place in the stream: the negatives are drawn by it.
        """
        config, frozen, device = self.config, self.frozen, self.device
        height, width = batch.size

        # 1. Clean latents x_1, noise x_0 and their mixture at t = sigma.
        pixels = batch.pixels.to(device).float() / 127.5 - 1  # (B, 3, H, W)
        latents = frozen.encode_pixels(pixels, batch.latents_keys)  # (B, N, C)
        noise = draw_noise(batch, latents)
        sigma = sigmas_of(config, batch.uniform, frozen.mu(height, width)).to(device)  # (B,)
        noisy_latents = flow.noisy_latents(latents, noise, sigma)

        # 2. What the model sees besides: text, and each person's reference.
        prompt_embeds, pooled = frozen.encode_text(batch.prompts)
        faces = {
            "embeddings": batch.embeddings.to(device),
            "image_features": frozen.image_features(batch),
            "bboxes": batch.bboxes,
            "height": height,
            "width": width,
            "id_scale": batch.id_scale,
            "siglip_scale": batch.siglip_scale,
        }
        transformer = frozen.pipeline.transformer
        dtype = transformer.dtype
        inputs = {
            "hidden_states": noisy_latents.to(dtype),
            "timestep": sigma.to(dtype),
            "encoder_hidden_states": prompt_embeds,
            "pooled_projections": pooled,
            "img_ids": frozen.image_ids(height, width, dtype),
            "txt_ids": torch.zeros(prompt_embeds.shape[1], 3, device=device, dtype=dtype),
        }
        if transformer.config.guidance_embeds:
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
            identity, contrastive, more = self._identity_losses(batch, batch_number, pixels, denoised, sigma)
            loss = loss + config.id_loss_weight * identity + config.contrastive_loss_weight * contrastive
            logs.update(more, id_loss=identity.item(), id_contrastive_loss=contrastive.item())
        logs["loss"] = loss.item()
        return loss, logs

    def _identity_losses(
        self, batch: Batch, batch_number: int, pixels: Tensor, denoised: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """L_ID and L_CL, means over the faces looked at on all processes (0 where there is none)."""
        config = self.config
        sample, face = self.pick_faces(batch, sigma)  # (K,) each
        negatives, owners = None, None
        if config.contrastive_loss_weight > 0:
            negatives, owners = self.negatives(batch, batch_number)
        count = torch.tensor([len(sample)], device=self.device, dtype=torch.float32)
        zero = denoised.sum() * 0
        identity = contrastive = zero
        if len(sample):
            kps = batch.kps[sample, face]  # (K, 5, 2)
            decoded, row = torch.unique(sample, return_inverse=True)
            with self.accelerator.autocast():
                pictures = self.frozen.decode(denoised[decoded], *batch.size)  # (S, 3, H, W)
            if config.id_landmarks == "estimate":
                sample, face, row, kps_estimate = self.detect_on(pictures, batch, sample, face, row)
            else:
                kps_estimate = kps
            kps = batch.kps[sample, face]
            count = torch.tensor([len(sample)], device=self.device, dtype=torch.float32)
        if len(sample):
            # coordinates need full precision: the warp stays outside of autocast
            aligned = align_face(pictures[row].float(), kps_estimate.to(self.device))  # (K, 3, 112, 112)
            aligned_target = align_face(pixels[sample], kps.to(self.device))
            with self.accelerator.autocast():
                generated = self.frozen.recognizer(aligned)  # (K, 512)
                with torch.no_grad():
                    target = self.frozen.recognizer(aligned_target)  # (K, 512)
            identity = id_loss(generated, target).sum()
            if negatives is not None:
                positive = target
                if config.contrastive_positive == "reference":
                    positive = batch.embeddings[sample, face].to(self.device)
                people, allowed = batch.identities[sample, face], None
                if owners is not None:
                    allowed = (owners[None] != people[:, None]).to(self.device)  # (K, M)
                if config.in_batch_negatives:
                    negatives, allowed = self.with_batch(negatives, target, people, sample, allowed)
                contrastive = id_contrastive_loss(
                    generated, positive, negatives, config.contrastive_temperature, allowed
                ).sum()
        # processes see different numbers of faces: divide by the number of all, so that the mean over
        # processes is right
        total = self.accelerator.reduce(count, "sum").item() / self.accelerator.num_processes
        total = max(total, 1e-6) if total > 0 else 1.0
        logs = {"id_faces": float(count.item())}
        return identity / total, contrastive / total, logs

    def pick_faces(self, batch: Batch, sigma: Tensor) -> tuple[Tensor, Tensor]:
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

    def detect_on(
        self, pictures: Tensor, batch: Batch, sample: Tensor, face: Tensor, row: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Landmarks found on the estimate itself (not GT-aligned): the faces found, and where."""
        images = (
            ((pictures.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu()
        )
        found = [self.frozen.pipeline.face_analyzer.detect(image.numpy()) for image in images]
        kps = []
        for s, f, r in zip(sample.tolist(), face.tolist(), row.tolist(), strict=True):
            boxes = np.array([d.bbox for d in found[r]], np.float32).reshape(-1, 4)
            points = np.array([d.kps for d in found[r]], np.float32).reshape(-1, 5, 2)
            kps.append(match_landmarks(np.array([batch.bboxes[s][f]], np.float32), boxes, points)[0])
        kps = torch.from_numpy(np.stack(kps))  # (K, 5, 2)
        keep = torch.isfinite(kps).all(-1).all(-1)
        self.faces["not_found_on_estimate"] += int((~keep).sum())
        return sample[keep], face[keep], row[keep], kps[keep]

    def negatives(self, batch: Batch, batch_number: int) -> tuple[Tensor, Tensor | None]:
        """(M, 512) embeddings of people who are nowhere in the global batch; the same on every process.

        Where a small bank has nobody else, they are anybody's, and whose (M,) is given, so that each face can
        leave itself out.
        """
        identities = torch.full((len(batch.face_mask), self.config.max_faces), -1, dtype=torch.int64)
        identities[:, : batch.identities.shape[1]] = batch.identities
        identities = self.accelerator.gather(identities.to(self.device)).cpu().numpy()
        rng = np.random.default_rng([self.config.seed, 2, batch_number])
        present = np.unique(identities[identities >= 0])
        everybody = len(present) == len(self.bank.names)
        rows = draw_negatives(self.bank, [] if everybody else present, self.config.num_negatives, rng)
        drawn = torch.from_numpy(np.asarray(self.bank.embeddings[rows], np.float32)).to(self.device)
        if not everybody:
            return drawn, None
        return drawn, torch.from_numpy(np.searchsorted(self.bank.start, rows, side="right") - 1)

    def with_batch(
        self,
        negatives: Tensor,
        target: Tensor,
        identities: Tensor,
        sample: Tensor,
        allowed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The batch's other people as further negatives: (M + K, 512), and who is somebody else (K, M + K).

        `allowed` (K, M): the same of the first ones; None: all are.

        An unidentified face counts as somebody else only within one picture.
        """
        identities, sample = identities.to(self.device), sample.to(self.device)
        known = (identities >= 0)[:, None] & (identities >= 0)[None]
        other = known & (identities[:, None] != identities[None])
        together = (sample[:, None] == sample[None]) & ~torch.eye(
            len(sample), dtype=torch.bool, device=self.device
        )
        other = other | (together & ~(known & (identities[:, None] == identities[None])))
        if allowed is None:
            allowed = torch.ones(len(target), len(negatives), dtype=torch.bool, device=self.device)
        return torch.cat([negatives, target]), torch.cat([allowed, other], dim=1)
