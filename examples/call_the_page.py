"""Ask a running page for a picture, from another program.

    make demo                                                     # in one terminal
    python examples/call_the_page.py --photo ada.png --photo bela.png     # in another

`client.view_api()` lists the endpoints with their types.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence

from gradio_client import Client, handle_file


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", default="http://127.0.0.1:7860", help="its address, or a Space's name")
    parser.add_argument("--photo", action="append", required=True, help="one for each person")
    parser.add_argument("--prompt", default="two people at the beach in daylight")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="from_the_page.png")
    args = parser.parse_args(argv)

    client = Client(args.page, verbose=False)
    boxes = client.predict(num_people=len(args.photo), width=192, height=192, api_name="/suggest_layout")
    print("the page would place the faces at", boxes)
    picture, settings, people = client.predict(
        prompt=args.prompt,
        **{f"photo_{i}": handle_file(photo) for i, photo in enumerate(args.photo, start=1)},
        steps=args.steps,
        seed=args.seed,
        consent=True,  # the people in the photos agree
        api_name="/generate",
    )
    shutil.copy(picture, args.out)
    print(f"{args.out}: seed {settings['seed']}, {settings['width']} x {settings['height']} pixels")
    print("\n".join(people["words"]))
    client.close()


if __name__ == "__main__":
    main()
