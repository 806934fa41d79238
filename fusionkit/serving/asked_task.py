"""The task that a request is for: the one that it names, or the one that the router picks."""

import asyncio
from collections.abc import Collection, Sequence
from typing import Any

from fusionkit.serving.failures import RefusedError, no_task
from fusionkit.serving.gate import Record
from fusionkit.serving.link import Link

AUTO = "auto"
"""The name by which clients ask for the router, where no task has it."""


async def task_of(
    link: Link,
    name: str | None,
    names: Collection[str],
    field: str,
    rows: Sequence[Any],
    record: Record,
) -> tuple[str, dict[str, Any]]:
    """The name of the task that answers.

    Args:
        link: the line to the model's process.
        name: that the request gives.
        names: that it may give.
        field: of the request, in which it stands.
        rows: what is asked, all of one task.
        record: of the request, which gets the task.

    Returns:
        the task; and what the answer says of how it was picked, where it was.

    Raises:
        RefusedError: there is no such task, or no name and no router.
        TimeoutError: the request's time has passed.
    """
    told: dict[str, Any] = {}
    if (name is None or (name == AUTO and AUTO not in names)) and link.router:
        async with asyncio.timeout_at(record.deadline):
            picked = await link.call("pick", [*rows])
        name = str(picked.task)
        told["router"] = {"task": name, "probability": round(picked.probability, 4)}
    elif name is None:
        raise RefusedError(400, f"`{field}` is missing: name the task that answers", param=field)
    elif name not in names:
        raise no_task(name, link.tasks, field)
    record.task = name
    return name, told
