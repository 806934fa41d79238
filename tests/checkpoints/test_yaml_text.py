"""YAML that strangers may have written."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from fusionkit.checkpoints.hub_lock import read_lock
from fusionkit.checkpoints.yaml_text import refuse_endless
from fusionkit.cli.published import read_published
from fusionkit.errors import FusionKitError, UsageError


def test_aliases_of_aliases_are_refused_at_once() -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for before, name in pairwise("abcdefghij"):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    with pytest.raises(UsageError, match=r"r\.yaml: is more than 100,000 values once its aliases"):
        refuse_endless("\n".join(lines), "r.yaml")
    with pytest.raises(UsageError, match="more than 100,000 values"):
        refuse_endless("a: &a [*a]", "r.yaml")
    with pytest.raises(UsageError, match="more than 4 MiB"):
        refuse_endless("#" * (5 << 20), "r.yaml")
    refuse_endless("a: &a [1, 2]\nb: [*a, *a]", "r.yaml")


@pytest.mark.parametrize("read", [read_lock, read_published])
@pytest.mark.parametrize("text", ["a: " + "[" * 100_000, "version: &a [*a]\nunit: *a"])
def test_what_has_no_end_is_refused(
    read: Callable[[Path], object], text: str, tmp_path: Path
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(FusionKitError, match=r"r\.yaml"):
        read(path)
