"""All tasks of a bundle as adapters that vLLM serves, in one folder.

adapters.json           the base's name, and of each task: folder, rank, what was left out
README.md               the line that serves them, and what was left out, for a person
<task>/                 what `export_adapter` writes, percent-encoded where it is no plain name
"""

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fusionkit.bundles.bundle import Bundle
from fusionkit.bundles.export_model import DTYPES
from fusionkit.bundles.export_peft import export_adapter
from fusionkit.bundles.format import task_file
from fusionkit.bundles.space import adapter_needs
from fusionkit.checkpoints.adapters.adapter import CONFIG
from fusionkit.checkpoints.disk import check_space
from fusionkit.checkpoints.json_text import json_text
from fusionkit.checkpoints.output_folder import check_replaceable, new_folder
from fusionkit.checkpoints.paths import is_remote, open_path
from fusionkit.errors import BundleError, lacks, listing

INDEX = "adapters.json"
README = "README.md"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `--max-lora-rank` takes."""


@dataclass(frozen=True)
class ServedAdapter:
    """One task's adapter.

    Attributes:
        folder: its name, in the folder of all.
        rank: the largest of its modules.
        left_out: tensors that differ from the base's, and that vLLM's adapters can't hold.
    """

    folder: str
    rank: int
    left_out: list[str]


@dataclass(frozen=True)
class ServedFolder:
    """What was written.

    Attributes:
        base: what vLLM calls the base: a folder, or a name on the Hub.
        adapters: by task.
    """

    base: str
    adapters: dict[str, ServedAdapter]

    @property
    def max_rank(self) -> int:
        """The smallest of vLLM's ranks that all adapters fit in."""
        most = max(each.rank for each in self.adapters.values())
        return next(rank for rank in RANKS if rank >= most)

    def line(self, folder: Path | str) -> str:
        """The line that serves all tasks.

        Args:
            folder: where they are.
        """
        modules = [_module(task, f"{folder}/{each.folder}") for task, each in self.adapters.items()]
        options = ["--enable-lora", "--max-lora-rank", str(self.max_rank), "--lora-modules"]
        return shlex.join(["vllm", "serve", self.base, *options, *modules])


def export_adapters(
    bundle: Bundle,
    out: str | Path,
    *,
    tasks: Sequence[str] = (),
    rank: int | None = None,
    leave_out: Sequence[str] = (),
    base_name: str | None = None,
    dtype: str = "fp16",
    overwrite: bool = False,
) -> ServedFolder:
    """Write tasks as adapters for vLLM, in one folder that appears whole or not at all.

    Args:
        bundle: the bundle, its base at hand.
        out: the folder.
        tasks: by default all.
        rank: as of `export_adapter`.
        leave_out: as of `export_adapter`.
        base_name: as of `export_adapter`.
        dtype: as of `export_adapter`.
        overwrite: replace such a folder.

    Raises:
        BundleError: a task is not in the bundle, can't be a LoRA, or needs a larger rank than vLLM
            takes; or the folder exists.
        WrongBaseError: the base at hand is another model.
    """
    for task in tasks:
        if task not in bundle:
            raise BundleError(lacks(bundle.label, task, bundle.tasks))
    path = open_path(out)
    if is_remote(path):
        raise BundleError(f"{path}: vLLM reads adapters from the local disk; give a folder there")
    check_replaceable(path, overwrite, known_by=INDEX)
    bundle.base  # noqa: B018  a wrong one is told once
    wanted, failed = tuple(tasks or bundle.tasks), {}
    if dtype in DTYPES:
        check_space(path, adapter_needs(bundle, wanted, rank, DTYPES[dtype], leave_out))
    with new_folder(path, overwrite, known_by=INDEX) as folder:
        adapters: dict[str, ServedAdapter] = {}
        config: dict[str, Any] = {}
        for task in wanted:
            name = _folder_name(task)
            try:
                left_out = export_adapter(
                    bundle, task, folder / name, rank=rank, leave_out=leave_out,
                    for_server="vllm", base_name=base_name, dtype=dtype,
                )  # fmt: skip
            except BundleError as error:
                failed[task] = error
                continue
            config = json.loads((folder / name / CONFIG).read_text())
            most = max([config["r"], *config["rank_pattern"].values()])
            adapters[task] = ServedAdapter(name, most, left_out)
        if failed:
            raise _refused(failed, len(wanted))
        served = ServedFolder(config["base_model_name_or_path"] or "BASE", adapters)
        (folder / INDEX).write_text(json_text(asdict(served)) + "\n")
        (folder / README).write_text(_readme(served))
    return served


def alike(names: Iterable[str]) -> list[str]:
    """Names that differ in their numbers alone as one: `layers.*.norm.weight (32)`."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)
    return [name if count == 1 else f"{name} ({count})" for name, count in counts.items()]


def _folder_name(task: str) -> str:
    """Never a path, nor a file that is there."""
    name = task_file(task).removeprefix("task-").removesuffix(".safetensors")
    return name.replace(".", "%2E", 1) if name.startswith(".") or name in (INDEX, README) else name


def _module(task: str, path: str) -> str:
    """A task as `--lora-modules` reads it: `name=path`, or JSON where it would be cut wrongly."""
    if "=" in task or "," in task + path:
        return json.dumps({"name": task, "path": path}, ensure_ascii=False)
    return f"{task}={path}"


def _refused(failed: dict[str, BundleError], count: int) -> BundleError:
    if len(failed) == count:
        return next(iter(failed.values()))
    findings = [f"'{task}': {error}" for task, error in failed.items()]
    return BundleError(
        f"{len(failed)} of {count} tasks can't be adapters for vLLM:{listing(findings)}\nname the "
        "others (--tasks)"
    )


def _readme(served: ServedFolder) -> str:
    rows = []
    for task, each in served.adapters.items():
        left = ", ".join(f"`{name}`" for name in alike(each.left_out)) or "nothing"
        rows.append(f"| `{task.replace('|', chr(92) + '|')}` | {each.rank} | {left} |")
    return f"""# Adapters for vLLM

One LoRA a task, written by FusionKit. From within this folder:

```sh
{served.line(".")}
```

A request's `model` is then a task's name. Tensors that differ from the base's, and that vLLM's
adapters can't hold, keep the base's values: a task that needs them answers otherwise than its own
model.

| task | rank | left out |
|---|---|---|
{chr(10).join(rows)}
"""
