"""Ask a running page for a picture as a language model's tool does: by the Model Context Protocol.

    make demo                                                     # in one terminal
    python examples/call_the_page_by_mcp.py --photo ada.png       # in another

Programs that speak MCP take the same address: http://127.0.0.1:7860/gradio_api/mcp/
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import mimetypes
from collections.abc import Sequence
from pathlib import Path

from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client


def data_url(photo: str) -> str:
    kind = mimetypes.guess_type(photo)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(Path(photo).read_bytes()).decode()}"


async def ask(page: str, photos: Sequence[str], out: str, **given) -> None:
    address = f"{page.rstrip('/')}/gradio_api/mcp/"
    async with streamable_http_client(address) as (read, write, _), ClientSession(read, write) as session:
        await session.initialize()
        tools = (await session.list_tools()).tools
        print("tools:", ", ".join(tool.name for tool in tools))
        tool = next(tool.name for tool in tools if tool.name.endswith("generate"))
        people = {f"photo_{i}": data_url(photo) for i, photo in enumerate(photos, start=1)}
        answer = await session.call_tool(tool, {**people, **given, "consent": True})
        if answer.isError:
            raise SystemExit(answer.content[0].text)
        for part in answer.content:
            if part.type == "image":
                Path(out).write_bytes(base64.b64decode(part.data))
                print(out)
            else:
                print(part.text)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", default="http://127.0.0.1:7860")
    parser.add_argument("--photo", action="append", required=True, help="one for each person")
    parser.add_argument("--prompt", default="a smiling person at the beach")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="by_mcp.png")
    args = parser.parse_args(argv)
    asyncio.run(ask(args.page, args.photo, args.out, prompt=args.prompt, steps=args.steps, seed=args.seed))


if __name__ == "__main__":
    main()
