"""Muon for networks with convolutions, AdamW for everything that is no hidden matrix, as one optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from withanyone.precision import muon_update


def hidden_matrices(model: nn.Module, minimum: int = 16) -> list[nn.Parameter]:
    """Weights that Muon suits: dense convolutions and linear maps, not those by channel or of few rows."""
    return [
        module.weight
        for module in model.modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
        and module.weight[0].numel() >= minimum
        and len(module.weight) >= minimum
        and getattr(module, "groups", 1) == 1
    ]


class MuonAdamW(torch.optim.Optimizer):
    """Muon on `matrices` (a convolution counts as (outputs, inputs * height * width)), AdamW on `others`.

    A Muon step has the size of an AdamW step (0.2 √max(m, n), arXiv:2502.16982), so one learning rate serves
    both.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        lr: float,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
    ) -> None:
        groups = [{"params": list(matrices), "muon": True}, {"params": list(others), "muon": False}]
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            update = self._muon if group["muon"] else self._adam
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update(parameter, group), alpha=-group["lr"])
        return loss

    def _muon(self, parameter: nn.Parameter, group: dict) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        return muon_update(parameter.grad, state["momentum"], group["momentum"])

    def _adam(self, parameter: nn.Parameter, group: dict) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        first, second = group["betas"]
        state["mean"].lerp_(parameter.grad, 1 - first)
        state["square"].lerp_(parameter.grad.square(), 1 - second)
        count = state["step"].item()
        mean = state["mean"] / (1 - first**count)
        return mean / ((state["square"] / (1 - second**count)).sqrt() + 1e-8)
