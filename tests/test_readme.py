"""What the README shows, run."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_net import TinyNet

import fusionkit
from fusionkit.cli import main as cli

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = dict.fromkeys(re.findall(r"```python\n(.*?)```", README, re.DOTALL))


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
    line = re.search(r"\[project.entry-points.*?\n(ternary = .*?)\n", README)
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


def test_every_command_of_the_readme_exists() -> None:
    verbs = set(re.findall(r"(?:[$`] ?|&& )fusionkit ([a-z]+)", README))
    assert verbs <= set(cli.VERBS)
    assert {"demo", "compress", "test", "compare", "export", "codecs"} <= verbs


def test_the_readmes_table_is_the_demos() -> None:
    """Names in the shown table are the demo recipe's."""
    import yaml

    from fusionkit.cli.recipe import recipes_folder

    for recipe in ("demo.yaml", "demo_lora.yaml"):
        names = yaml.safe_load((recipes_folder() / recipe).read_text())["codecs"]
        assert all(f"│ {name} " in README for name in names)
