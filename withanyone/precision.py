"""Which machines compute in bfloat16, which only pretend to, and what to do on those."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch


def computes_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Whether products in bfloat16 are worth it on `device`.

    Every CPU can do them, but one without instructions for it (AVX2 and less) takes a hundred times as long
    as in float32: oneDNN says which is which.
    """
    if torch.device(device).type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def cpu_autocast() -> torch.autocast:
    """Autocast to bfloat16 on a CPU that has it, else plain float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=computes_bfloat16())


def orthogonalized(update: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Nearest matrix with singular values near 1, by Newton-Schulz (Jordan et al. 2024, "Muon").

    X <- a X + (b X Xᵀ + c (X Xᵀ)²) X with (a, b, c) = (3.4445, -4.7750, 2.0315). update (m, n).
    """
    x = update.T if update.shape[0] > update.shape[1] else update
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if update.shape[0] > update.shape[1] else x


def muon_update(gradient: torch.Tensor, buffer: torch.Tensor, momentum: float) -> torch.Tensor:
    """What Muon subtracts at learning rate 1, of an AdamW step's size (0.2 √max(m, n), arXiv:2502.16982).

    Nesterov's momentum; `buffer` is moved on. A convolution counts as (outputs, inputs * height * width).
    """
    buffer.lerp_(gradient, 1 - momentum)
    matrix = gradient.lerp(buffer, momentum).flatten(1)
    return orthogonalized(matrix).reshape(gradient.shape) * (0.2 * max(matrix.shape) ** 0.5)


class _Float32Muon(torch.optim.Muon):
    """`torch.optim.Muon` with its products in the parameters' dtype; states are interchangeable."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                update = muon_update(parameter.grad, state["momentum_buffer"], group["momentum"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"])
        return loss


def make_muon(
    parameters: Iterable[torch.nn.Parameter] | Iterable[dict], **settings: float
) -> torch.optim.Muon:
    """Muon whose steps have AdamW's size (`match_rms_adamw`), for matrices or groups of them.

    torch's orthogonalises in bfloat16 always, which is most of a training step on a CPU that lacks it: there
    it is done in float32.
    """
    given = list(parameters)
    devices = {p.device for entry in given for p in (entry["params"] if isinstance(entry, dict) else [entry])}
    kind = torch.optim.Muon if all(map(computes_bfloat16, devices)) else _Float32Muon
    return kind(given, adjust_lr_fn="match_rms_adamw", **settings)
