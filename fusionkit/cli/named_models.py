"""The fine-tuned models that a command line names: paths, globs, names on a hub, `name=path`."""

import re
from collections.abc import Sequence
from glob import glob, has_magic
from pathlib import Path

from fusionkit.checkpoints.path_text import expanded, one_form
from fusionkit.checkpoints.paths import is_remote, open_path
from fusionkit.errors import CheckpointError, FamilyError, meant

_NAMED = re.compile(r"([^/=]+)=(.+)", re.DOTALL)
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?:@[\w.-]+)?")
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".gguf", ".index.json")
_SAME = (
    *("model", "pytorch_model", "adapter_model", "diffusion_pytorch_model"),
    *("lora", "adapter", "finetuned", "final", "best", "last"),
)
"""What files and folders are called whatever is in them; then the folder before says it."""


def located(path: str) -> str:
    """A model's path as it can be opened; of a name on the Hugging Face Hub, its URL.

    Args:
        path: a path or URL; `ORG/NAME`, where there is no such folder, is on the Hub.

    Raises:
        CheckpointError: there is nothing at the path, and it is no name on a hub.
    """
    if is_remote(path) or open_path(path).exists():
        return path
    if _HUB.fullmatch(path) and not Path(path).parent.exists():
        return f"hf://{path}"
    folder = Path(expanded(path)).parent
    beside = [each.name for each in folder.iterdir()] if folder.is_dir() else []
    raise CheckpointError(
        f"{path}: no such file or folder (relative to {Path.cwd()})"
        + meant(Path(path).name, beside)
    )


def named_models(words: Sequence[str], base: str) -> tuple[dict[str, str], list[str]]:
    """The models that words name, by task.

    A model is called by its file or folder: `cats.safetensors` is `cats`, so is
    `cats/model.safetensors`. Where several end alike (`cats/lora`, `dogs/lora`), what is before
    the end tells them apart.

    Args:
        words: paths, globs, URLs, names on a hub, or `name=` before any of them.
        base: the base's path: where a glob finds it, it is left out.

    Returns:
        task → path, in the order of the words, of a glob sorted; and what globs found and is no
        model, or is the base.

    Raises:
        CheckpointError: nothing is at a path, or no model matches a glob.
        FamilyError: two tasks have one name.
    """
    given: list[tuple[str | None, str]] = []
    left_out: list[str] = []
    for word in words:
        name, path = _name_of(word)
        if not has_magic(path) or open_path(path).exists() or is_remote(path):
            given.append((name, located(path)))
            continue
        found = sorted(glob(expanded(path), recursive=True))
        models = [each for each in found if _is_model(each) and not _is_same(each, base)]
        if not models:
            raise CheckpointError(f"{path}: {_nothing(found)} (relative to {Path.cwd()})")
        if name and len(models) > 1:
            raise FamilyError(
                f"{word}: '{name}' would be the name of {len(models)} models; leave it out, or "
                "give a path that is one's alone"
            )
        left_out += [each for each in found if each not in models]
        given += [(name, each) for each in models]
    return _by_name(given), left_out


def task_of(path: str) -> str:
    """What a model at a path is called, where nothing else is said."""
    return _parts(path)[-1]


def _name_of(word: str) -> tuple[str | None, str]:
    match = _NAMED.fullmatch(word)
    if match is None or is_remote(word) or open_path(word).exists():
        return None, word
    return match[1], match[2]


def _is_model(path: str) -> bool:
    """Whether what a glob found may be a model: a file of weights, or a folder that holds one."""
    if not Path(path).is_dir():
        return path.endswith(_SUFFIXES)
    return any(each.name.endswith(_SUFFIXES) for each in Path(path).iterdir())


def _is_same(path: str, base: str) -> bool:
    return not is_remote(base) and Path(path).resolve() == open_path(base).resolve()


def _nothing(found: Sequence[str]) -> str:
    if not found:
        return "nothing matches"
    return f"matches {len(found)} of files and folders, as {found[0]}, and none is a model"


def _parts(path: str) -> list[str]:
    """The names in a path that may say what a model is; the last ones are the likeliest."""
    parts = [one_form(part) for part in re.split(r"/+", path.rstrip("/")) if part not in ("", ".")]
    for suffix in _SUFFIXES:
        if parts[-1].endswith(suffix):
            parts[-1] = parts[-1].removesuffix(suffix)
            break
    while parts[-1].partition(".")[0] in _SAME and len(parts) > 1:
        parts.pop()
    if parts[-1] in ("..", "~"):
        parts[-1] = Path(expanded(path)).resolve().name
    return parts


def _by_name(given: Sequence[tuple[str | None, str]]) -> dict[str, str]:
    """Give every model a name of its own."""
    parts = {place: _parts(path) for place, (name, path) in enumerate(given) if name is None}
    while clash := _clashing(parts):
        if any(len(parts[place]) < 2 for place in clash):
            break
        for place in clash:
            parts[place] = parts[place][:-1]
    named: dict[str, str] = {}
    for place, (own, path) in enumerate(given):
        name = own or parts[place][-1]
        if other := named.get(name):
            raise FamilyError(
                f"two tasks would be called '{name}': {other} and {path}; name one of them: "
                f"NAME={path}"
            )
        named[name] = path
    return named


def _clashing(parts: dict[int, list[str]]) -> list[int]:
    """Of models that have one name, but not one path: all that have it."""
    by_name: dict[str, list[int]] = {}
    for place, own in parts.items():
        by_name.setdefault(own[-1], []).append(place)
    for places in by_name.values():
        if len({tuple(parts[place]) for place in places}) == len(places) > 1:
            return places
    return []
