"""The page: faces in, a prompt, boxes, two sliders, a picture out. `python app.py`, or `make demo`.

Runs the bundled miniature unless WITHANYONE_MODEL (or --model) names another pipeline folder or Hub id; what
else the environment says is told in space/machines.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence

from space.machines import Settings
from space.page import build_demo
from space.studio import Studio
from space.visits import Limits

__all__ = ["build_demo", "main"]


def main(argv: Sequence[str] | None = None) -> None:
    settings = Settings.from_environment()
    parser = argparse.ArgumentParser(description="The page of WithAnyone.")
    parser.add_argument("--model", default=settings.model)
    parser.add_argument("--host", default=None, help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=None)
    parser.add_argument(
        "--requests-per-minute", type=int, help="of one visitor, in place of the limits in space/visits.py"
    )
    parser.add_argument("--no-browser", action="store_true", help="do not open a browser")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(0)
    )  # so that visitors' files go before the process does
    studio = Studio(settings=dataclasses.replace(settings, model=args.model))
    limits = Limits()
    if args.requests_per_minute is not None:
        most = args.requests_per_minute
        limits = Limits(uploads_per_minute=most, pictures_per_minute=most, calls_per_minute=most)
    demo = build_demo(studio=studio, limits=limits)
    if settings.zero_gpu:  # the GPU's process is forked from this one and must find the model in it
        _ = studio.pipe
    else:  # the page opens at once; the model loads while the visitor looks around
        threading.Thread(target=studio.warm_up, daemon=True).start()
    screen = sys.platform in ("darwin", "win32") or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    demo.launch(
        server_name=args.host,
        server_port=args.port,
        inbrowser=screen and not args.no_browser,
        mcp_server=True,
    )


if __name__ == "__main__":
    main()
