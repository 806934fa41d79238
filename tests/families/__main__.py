"""A random search: so many families through `Sketch`, and a table of what was covered.

From the folder `tests`, of 200 families and from seed 0 on, if nothing else is said:

    python -m families [count] [first seed]
"""

import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch

from families.check import Found, check


def main(count: int, first: int) -> int:
    """Check the families; returns how many were at fault."""
    torch.set_num_threads(1)
    found: dict[int, Found] = {}
    faults, start = 0, time.perf_counter()
    for seed in range(first, first + count):
        with tempfile.TemporaryDirectory() as folder:
            try:
                found[seed] = check(seed, Path(folder))
            except Exception:
                faults += 1
                print(f"seed {seed}: {traceback.format_exc(limit=-1)}", flush=True)
    report(found)
    print(f"{count} families in {time.perf_counter() - start:.0f} s, {faults} at fault")
    return faults


def report(found: dict[int, Found]) -> None:
    """What was covered, and the worst ratios."""
    words: dict[str, int] = {}
    for each in found.values():
        for word in each.words:
            words[word] = words.get(word, 0) + 1
    for word, number in sorted(words.items()):
        print(f"{number:6}  {word}")
    ratios = {
        "bytes / budget": {s: [f.used] for s, f in found.items() if f.used is not None},
        "codes / what they were given": {s: f.codes for s, f in found.items() if f.codec.sketch},
        "error / predicted": {s: f.errors for s, f in found.items() if f.codec.sketch},
        "the same, without a sketch": {s: f.errors for s, f in found.items() if not f.codec.sketch},
    }
    print(
        f"\n{'':30}" + "".join(f"{each:>12}" for each in ("least", "1%", "median", "99%", "most"))
    )
    for name, by_seed in ratios.items():
        pairs = [(value, seed) for seed, values in by_seed.items() for value in values]
        if not pairs:
            continue
        values = np.array([value for value, _ in pairs])
        row = "".join(f"{each:12.4g}" for each in np.quantile(values, [0, 0.01, 0.5, 0.99, 1]))
        print(f"{name:30}{row}   seeds {min(pairs)[1]}, {max(pairs)[1]}")
    refused = sum(each.refused for each in found.values())
    print(f"families of models that their dtype can't hold, which is said: {refused}\n")


if __name__ == "__main__":
    given = [int(each) for each in sys.argv[1:]]
    sys.exit(bool(main(*(given + [200, 0][len(given) :]))))
