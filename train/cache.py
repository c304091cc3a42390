"""Tensors kept on disk under names: latents of pictures, embeddings of captions.

A file an entry, written aside and renamed, so that several processes may fill one cache and a stop leaves no
half of one. An entry's name says everything that its content depends on.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def module_stamp(*modules: nn.Module) -> str:
    """Names networks by their weights: shapes, and the first numbers of every parameter."""
    digest = hashlib.sha256()
    for module in modules:
        for name, parameter in module.named_parameters():
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            first = parameter.detach().flatten()[:16]
            digest.update(first.cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


class TensorCache:
    """Named sets of tensors under a folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def _path(self, name: str) -> Path:
        digest = hashlib.sha256(name.encode()).hexdigest()[:40]
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def get(self, name: str) -> dict[str, Tensor] | None:
        """The tensors kept under `name`, on the CPU; None where there are none."""
        path = self._path(name)
        return load_file(path) if path.exists() else None

    def put(self, name: str, tensors: dict[str, Tensor]) -> None:
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}.partial")
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, aside)
        os.replace(aside, path)
