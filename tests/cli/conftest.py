"""What the verbs are run over."""

from pathlib import Path

import pytest
import yaml
from tiny_net import TESTS, Files


@pytest.fixture
def recipe(tmp_path: Path, files: Files, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of the tiny family, its modules beside it."""
    (tmp_path / "tiny.py").write_text(
        "from tiny_net import TinyNet\n"
        "from tiny_tasks import Data\n"
        "import torch\n"
        "def build() -> torch.nn.Module:\n"
        "    return TinyNet()\n"
    )
    content = {
        "model": {
            "model": {"class_path": "tiny.build"},
            "base": str(files.base),
            "finetuned": {task: str(path) for task, path in files.finetuned.items()},
            "private": ["head.*"],
            "codec": {"class_path": "EMR"},
            "bundle": str(tmp_path / "bundle"),
        },
        "data": {"class_path": "tiny.Data"},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
        "out": str(tmp_path / "out"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{TESTS}")
    return path
