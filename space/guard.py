"""What stands between the web and Gradio: uploads within limits, and no file but those meant to be fetched.

Gradio stores an upload under a hash of its content, so that two visitors with the same photo share one file,
and serves every file of its upload folder. Here each upload gets a path of its own, none is ever served, and
of all else only programs' results are.
"""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import unquote

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from .visits import Visits

API = "/gradio_api"
# Parts of Gradio's server that this page does not use and that read, fetch or store files.
UNUSED = ("/proxy=", "/process_recording", "/stream/", "/deep_link", "/upload_progress/")


class Guard:
    """ASGI middleware around Gradio's app. behind_proxy: whether X-Forwarded-For can be believed."""

    def __init__(self, app: Any, visits: Visits, behind_proxy: bool = False):
        self.app = app
        self.visits = visits
        self.behind_proxy = behind_proxy

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        answer = None
        if scope["type"] == "http":
            path = re.sub(r"/{2,}", "/", scope["path"])
            at = path.find(API + "/")
            inner = path[at + len(API) :] if at >= 0 else path
            if inner == "/" and scope["method"] == "HEAD":
                # Gradio asks this of itself when it starts, waits three seconds for the whole page to be put
                # together, and gives up; on a busy machine that takes longer.
                answer = PlainTextResponse("")
            elif inner.rstrip("/") == "/upload" and scope["method"] == "POST":
                answer = await self.upload(Request(scope, receive))
            elif inner.startswith(("/file=", "/file/")) and not self.visits.may_serve(unquote(inner[6:])):
                answer = PlainTextResponse("There is no such file, or it is not yours.", status_code=403)
            elif inner.startswith(UNUSED):
                answer = PlainTextResponse("Not offered here.", status_code=404)
            else:
                send = _never_stored(send) if inner.startswith("/file") else send
        await (answer or self.app)(scope, receive, send)

    async def upload(self, request: Request) -> Response:
        """Gradio's upload: multipart field `files` in, a JSON list of paths out."""
        limits = self.visits.limits
        if not self.visits.uploads.allow(visitor_address(request, self.behind_proxy)):
            text = f"More than {limits.uploads_per_minute} uploads a minute: wait a moment."
            return PlainTextResponse(text, status_code=429)
        too_large = PlainTextResponse(
            f"The file is larger than {limits.upload_bytes // 10**6} MB: upload a smaller copy.",
            status_code=413,
        )
        room = limits.upload_bytes + 10_000  # for the form around the file
        stated = request.headers.get("content-length", "")
        if stated.isdigit() and int(stated) > room:
            return too_large
        receive, arrived = request.receive, 0

        async def counted() -> dict:
            nonlocal arrived
            message = await receive()
            arrived += len(message.get("body", b""))
            if arrived > room:
                raise MultiPartException("too large")
            return message

        try:
            async with Request(request.scope, counted).form(max_files=1, max_fields=1) as form:
                file = form.get("files")
                if not isinstance(file, UploadFile):
                    return PlainTextResponse("Send one file in the field `files`.", status_code=400)
                name = re.sub(r"[^\w.-]", "_", file.filename or "")[-60:].lstrip(".") or "photo"
                path = self.visits.new_upload(name)
                path.write_bytes(await file.read())
        except MultiPartException as error:
            return too_large if arrived > room else PlainTextResponse(str(error.message), status_code=400)
        except KeyError:
            return PlainTextResponse("The upload has no form boundary.", status_code=400)
        return Response(json.dumps([str(path)]), media_type="application/json")


def visitor_address(request: Any, behind_proxy: bool) -> str:
    """Who asks: the client's address, which a Space's proxy names in X-Forwarded-For."""
    forwarded = request.headers.get("x-forwarded-for", "") if behind_proxy else ""
    if forwarded:
        return forwarded.split(",")[0].strip()
    return request.client.host if request.client else "unknown"


def _never_stored(send: Any) -> Any:
    async def with_header(message: dict) -> None:
        if message["type"] == "http.response.start":
            kept = [pair for pair in message["headers"] if pair[0].lower() != b"cache-control"]
            message = {**message, "headers": [*kept, (b"cache-control", b"no-store, private")]}
        await send(message)

    return with_header
