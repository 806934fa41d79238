"""`fusionkit codecs`: a list from the plugins' sources, and all of one."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from program import run
from tiny_net import TESTS

from fusionkit import registry
from fusionkit.cli.plugin_source import summary_in_source

CODECS, MERGES = registry.GROUPS
HEAD = "from dataclasses import dataclass\nfrom fusionkit import TensorCodec\n"
CLASS = (
    '@dataclass(frozen=True)\nclass Own(TensorCodec):\n    """What it does."""\n    id = "own"\n'
)

Install = Callable[[str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a plugin whose entry point is `own = PLACE`."""

    def install(place: str) -> None:
        info = tmp_path / "own-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{CODECS}]\nown = {place}\n")
        monkeypatch.syspath_prepend(tmp_path)
        for each in [name for name in sys.modules if name.partition(".")[0] == "own_plugin"]:
            monkeypatch.delitem(sys.modules, each)

    return install


@pytest.mark.slow
def test_the_list_imports_no_plugin() -> None:
    """PyTorch takes longer than all the rest."""
    code = (
        "import sys; from fusionkit.cli.main import main; main(['codecs'])\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted({'torch', 'lightning', 'numba', 'jsonargparse'} & loaded))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "MagnitudePrune" in done.stdout


def test_the_sources_say_what_the_classes_do() -> None:
    """Of all that is installed here."""
    read = 0
    for group in registry.GROUPS:
        for name in registry.names(group):
            said = summary_in_source(registry.entry_point(group, name))
            plugin = registry.load(group, name)
            assert said in (None, (plugin.__doc__ or "").strip().splitlines()[0])
            read += said is not None
    assert read >= 14


def test_a_third_partys_codec_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TESTS / "plugin")
    monkeypatch.delitem(sys.modules, "ternary_plugin", raising=False)
    assert "ternary-plugin 0.1" in run("codecs")
    assert "ternary_plugin" not in sys.modules


def test_a_module_inside_a_package_is_read(install: Install, tmp_path: Path) -> None:
    """And the package is not imported."""
    folder = tmp_path / "own_plugin"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise SystemExit('imported')\n")
    (folder / "codec.py").write_text(HEAD + CLASS)
    install("own_plugin.codec:Own")
    assert "What it does." in run("codecs")


@pytest.mark.parametrize(
    "text",
    [
        HEAD + CLASS.replace('"own"', '"".join("own")'),
        HEAD + CLASS.replace("class Own", "class Own_") + "Own = Own_\nOwn.__name__ = 'Own'\n",
    ],
    ids=["id", "name"],
)
def test_what_the_source_does_not_say_is_imported(
    install: Install, tmp_path: Path, text: str
) -> None:
    (tmp_path / "own_plugin.py").write_text(text)
    install("own_plugin:Own")
    assert "What it does." in run("codecs")
    assert "own_plugin" in sys.modules


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("import no_such_module\n" + HEAD + CLASS, "No module named 'no_such_module'"),
        ("from no_such_module.part import thing\n" + HEAD + CLASS, "No module named"),
        ("from fusionkit import NoSuchName\n" + HEAD + CLASS, "cannot import name 'NoSuchName'"),
        (HEAD + CLASS.replace('"own"', '"another"'), "its id is 'another'"),
        (HEAD + "class Own(\n", "SyntaxError"),
        (HEAD + CLASS.replace("@dataclass(frozen=True)\n", ""), "is not a dataclass"),
    ],
)
def test_what_fails_to_import_is_told(
    install: Install, tmp_path: Path, text: str, why: str
) -> None:
    (tmp_path / "own_plugin.py").write_text(text)
    install("own_plugin:Own")
    shown = " ".join(run("codecs").replace("│", " ").split())
    assert re.search("can't be used: ('own' of )?own 1.0 ", shown)
    assert why in shown
    assert "MagnitudePrune" in shown


def test_a_merge_is_told_as_a_codec_is() -> None:
    text = run("codecs", "ties")
    assert text.startswith("TIES (ties), of fusionkit")
    assert "--density" in text
    assert "--codec merged --merge ties [--merge.SETTING VALUE…]" in text
    assert "class_path: fusionkit.TIES" in text
    assert "no codec 'tiess'" in run("codecs", "tiess", code=1)
