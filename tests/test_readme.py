"""What README and guides show, run."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from program import run
from safetensors.torch import save_file
from tiny_net import TinyNet

import fusionkit
from fusionkit.cli import demo

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
GUIDES = "".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
BLOCKS = dict.fromkeys(re.findall(r"```python\n(.*?)```", GUIDES, re.DOTALL))


def block(marker: str) -> str:
    [found] = [text for text in BLOCKS if marker in text]
    return found


def test_the_python_way(base: TinyNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place, name in enumerate(("base", "cats", "dogs")):
        state = {n: t + place for n, t in base.state_dict().items() if n != "decoder.weight"}
        save_file(state, f"{name}.safetensors")
    names: dict[str, Any] = {"model": base}
    heads = base.head.bias.clone()
    exec(block("fusionkit.compress("), names)
    assert torch.equal(names["state"]["head.bias"], heads + 1)
    assert names["module"].task == "dogs"
    assert torch.equal(base.head.bias, heads + 2)


@pytest.mark.slow
def test_the_codec_of_thirty_lines(
    base: TinyNet,
    finetuned: dict[str, dict[str, torch.Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Written and registered as told, it is used from a bundle on disk."""
    text = block("class Ternary")
    assert len(text.splitlines()) <= 30
    (tmp_path / "my_package.py").write_text(text)
    (tmp_path / "test_my_package.py").write_text(block("class TestTernary"))
    line = re.search(r"\[project.entry-points.*?\n(ternary = .*?)\n", GUIDES)
    assert line
    entry = line.group(1).replace('"', "")  # TOML quotes, the installed file does not
    info = tmp_path / "my_package-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[fusionkit.codecs]\n{entry}\n")
    monkeypatch.syspath_prepend(tmp_path)
    import my_package

    codec = my_package.Ternary(cut=0.5)
    fusionkit.compress(base, finetuned, codec, tmp_path / "b", private=["head.*"])
    bundle = fusionkit.Bundle.load(tmp_path / "b", base)
    assert bundle.codec == codec
    delta = bundle.delta("ant", "hidden.weight")
    assert delta is not None
    assert 2 <= len(delta.unique()) <= 3
    sys.modules.pop("my_package")
    # Its tests, as its author runs them: all pass.
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    program = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(tmp_path), str(tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout
    assert re.search(r"\b[3-9]\d passed", done.stdout), done.stdout


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150
    assert README.count("![") == 1


def test_what_the_readme_links_to_is_there() -> None:
    linked = re.findall(r"\]\(([^)#]+)", README)
    assert [path for path in linked if "://" not in path and not (ROOT / path).exists()] == []


def test_the_readmes_rows_are_the_demos() -> None:
    """Names in the shown tables are the demo recipes'; those of the page are all of them."""
    page = (ROOT / "docs/results.md").read_text()
    rows = re.findall(r"^│ (.*?) +│", README.partition("## Next")[0], re.MULTILINE)
    named = ["fine-tuned", "base", *codecs("demo.yaml")]
    assert rows == [name for name in named if name in rows]
    for name in (*named, *codecs("demo_lora.yaml")):
        assert f"│ {name} " in page


def codecs(recipe: str) -> list[str]:
    return list(yaml.safe_load((ROOT / "recipes" / recipe).read_text())["codecs"])


def commands() -> list[tuple[str, str]]:
    """The README's commands, one after the other, and what is shown of their output."""
    blocks = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    parts = [re.split(r"^\$ ", block, flags=re.MULTILINE)[1:] for block in blocks]
    return [part.partition("\n")[::2] for each in parts for part in each]


@pytest.mark.slow
def test_the_first_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo with short training, then the README's commands as they stand, in an empty folder.

    Numbers are others, but tables have the columns that are shown, and files their places.
    """
    for kind in ("base", "full", "lora"):
        monkeypatch.setitem(demo.SETTINGS, kind, {**demo.SETTINGS[kind], "steps": 12})
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "recipes", "recipes")
    for recipe in ("demo.yaml", "demo_lora.yaml"):  # all of their codecs are run elsewhere
        content = yaml.safe_load(Path("recipes", recipe).read_text())
        content["codecs"] = dict(list(content["codecs"].items())[-1:])
        Path("recipes", recipe).write_text(yaml.safe_dump(content))
    monkeypatch.setattr(demo, "recipes_folder", lambda: tmp_path / "recipes")
    run("demo", "--cache", tmp_path / "cache")
    assert len(commands()) >= 9
    for command, shown in commands():
        words = []
        for word in shlex.split(command, comments=True):
            found = sorted(map(str, Path().glob(word))) if "*" in word else []
            words += found or [word]  # as a shell does
        assert words[0] == "fusionkit"
        said = run(*words[1:])
        for line in shown.splitlines():
            if line.startswith(("┃", "written:", "added")):
                assert columns(line) in map(columns, said.splitlines()), command


def columns(line: str) -> list[str]:
    """A line's words, whatever room is between them, but for sizes."""
    return re.sub(r"\([\d.]+ \w+\)", "", line).split()
