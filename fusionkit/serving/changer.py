"""Adds tasks to a bundle that is served, and removes them.

A model that is added is read, checked and compressed by a process of its own, `fusionkit add`: what
is wrong with it, and what that takes, is not the server's; and the bundle on disk has the task
wholly, or not at all.
"""

import asyncio
import os
import re
import shutil
import sys
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import Request

from fusionkit.bundles.bundle import Bundle
from fusionkit.bundles.manifest import Manifest
from fusionkit.checkpoints.safetensors_file import SafetensorsFile
from fusionkit.errors import BundleError, CheckpointError
from fusionkit.serving.failures import RefusedError, no_task
from fusionkit.serving.gate import record_of
from fusionkit.serving.link import Link
from fusionkit.serving.responses import Served, TaskList
from fusionkit.serving.settings import Settings

_NAME = re.compile(r"\w[\w.-]{0,99}")
_NAMED = (
    "a task's name has letters, digits, '_', '-' and '.', begins with none of the last two, and is "
    "at most 100 long"
)
_FILES = (".safetensors", ".json", ".jinja", ".txt", ".model", ".md")
"""What files that are sent may be: none that code could be in."""
_POLITELY = ("nice", "-n", "10") if shutil.which("nice") else ()


class Changer:
    """Changes the bundle, one change at a time, and tells the engine.

    Args:
        link: the line to the model's process.
        settings: where models may be, and how large one that is sent.
    """

    def __init__(self, link: Link, settings: Settings) -> None:
        self._link, self._settings = link, settings
        self._lock = asyncio.Lock()

    @property
    def tasks(self) -> TaskList:
        """The tasks that are served."""
        return TaskList(
            kind=self._link.kind, router=self._link.router, tasks=self._served(self._link.tasks)
        )

    def _served(self, names: tuple[str, ...]) -> list[Served]:
        records = Manifest.read(self._settings.bundle).tasks
        known = [name for name in names if name in records]
        return [Served(name=name, bytes=records[name].file.bytes) for name in known]

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """A context in which nobody else changes the bundle over HTTP."""
        async with self._lock:
            yield

    def located(self, path: str) -> Path:
        """Where a path below the root leads.

        Raises:
            RefusedError: there is no root, or nothing there, or it leads out of the root.
        """
        root = self._settings.tasks_root
        if root is None:
            raise RefusedError(
                403,
                "no models on the server's disk can be added here; whoever runs the server can "
                "allow it: --tasks-root FOLDER; or send the model, PUT /tasks/NAME",
                "off",
                "path",
            )
        outside = RefusedError(400, "`path` leads out of the server's --tasks-root", param="path")
        root = root.resolve()
        try:
            found = (root / path).resolve()
            if not found.is_relative_to(root) or found == root:
                raise outside
            if not found.exists():
                raise RefusedError(
                    400, "`path`: nothing is there below the server's --tasks-root", param="path"
                )
            inside = [found, *(found.rglob("*") if found.is_dir() else ())]
            if not all(each.resolve().is_relative_to(root) for each in inside):
                raise outside
        except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, a circle
            raise RefusedError(400, "`path` is no path", param="path") from error
        return found

    async def add(self, name: str, path: Path) -> Served:
        """Add a model to the bundle, and serve it.

        Raises:
            RefusedError: it can't be added; nothing has changed.
        """
        if not _NAME.fullmatch(name):
            raise RefusedError(400, f"`name`: {_NAMED}", param="name")
        if name in self._link.tasks:
            raise RefusedError(
                409, f"there is a task '{name}' already; remove it first, or name this otherwise"
            )
        try:
            await asyncio.to_thread(_check_files, path)
        except CheckpointError as error:
            raise RefusedError(400, self._told(str(error), path), "not_added") from error
        await self._run("add", str(self._settings.bundle), f"{name}={path}", path)
        self._link.tasks = await self._link.call("add", name)
        return self._served((name,))[0]

    async def remove(self, name: str) -> None:
        """Take a task out of the bundle, and serve it no more.

        Raises:
            RefusedError: there is none of this name, or no other.
        """
        if name not in self._link.tasks:
            raise no_task(name, self._link.tasks, "name")
        try:
            await asyncio.to_thread(Bundle(self._settings.bundle).remove, name)
        except BundleError as error:
            raise RefusedError(409, self._told(str(error))) from error
        self._link.tasks = await self._link.call("remove", name)

    async def _run(self, verb: str, bundle: str, model: str, path: Path) -> None:
        """Run a verb of the command line, at a low priority."""
        base = [] if self._settings.base is None else ["--base", self._settings.base]
        process = await asyncio.create_subprocess_exec(
            *_POLITELY,
            *(sys.executable, "-m", "fusionkit", verb, bundle, model, *base),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env={name: v for name, v in os.environ.items() if not name.startswith("FUSIONKIT_")},
        )
        try:
            said = (await process.communicate())[1].decode(errors="replace")
        finally:
            if process.returncode is None:  # nobody waits for it
                process.kill()
        if process.returncode == 0:
            return
        head = f"fusionkit {verb}: "
        if head not in said:
            raise RuntimeError(f"fusionkit {verb} failed: {said}")
        message = said[said.index(head) + len(head) :].strip()
        raise RefusedError(400, self._told(message, path), "not_added")

    def _told(self, message: str, model: Path | None = None) -> str:
        """A message, without where things are on the server's disk."""
        if model is not None:
            message = message.replace(str(model), "the model")
        return message.replace(str(self._settings.bundle), "the bundle")

    async def unpacked(self, request: Request, folder: Path) -> None:
        """Receive a tar, and unpack it to `folder`'s `model`.

        Raises:
            RefusedError: it is too large, or no tar of a model's folder.
        """
        limit, size = self._settings.limits.upload, 0
        too_large = RefusedError(
            413, f"the model has more than {limit:,} bytes, the most that is taken", "too_large"
        )
        tar = folder / "model.tar"
        with tar.open("wb") as file:
            async for piece in request.stream():
                size += len(piece)
                if size > limit:
                    raise too_large
                await asyncio.to_thread(file.write, piece)
        record_of(request.scope).deadline += 3600
        await asyncio.to_thread(_unpack, tar, folder / "model", limit)
        tar.unlink()


def _check_files(path: Path) -> None:
    """Refuse files that are cut short, which their beginnings tell, before a process is started.

    Raises:
        CheckpointError: one is.
    """
    for file in [path] if path.is_file() else sorted(path.rglob("*.safetensors")):
        if file.suffix == ".safetensors":
            SafetensorsFile(file, str(file))


def _unpack(tar: Path, folder: Path, limit: int) -> None:
    folder.mkdir()
    try:
        with tarfile.open(tar, "r:") as archive:
            members = [each for each in archive.getmembers() if not each.isdir()]
            too_large = RefusedError(
                413, f"unpacked, it has more than {limit:,} bytes", "too_large"
            )
            if sum(each.size for each in members) > limit:
                raise too_large
            for each in members:
                name = Path(each.name).name
                if not each.isfile() or each.issparse() or Path(name).suffix not in _FILES:
                    raise RefusedError(
                        400,
                        f"'{each.name[:100]}': a model that is sent has plain files alone, of the "
                        f"kinds {', '.join(_FILES)}; save it as safetensors",
                    )
                if (folder / name).exists():
                    raise RefusedError(
                        400,
                        f"'{name[:100]}' is there twice; send one folder: tar -C FOLDER -c .",
                    )
                source = archive.extractfile(each)
                assert source is not None
                with source, (folder / name).open("wb") as file:
                    shutil.copyfileobj(source, file)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise RefusedError(
            400, "the body is no tar of a model's folder: tar -C FOLDER -c . | curl -T - …"
        ) from error
    if not members:
        raise RefusedError(400, "the tar has no files; send a model's folder: tar -C FOLDER -c .")
