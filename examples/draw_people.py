"""Drawn people to try the miniature with: each number is somebody, each photo shows them at another time.

python examples/draw_people.py --out people          three photos each of six people, and a sheet of them
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from withanyone.mini import gallery


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--numbers", type=int, nargs="+", default=list(gallery.CAST.values())[:6])
    parser.add_argument("--photos", type=int, default=3)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--out", default="people", help="a folder")
    args = parser.parse_args(argv)

    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    sheet = Image.new("RGB", (args.size * args.photos, args.size * len(args.numbers)))
    for row, number in enumerate(args.numbers):
        for column in range(args.photos):
            photo = gallery.draw_photo(number, column, args.size)
            photo.save(folder / f"{number}_{column}.png")
            sheet.paste(photo, (column * args.size, row * args.size))
    sheet.save(folder / "sheet.png")
    print(folder / "sheet.png")


if __name__ == "__main__":
    main()
