"""Fuzz what reads a bundle's bytes, guided by coverage (atheris): manifest, part files, codes.

Whatever the bytes are, each parser gives the right values or an error of its own, in a second or
two and little memory. From the folder `tests`, ten minutes each:

    python -m faults.fuzz manifest|parts|codes --minutes 10 [--corpus FOLDER]

In the last sixth of the time the kernels are compiled, and their bounds checked; before, they run
as Python, so that their branches are seen. What reaches something new is written to the corpus
folder (by default one that goes with the run), a fault to `fault-…` in the folder at hand.
`faults/corpus` holds what the suite replays: tiny bundles, codes, and inputs that were at fault;
`python -m faults.fuzz seeds` makes bundles and codes anew.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from random import Random

CORPUS = Path(__file__).parent / "corpus"
_CODECS = (
    *("packing", "kernels", "entropy", "entropy_kernels", "entropy_tables"),
    *("sketch_codes", "mixing", "trellis"),
)
TARGETS = {
    "manifest": ["fusionkit.bundles", "fusionkit.registry"],
    "parts": ["fusionkit.bundles", "fusionkit.codecs"],
    "codes": ["fusionkit.bundles.small_parts", *(f"fusionkit.codecs.{each}" for each in _CODECS)],
}
"""What is fuzzed → the packages and modules whose branches are seen."""
SECONDS = 2.0
"""Of this process's own time, for one input."""
MEMORY = 1 << 30
"""Bytes that one input may take more than there were."""
LONGEST = 8192
_COMPILED = [
    f"fusionkit.codecs.{each}"
    for each in ("kernels", "entropy_kernels", "rotation_kernels", "mixing_kernels")
]
_SHARE = 5 / 6
"""Of the time without compiled kernels."""


def held(target: str, data: bytes) -> None:
    """Give bytes to a parser, and hold it to its time and memory.

    Raises:
        AssertionError: it is too slow, takes too much, or finds other values than are there.
        Exception: whatever it raises that is not its own.
    """
    from faults.fuzz_targets import RUN

    start, before = time.process_time(), _peak()
    RUN[target](data)
    spent, taken = time.process_time() - start, _peak() - before
    assert spent < SECONDS, f"{spent:.1f} s for {len(data)} bytes"
    assert taken < MEMORY, f"{taken >> 20} MB for {len(data)} bytes"


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def fuzz(target: str, corpus: Path, seconds: int) -> None:
    """Fuzz in this process, which ends with it."""
    import atheris

    seen = [*TARGETS[target], "faults.fuzz_targets"]
    unseen = [] if os.environ.get("NUMBA_DISABLE_JIT") else _COMPILED  # Numba reads their bytes
    with atheris.instrument_imports(include=seen, exclude=unseen):
        import_module("faults.fuzz_targets")
    from faults.fuzz_changes import changed
    from faults.fuzz_targets import RUN, seeds

    for name, seed in seeds(target).items():
        (corpus / name).write_bytes(seed)
        RUN[target](seed)  # all that is imported or compiled late, is
    arguments = [f"-max_total_time={seconds}", f"-max_len={LONGEST}", "-rss_limit_mb=4096"]
    arguments += ["-timeout=60", "-print_final_stats=1", "-artifact_prefix=fault-" + target + "-"]

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        random = Random(seed)
        other = (
            changed(target, data, random) if target != "codes" and random.random() < 0.7 else None
        )
        return atheris.Mutate(data, most) if other is None or len(other) > most else other

    line = [sys.argv[0], *arguments, str(corpus)]
    atheris.Setup(line, lambda data: held(target, data), custom_mutator=mutate)
    atheris.Fuzz()


def run(target: str, minutes: float, corpus: Path | None) -> int:
    """Fuzz without compiled kernels, then with them; returns 0 if there was no fault."""
    with tempfile.TemporaryDirectory() as folder:
        found = corpus or Path(folder) / "corpus"
        found.mkdir(parents=True, exist_ok=True)
        ways = {"NUMBA_DISABLE_JIT": _SHARE, "NUMBA_BOUNDSCHECK": 1 - _SHARE}
        for way, share in ways.items():
            seconds = max(int(60 * minutes * share), 1)
            print(f"{target}: {seconds} s with {way}=1", flush=True)
            environment = {**os.environ, way: "1", "NUMBA_CACHE_DIR": f"{folder}/{way}"}
            line = [sys.executable, "-m", "faults.fuzz", target, "--here", str(seconds)]
            ended = subprocess.run([*line, "--corpus", str(found)], env=environment, check=False)
            if ended.returncode:
                return ended.returncode
        print(f"{target}: no fault; {len(list(found.iterdir()))} inputs that reach something new")
    return 0


def main(arguments: list[str]) -> int:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="python -m faults.fuzz")
    parser.add_argument("target", choices=[*TARGETS, "seeds"])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--here", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.target == "seeds":
        from faults.fuzz_seeds import write_seeds

        write_seeds(CORPUS)
        return 0
    if given.here:
        fuzz(given.target, given.corpus, given.here)
    return run(given.target, given.minutes, given.corpus)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
