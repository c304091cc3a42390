"""Two people, each in a box: who stands where, and how large.

python examples/two_faces_in_boxes.py                two drawn people, the bundled miniature
python examples/two_faces_in_boxes.py --face ada.png --face bela.png --seed 3
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from withanyone import WithAnyonePipeline
from withanyone.mini import PRETRAINED, gallery


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(PRETRAINED))
    parser.add_argument("--face", action="append", help="a photo; twice (default: drawn people)")
    parser.add_argument("--prompt", default="two people at the beach in daylight")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="two_faces.png")
    args = parser.parse_args(argv)

    pipe = WithAnyonePipeline.from_pretrained(args.model)
    width, height = gallery.size_for(2, "landscape")
    # Boxes are (x1, y1, x2, y2) in pixels of the picture, tight around a face from forehead to chin, one for
    # each person in the order of `faces`. The second person stands further back, so the face is smaller.
    bboxes = [
        (0.16 * width, 0.22 * height, 0.42 * width, 0.70 * height),
        (0.62 * width, 0.26 * height, 0.82 * width, 0.62 * height),
    ]
    out = pipe(
        prompt=args.prompt,
        faces=args.face or [gallery.draw_photo(1), gallery.draw_photo(2)],
        bboxes=bboxes,
        width=width,
        height=height,
        generator=torch.Generator().manual_seed(args.seed),
    )
    out.images[0].save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
