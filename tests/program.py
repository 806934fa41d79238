"""The command line: the installed program, and its verbs run in this process."""

import io
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

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
