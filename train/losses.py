"""The three losses as pure functions (method section 4; WithAnyone, arXiv 2510.14975, section 4.1).

L = L_diffusion + id_loss_weight * L_ID + contrastive_loss_weight * L_CL
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def diffusion_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Flow matching: mean of (v_predicted - v)^2 a sample. (B, N, C), (B, N, C) -> (B,)."""
    return (predicted.float() - target.float()).square().flatten(1).mean(1)


def id_loss(generated: Tensor, target: Tensor) -> Tensor:
    """L_ID = 1 - cos(f(align(G)), f(align(T))), both aligned by the target's landmarks.

    Embeddings of the generated and of the target's faces, any length of vector: (K, D), (K, D) -> (K,).
    """
    return 1 - F.cosine_similarity(generated.float(), target.float(), dim=-1)


def id_contrastive_loss(
    generated: Tensor,
    positive: Tensor,
    negatives: Tensor,
    temperature: float = 0.1,
    allowed: Tensor | None = None,
) -> Tensor:
    """InfoNCE with extended negatives, the positive in the denominator too:

        L_CL = -log( e^{cos(g, r) / tau} / (e^{cos(g, r) / tau} + sum_j e^{cos(g, n_j) / tau}) )

    Args:
        generated: (K, D) embeddings g of generated faces. positive: (K, D), r: the same people's.
        negatives: (M, D) embeddings n_j of other people, one set for all K.
        temperature: tau.
        allowed: (K, M) bool: whether n_j is somebody else than face k; None: all are.

    Returns:
        (K,)
    """
    g = F.normalize(generated.float(), dim=-1)
    to_positive = (g * F.normalize(positive.float(), dim=-1)).sum(-1, keepdim=True)  # (K, 1)
    to_negatives = g @ F.normalize(negatives.float(), dim=-1).T  # (K, M)
    if allowed is not None:
        to_negatives = to_negatives.masked_fill(~allowed, -torch.inf)
    logits = torch.cat([to_positive, to_negatives], dim=1) / temperature  # (K, 1 + M)
    return torch.logsumexp(logits, dim=1) - logits[:, 0]
