"""WithAnyone: pictures of particular people from a prompt and photos, on FLUX.1.

The names below are loaded when they are first used, so that parts which need neither torch nor diffusers (the
command line's help, the drawn world) start at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter import FaceAdapter
    from .faces import Face, FaceAnalyzer
    from .pipeline import WithAnyonePipeline, slider_scales

__all__ = ["Face", "FaceAdapter", "FaceAnalyzer", "WithAnyonePipeline", "slider_scales"]

_HOMES = {
    "Face": "faces",
    "FaceAdapter": "adapter",
    "FaceAnalyzer": "faces",
    "WithAnyonePipeline": "pipeline",
    "slider_scales": "pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
