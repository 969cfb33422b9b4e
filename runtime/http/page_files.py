"""The files of the chat page."""

from __future__ import annotations

import mimetypes
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from privatelora.runtime.http.errors import ApiError

FOLDER = Path(__file__).parent / "page"
HEADERS = {
    # Nothing from elsewhere is loaded and nothing is sent elsewhere: what people write stays here.
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


async def index(request: Request) -> Response:
    """``GET /``."""
    return _answer("index.html")


async def file(request: Request) -> Response:
    """``GET /page/NAME``."""
    return _answer(request.path_params["name"])


def _answer(name: str) -> Response:
    # Names are compared with what there is, never put into a path.
    found = next((path for path in FOLDER.iterdir() if path.name == name and path.is_file()), None)
    if found is None:
        raise ApiError(f"the page has no file {name[:80]!r}", status=404, code="not_found")
    media_type = mimetypes.guess_type(found.name)[0] or "application/octet-stream"
    return Response(found.read_bytes(), headers=HEADERS, media_type=media_type)
