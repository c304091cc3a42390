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


def dtype_name(asked: str | None, device: torch.device | str = "cpu") -> str:
    """The dtype that weights shall have on `device`: the one asked for, by name.

    None: bfloat16 on CUDA, else float32. "auto": bfloat16 also on a CPU that computes in it.
    """
    if asked not in (None, "auto"):
        return asked
    kind = torch.device(device).type
    half = kind == "cuda" or (asked == "auto" and kind == "cpu" and computes_bfloat16(device))
    return "bfloat16" if half else "float32"


def autocast(device: torch.device | str = "cpu") -> torch.autocast:
    """Autocast to bfloat16 on a GPU or a CPU that has it, else plain float32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=computes_bfloat16(device))


def avoid_cudnn_attention() -> None:
    """Leaves attention on a GPU to the other kernels: trainings call it.

    torch 2.11 and later prefer cuDNN's on an H100 or H200, whose gradients in bfloat16 can be NaN
    (pytorch/pytorch#196678): the adapter's loss was NaN in its third step there.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def orthogonalized(update: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Nearest matrix with singular values near 1, by Newton-Schulz (Jordan et al. 2024, "Muon").

    X <- a X + (b X Xᵀ + c (X Xᵀ)²) X with (a, b, c) = (3.4445, -4.7750, 2.0315). update (..., m, n).
    """
    x = update.mT if update.shape[-2] > update.shape[-1] else update
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if update.shape[-2] > update.shape[-1] else x


def muon_matrices(matrices: torch.Tensor) -> torch.Tensor:
    """`orthogonalized` at an AdamW step's size (0.2 √max(m, n), arXiv:2502.16982). matrices (..., m, n)."""
    return orthogonalized(matrices) * (0.2 * max(matrices.shape[-2:]) ** 0.5)


def muon_update(gradient: torch.Tensor, buffer: torch.Tensor, momentum: float) -> torch.Tensor:
    """What Muon subtracts at learning rate 1.

    Nesterov's momentum; `buffer` is moved on. A convolution counts as (outputs, inputs * height * width).
    """
    buffer.lerp_(gradient, 1 - momentum)
    return muon_matrices(gradient.lerp(buffer, momentum).flatten(1)).reshape(gradient.shape)


class _StackedMuon(torch.optim.Muon):
    """`torch.optim.Muon` that orthogonalises all matrices of a shape at once; states are interchangeable.

    A GPU then starts a twentieth of the kernels. Its products are in bfloat16 there, as torch's are; on a CPU
    in the parameters' dtype.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[tuple, list[torch.nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    kind = (parameter.shape, parameter.device, parameter.dtype)
                    alike.setdefault(kind, []).append(parameter)
                    if "momentum_buffer" not in self.state[parameter]:
                        self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            for (_, device, dtype), parameters in alike.items():
                buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
                gradients = [parameter.grad for parameter in parameters]
                torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
                updates = torch.stack(torch._foreach_lerp(gradients, buffers, group["momentum"]))
                updates = muon_matrices(updates.to(torch.bfloat16 if device.type == "cuda" else dtype))
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, list(updates.to(dtype).unbind()), alpha=-group["lr"])
        return loss


def make_muon(
    parameters: Iterable[torch.nn.Parameter] | Iterable[dict], **settings: float
) -> torch.optim.Muon:
    """Muon whose steps have AdamW's size (`match_rms_adamw`), for matrices or groups of them.

    torch's orthogonalises in bfloat16 always, which is most of a training step on a CPU that lacks it (there
    it is done in float32), and one matrix after the other, which is a third of one on a GPU.
    """
    given = list(parameters)
    devices = {p.device for entry in given for p in (entry["params"] if isinstance(entry, dict) else [entry])}
    plain = all(device.type == "cpu" and computes_bfloat16(device) for device in devices)
    kind = torch.optim.Muon if plain else _StackedMuon
    return kind(given, adjust_lr_fn="match_rms_adamw", **settings)
