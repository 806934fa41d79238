"""The repositories of the Hub that a recipe names, found without running it.

A recipe is a tree of what it calls: each class or function says itself, by `reads_hub`, which of
its parameters may be names on the Hub. A URL (`hf://…`) is a name wherever it stands.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from inspect import isclass
from typing import Any

from fusionkit.checkpoints.hub_names import Repository, Use, names_read_by, of_library, of_url
from fusionkit.checkpoints.hub_places import named_dataset, named_model
from fusionkit.checkpoints.paths import written_out
from fusionkit.errors import of_extra
from fusionkit.registry import Plugin
from fusionkit.tasks.data import Split, splits_of
from fusionkit.tasks.open_clip_models import PREFIX
from fusionkit.tasks.table_files import names_of_split
from fusionkit.tasks.transforms import known_to_timm

_LIBRARIES = ("fusionkit", "lightning", "timm", "torch", "torchmetrics", "torchvision")
"""Whose code has no names of its own that recipes would not say."""

_LM_EVAL = "fusionkit.tasks.lm_eval.LMEval"
_SPLITS: tuple[Split, Split] = ("test", "train")


@dataclass(frozen=True)
class Read:
    """What is read of one repository.

    Attributes:
        of: the repository.
        use: what it is for.
        inside: a file or folder in it, with one `*` at most; of a data set the configuration.
        variant: of a folder's weights.
        splits: of a data set, what its test and its training rows may be called; the first that
            is there is read.
        key: where the recipe names it.
    """

    of: Repository
    use: Use
    inside: str = ""
    variant: str | None = None
    splits: tuple[tuple[str, ...], ...] = ()
    key: str = field(default="", compare=False)

    def __str__(self) -> str:
        """In words, as the lock file keeps it."""
        called = zip(_SPLITS, self.splits, strict=False)
        own = (f"{split}={names[0]}" for split, names in called if len(names) == 1)
        return " ".join(filter(None, (self.use.value, self.inside, self.variant, *own)))


@dataclass
class Names:
    """What was found.

    Attributes:
        reads: what is read, each once, in the recipe's order.
        by_name: repositories that a library opens itself, by name.
        unseen: what may read repositories that can't be seen from the recipe, in words.
    """

    reads: list[Read] = field(default_factory=list)
    by_name: set[Repository] = field(default_factory=set)
    unseen: list[str] = field(default_factory=list)


def names_in(config: Any) -> Names:
    """Find the names in a recipe.

    Args:
        config: the recipe, parsed; a `Namespace`.
    """
    found = Names()
    reads: dict[Read, None] = {}
    for read, by_name in _within(config.as_dict(), "", found):
        reads.setdefault(read)
        if by_name:
            found.by_name.add(read.of)
    found.reads = list(reads)
    return found


def _within(
    value: Any, key: str, found: Names, variant: str | None = None
) -> Iterator[tuple[Read, bool]]:
    """All reads within a value of the recipe, and whether a library opens them by name."""
    if isinstance(value, str):
        if read := _of_text(value, key, variant):
            yield read, read.use is Use.MODEL and of_library(value) is not None
    elif isinstance(value, list | tuple):
        for place, each in enumerate(value):
            yield from _within(each, f"{key}.{place}", found)
    elif isinstance(value, Mapping):
        if isinstance(path := value.get("class_path"), str):
            yield from _of_call(path, value.get("init_args") or {}, key, found)
        for name, each in value.items():
            variant = value.get("variant") if name == "source" else None  # of a Checkpoint
            if name != "class_path":
                yield from _within(each, f"{key}.{name}".lstrip("."), found, variant)


def _of_text(text: str, key: str, variant: str | None) -> Read | None:
    """What a text means wherever it stands."""
    if named := of_url(text):
        use = Use.MODEL if named[0].kind == "model" else Use.ROWS
        return Read(named[0], use, named[1], variant, key=key)
    if library := of_library(text):
        return Read(*library, key=key)
    return None


def _of_call(
    path: str, arguments: Mapping[str, Any], key: str, found: Names
) -> Iterator[tuple[Read, bool]]:
    """What a class or function reads by its own parameters."""
    opener = _named(path)
    uses = names_read_by(opener)
    for name, use in uses.items():
        own = Use.BESIDE if use is Use.MODEL and arguments.get("pretrained") is False else use
        for task, text in _texts(arguments.get(name)):
            where = f"{key}.{name}.{task}".strip(".")
            if use is Use.ROWS:
                yield from _of_rows(text, splits_of(arguments.get("splits"), task), where)
            else:
                yield from _of_parameter(text, own, where)
    if path.startswith("timm.") and arguments.get("pretrained"):
        yield from _of_timm(str(arguments.get("model_name")), key)
    if path == _LM_EVAL:
        found.unseen.append(f"lm-eval's tasks ({key})")
    elif not uses and _may_read(opener, path):
        found.unseen.append(f"{path} ({key})")


def _of_rows(text: str, called: Mapping[str, str], key: str) -> Iterator[tuple[Read, bool]]:
    """What a task's rows are read from."""
    if named := named_dataset(text):
        splits = tuple(names_of_split(each, called) for each in _SPLITS)
        yield Read(named[0], Use.ROWS, named[1], splits=splits, key=key), False


def _of_parameter(text: str, use: Use, key: str) -> Iterator[tuple[Read, bool]]:
    """What a parameter that names a model reads."""
    place = written_out(text)
    if place.startswith(PREFIX) and not of_library(place):
        yield from _of_open_clip(place.removeprefix(PREFIX), key)
        return
    if use is Use.PREPROCESSING and known_to_timm(place):
        return
    file = ""
    if place.endswith(".gguf"):
        place, _, file = place.rpartition("/")
    if name := named_model(place):
        own = Use.BESIDE if use is Use.PREPROCESSING else use
        yield Read(name, own, file, key=key), False


def _of_timm(name: str, key: str) -> Iterator[tuple[Read, bool]]:
    """The repository that timm takes a model's weights from."""
    timm = of_extra("timm", "vision", name)
    known: Any = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if known is not None and known.hf_hub_id:
        of = Repository.of(known.hf_hub_id, "model")
        yield Read(of, Use.MODEL, known.hf_hub_filename or "", key=key), True


def _of_open_clip(name: str, key: str) -> Iterator[tuple[Read, bool]]:
    """The repository that open_clip takes a model's weights from."""
    open_clip = of_extra("open_clip", "clip", name)
    known = open_clip.get_pretrained_cfg(*name.split("/", 1)) if "/" in name else {}
    if hub := known.get("hf_hub"):
        owner, repository, *file = hub.split("/")
        of = Repository(f"{owner}/{repository}")
        yield Read(of, Use.OPEN_CLIP, "/".join(file), key=key), True


def _texts(value: Any) -> Iterator[tuple[str, str]]:
    """The texts in an argument, itself or those of a list or mapping, and what each is called."""
    if isinstance(value, str):
        yield "", value
    elif isinstance(value, list | tuple):
        yield from (("", each) for each in value if isinstance(each, str))
    elif isinstance(value, Mapping):
        yield from ((name, each) for name, each in value.items() if isinstance(each, str))


def _named(path: str) -> Any:
    """What a class path names; the parser has found it already."""
    names = path.split(".")
    for place in range(len(names) - 1, 0, -1):
        try:
            found: Any = import_module(".".join(names[:place]))
        except ModuleNotFoundError:
            continue
        for name in names[place:]:
            found = getattr(found, name, None)
        return found
    return None


def _may_read(opener: Any, path: str) -> bool:
    """Whether a class or function is a user's own, whose code may name what the recipe does not."""
    if path.partition(".")[0] in _LIBRARIES or opener is None:
        return False
    return not (isclass(opener) and issubclass(opener, Plugin))
