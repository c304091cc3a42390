"""Optimisers and learning-rate schedules."""

from __future__ import annotations

import importlib
import importlib.util
import math

import torch
from torch import Tensor, nn

from withanyone.precision import make_muon

from .config import TrainConfig

Optimizers = list[tuple[torch.optim.Optimizer, list[str]]]


def is_block_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon takes this parameter: the projections of the cross-attentions."""
    return parameter.ndim == 2 and name.startswith("ipa_")


def make_optimizers(config: TrainConfig, adapter: nn.Module) -> Optimizers:
    """Optimisers with the names of their parameters, in order.

    Raises:
        ValueError: `adamw8bit` without bitsandbytes.
    """
    named = [(name, p) for name, p in adapter.named_parameters() if p.requires_grad]
    adam_settings = {"lr": config.learning_rate, "betas": (config.adam_beta1, config.adam_beta2),
                     "weight_decay": config.weight_decay}  # fmt: skip
    if config.optimizer != "muon":
        kind = torch.optim.AdamW
        if config.optimizer == "adamw8bit":
            kind = _bitsandbytes().optim.AdamW8bit
        elif config.optimizer == "adamw_fused":
            adam_settings["fused"] = True
        return [(kind([p for _, p in named], **adam_settings), [name for name, _ in named])]
    matrices = [(name, p) for name, p in named if is_block_matrix(name, p)]
    rest = [(name, p) for name, p in named if not is_block_matrix(name, p)]
    muon = make_muon([p for _, p in matrices], lr=config.muon_learning_rate, weight_decay=config.weight_decay)
    adam = torch.optim.AdamW([p for _, p in rest], **adam_settings)
    return [(muon, [name for name, _ in matrices]), (adam, [name for name, _ in rest])]


def _bitsandbytes():  # noqa: ANN202
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "`optimizer` adamw8bit needs bitsandbytes, which is not installed: `pip install bitsandbytes` "
            "(a CUDA card is needed), or use `optimizer=adamw`."
        )
    return importlib.import_module("bitsandbytes")


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """What the learning rates are multiplied by at `step`: linear warm-up times the schedule.

    With s the step, S their number, w the warm-up, d the decay and e the share left at the end:
        constant      1
        linear        e + (1 - e) (1 - s / S)
        cosine        e + (1 - e) (1 + cos(pi s / S)) / 2
        inverse_sqrt  sqrt(w / max(s + 1, w))
        wsd           e + (1 - e) min(1, (S - s) / d)
    """
    warmup = min(1.0, (step + 1) / max(1, config.lr_warmup_steps))
    progress = min(1.0, step / config.max_train_steps)
    end = config.lr_end_share
    match config.lr_scheduler:
        case "constant":
            return warmup
        case "inverse_sqrt":
            start = max(1, config.lr_warmup_steps)
            return warmup * math.sqrt(start / max(step + 1, start))
        case "linear":
            share = 1 - progress
        case "cosine":
            share = 0.5 * (1 + math.cos(math.pi * progress))
        case "wsd":
            share = min(1.0, max(0, config.max_train_steps - step) / config.lr_decay_steps)
    return warmup * (end + (1 - end) * share)
