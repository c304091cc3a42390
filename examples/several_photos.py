"""Several photos of one person: what differs between them (pose, light) averages out of the identity.

python examples/several_photos.py                    three pictures of a drawn person, the bundled miniature
python examples/several_photos.py --photos ada_1.png ada_2.png ada_3.png
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
    parser.add_argument("--photos", nargs="+", help="photos of one person (default: a drawn person)")
    parser.add_argument("--prompt", default="a laughing person with short black hair in a garden")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="several_photos.png")
    args = parser.parse_args(argv)

    pipe = WithAnyonePipeline.from_pretrained(args.model)
    photos = args.photos or [gallery.draw_photo(1, photo) for photo in range(3)]
    # A list inside `faces` is one person. How alike the photos are can be asked first: a low cosine here is a
    # photo of somebody else, or one on which the face is hardly seen.
    found = [pipe.face_analyzer.largest_face(photo) for photo in photos]
    for i, face in enumerate(found[1:], start=2):
        print(f"photo {i}: cosine {float(face.normed_embedding @ found[0].normed_embedding):.2f} to photo 1")
    out = pipe(
        prompt=args.prompt,
        faces=[found],
        generator=torch.Generator().manual_seed(args.seed),
    )
    out.images[0].save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
