"""One person from one photo.

python examples/one_face.py                          a drawn person, the bundled miniature
python examples/one_face.py --face ada.png --prompt "a smiling person in a forest" --seed 3
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from withanyone import WithAnyonePipeline, slider_scales
from withanyone.mini import PRETRAINED, gallery


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(PRETRAINED))
    parser.add_argument("--face", help="a photo (default: a drawn person)")
    parser.add_argument("--prompt", default="a smiling person wearing a yellow hoodie at the beach")
    parser.add_argument("--similarity", type=float, default=1.0, help="0 to 1.5: how much the face counts")
    parser.add_argument("--diversity", type=float, default=0.5, help="0: like the photo; 1: only who it is")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="one_face.png")
    args = parser.parse_args(argv)

    pipe = WithAnyonePipeline.from_pretrained(args.model)
    id_scale, siglip_scale = slider_scales(args.similarity, args.diversity)
    out = pipe(
        prompt=args.prompt,
        faces=[args.face or gallery.draw_photo(1)],
        id_scale=id_scale,
        siglip_scale=siglip_scale,
        generator=torch.Generator().manual_seed(args.seed),
    )
    out.images[0].save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
