"""Regular expressions that others wrote: those that could take for ever are not tried."""

import re
import time
from pathlib import Path

import pytest
import torch

from fusionkit import Checkpoint
from fusionkit.checkpoints.names import replaced
from fusionkit.checkpoints.patterns import check_pattern
from fusionkit.errors import CheckpointError

PLAIN = (
    *(
        r"^model\.layers\.(\d+)\.(\w+)\.(\w+)$",
        r"(?:foo|bar)\.",
        r"\.attn\.",
        r"^([^.]+)\.x",
        "",
        "()",
    ),
    *(
        r"(.*\.)?(layers\.[0-9]+\.self_attn\.(q|k|v|o)_proj)$",
        r"(?i)Ab+c",
        r"(?<=x)y(?!z)",
        r"(?:ab)*",
    ),
    *(
        r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
        r"(?:\d{4}){2}",
        r"(x)?(?(1)a|b)",
        r"a*+b",
    ),
)
FOR_EVER = (
    *(r"(a+)+$", r"(a|aa)+$", r"(.*)*x", ".*.*.*.*x", "a?" * 30 + "a" * 30),
    *(r"(?:){1000000000}", r"(?i)(?:[B-Z]*[a-z]*[A-Z]*.*)x", r"(?:ab|cd){30}c"),
)


@pytest.mark.parametrize("pattern", PLAIN)
def test_a_plain_pattern_is_taken(pattern: str) -> None:
    check_pattern(pattern, 100)
    start = time.process_time()
    re.sub(pattern, "", "a" * 100)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("pattern", FOR_EVER)
def test_one_that_can_take_for_ever_is_not(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"for ever|too long"):
        check_pattern(pattern, 100)


@pytest.mark.parametrize("pattern", ["(" * 3000 + ")" * 3000, "[", "a" * 5000, "(?P<x>a)(?P<x>b)"])
def test_one_that_is_none_is_told(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"no regular expression|letters|without end"):
        check_pattern(pattern, 10)


@pytest.mark.parametrize(
    ("rename", "said"),
    [
        ({r"(a+)+$": ""}, r"model: `rename`: '\(a\+\)\+\$' → '': it repeats what itself varies"),
        ({"": r"\g<0>" * 800}, "what replaces it has more than 512 letters"),
        ({f"a{place}": "" for place in range(300)}, "has 300 patterns, and may have 256"),
        (dict.fromkeys(("x", "(?:x)", "[x]", "x$"), "x" * 40), "a name has more than 1024 letters"),
        ({"x": r"\2"}, "invalid group reference"),
    ],
)
def test_renaming_ends(rename: dict[str, str], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        replaced(["xx", "y" * 200], rename, "model")


def test_a_pattern_of_an_adapter_is_looked_through(tmp_path: Path) -> None:
    from peft import LoraConfig
    from peft_adapters import net, saved

    from fusionkit import Family

    saved(tmp_path, LoraConfig(r=2, target_modules=["1"], rank_pattern={"(.*)*(.*)*z": 3}))
    state = {name: tensor.clone() for name, tensor in net().state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: the pattern '\(\.\*\)\*"):
        Family(Checkpoint.of(state), {"x": tmp_path})


def test_names_are_changed_in_turn() -> None:
    found = replaced(["old.a.1", "old.b.2"], {r"^old\.": "", r"(\w)\.(\d)$": r"\2.\1"}, "model")
    assert found == {"1.a": "old.a.1", "2.b": "old.b.2"}
    assert torch.equal(Checkpoint.of({"a": torch.ones(1)})["a"], torch.ones(1))
