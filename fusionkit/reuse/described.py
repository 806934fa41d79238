"""A ReuseModule in a line."""

from typing import Any

from fusionkit.bundles.bundle import Bundle
from fusionkit.task_vectors.task_source import TaskSource


def described(module: Any, source: TaskSource | None) -> str:
    """A module's base, codec, tasks, the active one, and its bundle.

    Args:
        module: a ReuseModule.
        source: where its tasks come from, if that is open.
    """
    opened = source if isinstance(source, Bundle) else None
    path = opened.path if opened else module.bundle_path
    said = {
        "base": None if module.base_source is None else module.base_source.label,
        "codec": opened.codec if opened else module.codec,
        "tasks": tuple(module.finetuned) if source is None else source.tasks,
        "task": module.task,
        "bundle": None if path is None else str(path),
    }
    parts = [type(module.model).__name__, *(f"{name}={value!r}" for name, value in said.items())]
    return f"{type(module).__name__}({', '.join(parts)})"
