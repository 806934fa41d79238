"""The HTTP server's routes, and what answers where there is none."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import Response

from fusionkit.errors import FusionKitError
from fusionkit.serving import changes, classifying, openai, page
from fusionkit.serving.changer import Changer
from fusionkit.serving.failures import SOON, ErrorBody, RefusedError, failure, malformed
from fusionkit.serving.figures import Figures
from fusionkit.serving.gate import BEARER, Gate, record_of
from fusionkit.serving.link import Link
from fusionkit.serving.responses import State
from fusionkit.serving.settings import Settings

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request can't be answered as it stands"},
    "5XX": {"model": ErrorBody, "description": "The server can't answer now"},
}


class Health:
    """Whether the server stops: it answers what runs, and takes nothing new."""

    def __init__(self) -> None:
        self.stopping = False


def app_of(
    settings: Settings, link: Link, figures: Figures, health: Health, lifespan: Lifespan
) -> FastAPI:
    """The application.

    Args:
        settings: how the server is set up.
        link: the line to the model's process.
        figures: counts requests.
        health: whether the server stops.
        lifespan: runs around the application.
    """
    app = FastAPI(
        title="FusionKit",
        version=version("fusionkit"),
        summary="A bundle's tasks: one base in memory, every answer the task's own.",
        lifespan=lifespan,
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        responses=_ERRORS,
    )
    app.add_middleware(Gate, settings=settings, ended=figures.ended)
    _handle_errors(app, settings.limits.seconds)
    _add_states(app, link, health)
    app.include_router(page.router())
    keyed = [BEARER] if settings.keys else []
    answering = openai if link.kind == "generation" else classifying
    app.include_router(answering.router(link, settings.limits), dependencies=keyed)
    app.include_router(_figures(link, figures), dependencies=keyed)
    changer = Changer(link, settings)
    app.include_router(changes.tasks(changer), dependencies=keyed)
    app.include_router(
        changes.changing(changer), dependencies=[BEARER], include_in_schema=bool(settings.admin)
    )
    return app


def _handle_errors(app: FastAPI, seconds: float) -> None:
    async def refused(request: Request, error: Exception) -> Response:
        return failure(error, record_of(request.scope).number, seconds).response()

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        field = getattr(request.scope["route"], "body_field", None)
        body = getattr(getattr(field, "field_info", None), "annotation", None)
        fields = getattr(body, "model_fields", {})
        return malformed(
            error.errors(), {name: each.description or name for name, each in fields.items()}
        ).response()

    async def absent(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path, status, headers = request.url.path[:100], error.status_code, error.headers
        if status == 404:
            found = RefusedError(404, f"nothing is at {path}; GET /openapi.json says what there is")
        elif status == 405:
            found = RefusedError(405, f"{path} does not take {request.method}", headers=headers)
        else:
            found = RefusedError(status, str(error.detail), headers=headers)
        return found.response()

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, absent)
    for kind in (RefusedError, FusionKitError, TimeoutError):
        app.add_exception_handler(kind, refused)


def _add_states(app: FastAPI, link: Link, health: Health) -> None:
    @app.get("/health", tags=["state"])
    async def alive() -> State:
        """Whether the server runs."""
        return State(status="ok")

    @app.get("/ready", tags=["state"])
    async def ready() -> State:
        """Whether requests are taken: the model is loaded, and the server does not stop."""
        if health.stopping or link.ready is None:
            why = "the server stops" if health.stopping else "the model is loaded again"
            raise RefusedError(503, f"{why}; ask again in a while", "stopped", headers=SOON)
        return State(status="ready")


def _figures(link: Link, figures: Figures) -> APIRouter:
    routes = APIRouter(tags=["state"])

    @routes.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        """Figures, as Prometheus reads them."""
        figures.running.set(link.waiting)
        engine = {} if link.ready is None else await link.call("figures")
        return Response(figures.text(engine), media_type=CONTENT_TYPE_LATEST)

    return routes
