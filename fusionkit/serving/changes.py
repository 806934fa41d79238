"""The routes of tasks that are added and removed while the others are served."""

import asyncio
import tempfile
from pathlib import Path

from fastapi import APIRouter, Request

from fusionkit.serving.bodies import AddBody
from fusionkit.serving.changer import Changer
from fusionkit.serving.responses import Served, TaskList

_TAR = {
    "requestBody": {
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        "required": True,
    }
}


def tasks(changer: Changer) -> APIRouter:
    """The route that tells the tasks.

    Args:
        changer: knows them.
    """
    routes = APIRouter(tags=["tasks"])

    @routes.get("/tasks")
    async def served() -> TaskList:
        """The tasks that are served, and their bytes on disk."""
        return changer.tasks

    return routes


def changing(changer: Changer) -> APIRouter:
    """The routes that change the tasks.

    Args:
        changer: does it.
    """
    routes = APIRouter(tags=["tasks"])

    @routes.post("/tasks", status_code=201)
    async def add(body: AddBody, request: Request) -> Served:
        """Add a fine-tuned model that is on the server's disk; with the admin token."""
        path = await asyncio.to_thread(changer.located, body.path)
        async with changer.alone():
            return await changer.add(body.name, path)

    @routes.put("/tasks/{name}", status_code=201, openapi_extra=_TAR)
    async def send(name: str, request: Request) -> Served:
        """Add a fine-tuned model that is sent: a tar of its folder; with the admin token."""
        async with changer.alone():
            with tempfile.TemporaryDirectory(prefix="fusionkit-") as folder:
                await changer.unpacked(request, Path(folder))
                return await changer.add(name, Path(folder, "model"))

    @routes.delete("/tasks/{name:path}")
    async def remove(name: str, request: Request) -> TaskList:
        """Remove a task; with the admin token. Its running requests end as they would."""
        async with changer.alone():
            await changer.remove(name)
        return changer.tasks

    return routes
