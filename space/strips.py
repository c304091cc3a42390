"""The strips over the sliders: one picture at several positions of one slider, made by the miniature.

python -m space.strips [--seed 3] [--person 5]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from withanyone import WithAnyonePipeline, slider_scales
from withanyone.mini import PRETRAINED, gallery

FOLDER = Path(__file__).parent / "strips"
PROMPT = "a smiling person wearing a green shirt in a garden with flowers"
#: (similarity, diversity) of each picture, from left to right.
STRIPS = {
    "similarity": [(0.0, 0.5), (0.5, 0.5), (1.0, 0.5), (1.5, 0.5)],
    "diversity": [(1.0, 0.0), (1.0, 1 / 3), (1.0, 2 / 3), (1.0, 1.0)],
}


def strip(
    pipe: WithAnyonePipeline, positions: Sequence[tuple[float, float]], person: int, seed: int
) -> Image.Image:
    """A picture for each position, side by side."""
    photo = gallery.draw_photo(person)
    tiles = []
    for position in positions:
        id_scale, siglip_scale = slider_scales(*position)
        generator = torch.Generator("cpu").manual_seed(seed)
        out = pipe(
            PROMPT, faces=[photo], id_scale=id_scale, siglip_scale=siglip_scale, num_candidates=1,
            generator=generator,
        )  # fmt: skip
        tiles.append(out.images[0])
    width, height = tiles[0].size
    sheet = Image.new("RGB", (width * len(tiles), height))
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i * width, 0))
    return sheet


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--person", type=int, default=5)
    args = parser.parse_args(argv)
    pipe = WithAnyonePipeline.from_pretrained(PRETRAINED)
    FOLDER.mkdir(exist_ok=True)
    for name, positions in STRIPS.items():
        strip(pipe, positions, args.person, args.seed).save(FOLDER / f"{name}.jpg", quality=85)
        print(FOLDER / f"{name}.jpg")


if __name__ == "__main__":
    main()
