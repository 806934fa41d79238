"""The command line: the installed program, its verbs run in this process, and their recipes."""

import io
import signal
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import yaml

from fusionkit.cli import main as cli

PROGRAM = Path(sys.executable).with_name("fusionkit")


def run(*args: object, code: int = 0) -> str:
    """Run a verb in this process; its output, both streams."""
    output = io.StringIO()
    status: object = 0
    with redirect_stdout(output), redirect_stderr(output), warnings.catch_warnings():
        try:
            cli.main([str(arg) for arg in args])
        except SystemExit as stopped:
            status = stopped.code or 0
    assert status == code, output.getvalue()
    return output.getvalue()


def write_finetune(path: Path, model: dict[str, Any], callback: str, **sections: Any) -> Path:
    """Write a recipe that fine-tunes tiny models for a few steps; its results go beside it.

    Args:
        path: the file.
        model: `Finetune`'s settings, as far as they differ.
        callback: the class path of the Trainer's.
        sections: that there are more, or others.
    """
    own = {"private": ["head.*"], "rank": 4, "learning_rate": 0.02}
    content = {
        "model": {"class_path": "Finetune", "init_args": {**own, **model}},
        "data": {"class_path": "fits.FewDigits"},
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 4,
            "max_epochs": -1,
            "enable_progress_bar": False,
            "callbacks": [{"class_path": callback}],
        },
        "out": str(path.parent / "out"),
        **sections,
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def hear_interrupts() -> None:
    """For a process about to start: Ctrl-C reaches it, even if this one was told to ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
