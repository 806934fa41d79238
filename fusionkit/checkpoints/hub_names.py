"""Names on the Hugging Face Hub: in which forms they are given, and who takes them.

A URL (`hf://OWNER/NAME`) is a name wherever it stands. A plain name (`OWNER/NAME`, `gpt2`) is one
where a function reads it from the Hub if there is no such folder; which of its parameters do so,
the function says by `reads_hub`. So who looks a recipe over knows it without running it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, TypeVar

Kind = Literal["model", "dataset"]
"""Of a repository."""
Opener = TypeVar("Opener", bound=Callable[..., Any])

_NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_REVISION = r"(?:@(refs/[^/@]+/[^/@]+|[^/@]+))?"
_URL = re.compile(
    rf"hf://(?!spaces/|buckets/)(?:models/|(datasets)/)?({_NAME}){_REVISION}(?:/(.*?))?/?"
)
_LIBRARIES = re.compile(rf"(open_clip:)?hf[-_]hub:({_NAME}){_REVISION}")


class Use(Enum):
    """What is read of a repository."""

    MODEL = "model"
    """Weights, and what lies beside them: configuration, tokenizer, processor."""
    BESIDE = "beside"
    """What lies beside the weights alone."""
    PREPROCESSING = "preprocessing"
    """As `BESIDE`; but a name that timm knows is timm's own."""
    OPEN_CLIP = "open_clip"
    """As `MODEL`, of open_clip's files."""
    ROWS = "rows"
    """Rows of a data set."""


@dataclass(frozen=True)
class Repository:
    """A repository as it is named.

    Attributes:
        name: `OWNER/NAME`, or `NAME` alone, of a few old ones.
        kind: of model or data set.
        revision: branch, tag or commit, where the name says one (`OWNER/NAME@v1`).
    """

    name: str
    kind: Kind = "model"
    revision: str = ""

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name

    @classmethod
    def of(cls, text: str, kind: Kind) -> "Repository":
        """The repository that `str` of it says."""
        name, _, revision = text.partition("@")
        return cls(name, kind, revision)


def reads_hub(**parameters: Use) -> Callable[[Opener], Opener]:
    """Say of a function or class which of its parameters may be names on the Hub.

    A subclass takes over what its base says.

    Args:
        parameters: parameter → what is read of the repositories that it names; each a name, or a
            list or mapping of them.
    """

    def marked(opener: Opener) -> Opener:
        opener.hub_names = {**names_read_by(opener), **parameters}  # type: ignore[attr-defined]
        return opener

    return marked


def names_read_by(opener: Any) -> dict[str, Use]:
    """What `reads_hub` says of a function or class; nothing of one that it does not mark."""
    found: dict[str, Use] = getattr(opener, "hub_names", {})
    return found


def of_url(text: str) -> tuple[Repository, str] | None:
    """The repository of a URL, and the file or folder in it; None of another text."""
    match = _URL.fullmatch(text)
    if match is None:
        return None
    kind: Kind = "dataset" if match[1] else "model"
    return Repository(match[2], kind, match[3] or ""), match[4] or ""


def of_library(text: str) -> tuple[Repository, Use] | None:
    """The repository of a name as timm and open_clip take it: `hf-hub:OWNER/NAME`; else None."""
    match = _LIBRARIES.fullmatch(text)
    if match is None:
        return None
    return Repository(match[2], "model", match[3] or ""), (Use.OPEN_CLIP if match[1] else Use.MODEL)
