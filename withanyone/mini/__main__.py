"""`python -m withanyone.mini COMMAND`: everything that draws the world, trains the miniature and measures it.

Commands come from the modules' own COMMANDS tables: name -> (add_arguments, run).
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

#: Command -> module that has it in its COMMANDS, so that starting one command imports one module.
MODULES = {
    "cases": "records",
    "shards": "records",
    "sheet": "records",
    "records": "recycle",
    "pictures": "pictures",
    "text": "text",
    "latents": "latents",
    "decoder": "decoder",
    "image-encoder": "vision",
    "base": "base",
    "guidance": "base",
    "latent-pictures": "base",
    "recognizer": "facepack",
    "detector": "facepack",
    "judge": "facepack",
    "faces-figures": "facepack",
    "reader": "reader",
    "evaluate": "evaluate",
    "defaults": "evaluate",
    "sliders": "evaluate",
    "people": "evaluate",
    "assemble": "build",
    "build": "build",
    "card": "card",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m withanyone.mini", description=__doc__.splitlines()[0])
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in argv if word in MODULES), None)
    for name, module in MODULES.items():
        subparser = subparsers.add_parser(name, help=f"of withanyone/mini/{module}.py")
        if name == chosen:
            add_arguments, run = importlib.import_module(f"withanyone.mini.{module}").COMMANDS[name]
            add_arguments(subparser)
            subparser.set_defaults(run=run)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    args.run(args)


if __name__ == "__main__":
    main()
