"""Interrupt commands (SIGINT, SIGTERM) at what they do to the disk, and at moments of their time.

Whatever a signal meets, the command must end as the shell expects it (130, 143), or be through;
what it writes must be as before or as after, and the same line, given again, must give what it
gives undisturbed. From the folder `tests`:

    python -m faults.signals [every n-th moment] [verbs]
"""

import contextlib
import io
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from faults.kills import WAYS, beside, found_in, is_to_disk, made
from processes import by_itself
from tiny_net import TASKS

from fusionkit.bundles import journal
from fusionkit.cli.main import main as fusionkit

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Line(NamedTuple):
    """A command: what is there before, and its words."""

    before: str
    words: tuple[str, ...]


_MODELS = ("base.safetensors", *(f"{task}={task}.safetensors" for task in TASKS))
LINES = {
    "compress": Line("first", ("compress", *_MODELS, "--codec", "emr", "--out", "bundle")),
    "compress --overwrite": Line(
        "overwrite", ("compress", *_MODELS, "--codec", "emr", "--out", "bundle", "--overwrite")
    ),
    "add": Line("add", ("add", "bundle", "cat=cat.safetensors")),
    "remove": Line("remove", ("remove", "bundle", "bee")),
    "export": Line(
        "export",
        ("export", "bundle", "--task", "bee", "--out", "bee.out.safetensors", "--overwrite"),
    ),
}


def run(line: Line, folder: Path, moment: int, number: int) -> tuple[int, str, int]:
    """Run a command that is sent a signal at a moment.

    Returns:
        its exit code, what it said of errors, and how many moments there were.
    """
    count = 0
    journal._DUE = 0
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if is_to_disk(event, arguments, str(folder)):
            count += 1
            if count == moment:
                os.kill(os.getpid(), number)

    os.chdir(folder)
    sys.addaudithook(hook)
    out, errors, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            fusionkit(list(line.words))
        except SystemExit as ended:
            code = int(ended.code or 0)
    return code, errors.getvalue(), count


def trials(name: str, folder: Path, moments: Iterator[int]) -> Iterator[str]:
    """Send both signals at each moment until there are no more; what each came to.

    Raises:
        AssertionError: it ends otherwise; or what is there is neither as before nor as after; or
            the next run gives another, or leaves something.
    """
    line, here, start = LINES[name], folder / "work", folder / "start"
    WAYS[line.before].before(made(here))
    before = found_in(here)
    shutil.copytree(here, start)
    ended, told = by_itself(run, line, here, 0, 0)
    assert (ended, told[0]) == (0, 0), told
    after, whole, most = found_in(here), beside(here), told[2]
    for moment in moments:
        if moment > most:
            return
        for number in SIGNALS:
            what = f"{name}, {number.name} at {moment}"
            shutil.rmtree(here)
            shutil.copytree(start, here)
            ended, told = by_itself(run, line, here, moment, number)
            assert ended == 0, f"{what}: the process ended with {ended}"
            code, errors, _ = told
            assert code in (0, 128 + number), f"{what}: {code}, {errors}"
            assert "Traceback" not in errors, f"{what}: {errors}"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what was left
                found = found_in(here)
                assert found in (before, after), f"{what}: neither as before nor as after"
                if found == before:
                    again = by_itself(run, line, here, 0, 0)
                    assert again[0] == 0, f"{what}: can't be repeated"
                    assert again[1][0] == 0, f"{what}: {again[1]}"
                    assert found_in(here) == after, f"{what}: the next run gives another"
                    assert beside(here) == whole, f"{what}: {beside(here) ^ whole}"
            yield f"{number.name} {'before' if found == before else 'after'}"


def main(every: int, names: list[str]) -> None:
    """All of it, and a table."""
    for name in names or LINES:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            found = Counter(trials(name, Path(folder), iter(range(1, 10**6, every))))
        spent = time.perf_counter() - start
        print(f"{name:24} {found.total():4} signals: {dict(found)}, {spent:.0f} s", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1, sys.argv[2:])
