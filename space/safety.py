"""A hook for a content filter, and the standard safety checker behind it where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessor

#: True for a picture that must not be shown.
ContentFilter = Callable[[Image.Image], bool]

WITHHELD = "This picture was withheld by the content filter. Another seed or other words may help."


def load_filter(where: str | None) -> ContentFilter | None:
    """The checker of a folder or Hub id (CompVis/stable-diffusion-safety-checker); None without one."""
    if not where:
        return None
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessor

    try:
        checker = StableDiffusionSafetyChecker.from_pretrained(where, use_safetensors=True)
        return checker_filter(checker, CLIPImageProcessor.from_pretrained(where))
    except OSError as error:  # a public page must not run without the filter that it was told to use
        raise ValueError(
            f"WITHANYONE_SAFETY_CHECKER is {where!r}, which cannot be loaded: {error}"
        ) from error


def checker_filter(checker: StableDiffusionSafetyChecker, processor: CLIPImageProcessor) -> ContentFilter:
    checker.requires_grad_(False).eval()

    def flagged(image: Image.Image) -> bool:
        pixels = processor(images=image, return_tensors="pt").pixel_values
        _, found = checker(images=[np.asarray(image)], clip_input=pixels)
        return bool(found[0])

    return flagged
