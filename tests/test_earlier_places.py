"""Names where scripts of before import them from."""

import importlib
import sys

import pytest

import fusionkit


@pytest.mark.parametrize(
    ("module", "name"),
    [("fusionkit.export", "export_task"), ("fusionkit.export_peft", "export_adapter")],
)
def test_they_are_the_same_and_name_their_new_place(module: str, name: str) -> None:
    sys.modules.pop(module, None)
    with pytest.warns(DeprecationWarning, match=f"write `from fusionkit import {name}`") as seen:
        found = getattr(importlib.import_module(module), name)
    assert found is getattr(fusionkit, name)
    assert len(seen) == 1
