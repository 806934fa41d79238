"""The page at `/`: files of this package, sent as they are, under a policy that lets in no others.

They say nothing of the tasks: what the page shows it asks the API, with a key where one is needed.
"""

from pathlib import Path

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import Response

_FOLDER = Path(__file__).parent / "page"
_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
START = "index.html"


def router() -> APIRouter:
    """The page, and what it is made of; not in the API's schema."""
    routes = APIRouter(include_in_schema=False)
    files = {
        path.name: Response(path.read_bytes(), headers=_HEADERS, media_type=_KINDS[path.suffix])
        for path in sorted(_FOLDER.iterdir())
        if path.suffix in _KINDS
    }

    @routes.get("/")
    async def page() -> Response:
        return files[START]

    @routes.get("/page/{name}")
    async def file(name: str) -> Response:
        if name not in files:
            raise HTTPException(404)
        return files[name]

    return routes
