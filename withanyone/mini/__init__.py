"""The miniature: a drawn world, and a small pipeline trained on it from nothing. `PRETRAINED` is its
folder."""

from pathlib import Path

#: The bundled miniature: a pipeline folder like any other, for `WithAnyonePipeline.from_pretrained`.
PRETRAINED = Path(__file__).parent / "pretrained"

__all__ = ["PRETRAINED"]
