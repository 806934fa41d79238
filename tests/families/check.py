"""Holds `Sketch` to what it says, on one family: budgets, values, bytes, predicted errors."""

import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checks import contents
from safetensors.torch import save_file

from families.draw import Drawn, draw
from fusionkit import Bundle, Sketch, compress
from fusionkit.codecs.allocation import Plan
from fusionkit.codecs.sketch_encoder import How, Measured, measure
from fusionkit.codecs.sketch_plan import Target, layout_of, plans_of
from fusionkit.errors import BundleError
from fusionkit.registry import to_config
from fusionkit.task_vectors.family import Family

SMALLEST = 128
"""Bytes of codes from which their error is held against what was predicted."""
PREDICTED = 1.6
"""No matrix's error is larger than what was predicted by more; where they are small, by chance."""


@dataclass
class Found:
    """What a check saw.

    Attributes:
        codec: what was asked for.
        words: what was in the family and in the codec.
        used: bytes over the budget, as the codec counts them; None: nothing is stored.
        codes: bytes of codes over what they were given, of those of whom something is left.
        errors: error over prediction, of each matrix.
        refused: a model would be infinite in its dtype, which is said.
    """

    codec: Sketch
    words: set[str]
    used: float | None = None
    codes: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    refused: bool = False


def check(seed: int, folder: Path, thorough: bool = True) -> Found:
    """Draw a family and a codec, and hold it to everything.

    Args:
        seed: of both.
        folder: an empty one to write to.
        thorough: do the checks that compress again, too.

    Raises:
        AssertionError: it is not what it says.
    """
    random = np.random.default_rng([seed, 1])
    drawn = draw(seed, folder)
    family = Family(drawn.base, drawn.finetuned, **drawn.arguments)
    codec = drawn_codec(random, family)
    bundle, said = compressed(drawn, codec, folder / "bundle")
    plans, measured = plans_for(family, codec)
    found = Found(codec, drawn.words | _words(codec))
    found.used = held_to_budget(bundle, codec, family.parameters * len(family.tasks))
    with quiet():
        reached = _check_values(bundle, family, plans, measured, found)
        _check_models(bundle, found)
    base = sum(each.base for each in measured.values())
    if codec.noise and base:
        for task, plan in enumerate(plans):
            if plan.error <= codec.noise * base:  # it can be had at all
                assert reached[task] <= PREDICTED * codec.noise * base, "noise"
    if thorough:
        again, _ = compressed(drawn, codec, folder / "again", threads=2)
        assert contents(bundle.path) == contents(again.path), "two threads write other bytes"
        _check_mends(drawn, codec, said)
        if drawn.arguments.get("adapters") is None:
            _check_resumed(drawn, codec, folder)
    return found


def drawn_codec(random: np.random.Generator, family: Family) -> Sketch:
    """Any setting: from 0.003 to 8 bits a parameter, as bits, bytes or noise."""
    settings: dict[str, Any] = {
        "share": "equal" if random.random() < 0.3 else "energy",
        "seed": int(random.integers(1000)),
    }
    kind = str(random.choice(["bits", "bytes", "noise"], p=[0.6, 0.2, 0.2]))
    bits = float(10 ** random.uniform(math.log10(0.003), math.log10(8)))
    if kind == "noise":
        return Sketch(noise=float(10 ** random.uniform(-4, 0)), **settings)
    settings["sketch"] = bool(random.random() < 0.75)
    if kind == "bits":
        return Sketch(bits=bits, **settings)
    tensors, tasks = len(family.roles), len(family.tasks)
    beside = random.integers(2000 + (300 + 100 * tasks) * tensors)
    return Sketch(bytes=1 + int(bits * family.parameters * tasks / 8 + beside), **settings)


def compressed(
    drawn: Drawn, codec: Sketch, out: Path | None = None, threads: int = 1
) -> tuple[Bundle, list[str]]:
    """A bundle, and what was warned of: nothing but what the codec's docstring says."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            bundle = compress(drawn.base, drawn.finetuned, codec, out, **drawn.arguments)
    finally:
        torch.set_num_threads(before)
    said = [str(each.message) for each in caught]
    for text in said:
        assert "times the base's energy" in text or "come back as zero" in text, text
    return bundle, said


def plans_for(family: Family, codec: Sketch) -> tuple[list[Plan], dict[str, Measured]]:
    """What the codec means to spend where."""
    how = How.sketched() if codec.sketch else How.directions_alone()
    target = Target(codec.bits, codec.bytes, codec.noise, codec.share)
    measured = family.each(measure)
    with quiet():
        plans = plans_of(family, layout_of(family), measured, target, how, to_config(codec))
    return plans, measured


def held_to_budget(bundle: Bundle, codec: Sketch, parameters: int) -> float | None:
    """Bytes over the budget, as `Sketch` counts them; None where no delta is stored."""
    files = {path.name: path.stat().st_size for path in bundle.path.iterdir()}
    assert sum(files.values()) == bundle.nbytes
    if codec.noise or not stores(bundle):
        return None
    if codec.bytes:
        used = bundle.nbytes / codec.bytes
    else:
        assert codec.bits
        budget = codec.bits * parameters / 8
        private = sum(record.private_bytes for record in bundle.manifest.tasks.values())
        beyond = max(0, files["manifest.json"] - int(budget) // 10)
        used = (bundle.nbytes - private - beyond) / budget
        if not beyond:
            assert bundle.bits_per_parameter <= codec.bits
    assert used <= 1, "over the budget"
    return used


def stores(bundle: Bundle) -> bool:
    """Whether there are codes of any delta."""
    names = [(task, name) for task in bundle.tasks for name in bundle.task_names(task)]
    return any("codes" in bundle.task_parts(task, name) for task, name in names)


def _check_values(
    bundle: Bundle,
    family: Family,
    plans: list[Plan],
    measured: dict[str, Measured],
    found: Found,
) -> list[float]:
    """Each delta's shape, dtype, values; the error energy of each task's matrices."""
    layout, reached = layout_of(family), [0.0] * len(plans)
    for name in family.names("delta"):
        vectors, at = family.vectors(name), layout.names[name]
        for task, plan in enumerate(plans):
            delta, decoded = vectors[task], bundle.delta(family.tasks[task], name)
            allowed, codes = int(plan.nbytes[at]), bundle.task_parts(family.tasks[task], name)
            size = len(codes["codes"]) if codes else 0
            assert size <= allowed, f"{name}: {size} bytes of codes, of {allowed}"
            if decoded is None:
                decoded = torch.zeros_like(delta)
            else:
                assert delta.any(), f"{name}: a delta of zero is stored"
            assert (decoded.shape, decoded.dtype) == (delta.shape, torch.float32), name
            assert decoded.isfinite().all(), f"{name} is not finite"
            error = float((decoded.double() - delta.double()).square().sum())
            energy = measured[name].energies[task]
            if layout.shapes[at][0] == 1 or allowed < SMALLEST:
                continue
            reached[task] += error
            predicted = float(plan.errors[at])
            # Float32 and the last directions apart, what is left can be told.
            if energy and error > 1e-4 * energy:
                found.codes.append(size / allowed)
                found.errors.append(error / predicted)
                assert error <= PREDICTED * predicted or not found.codec.sketch, (
                    f"{name} of task {task}: an error of {error:.3g}, predicted {predicted:.3g}"
                )
    return reached


def _check_models(bundle: Bundle, found: Found) -> None:
    """Whole models are finite, in the base's dtypes; or it is said that they can't be."""
    for task in bundle.tasks:
        try:
            state = bundle.state_dict(task)
        except BundleError as error:
            assert "infinite" in str(error)  # noqa: PT017
            found.refused = True
            continue
        for name, tensor in state.items():
            assert tensor.isfinite().all(), f"{name} of {task}"


def _check_mends(drawn: Drawn, codec: Sketch, said: list[str]) -> None:
    """What a warning says to ask for does what it says."""
    for text in said[:2]:
        mend = re.search(r"(?:ask for|as by) (\w+)=([\d.e+-]+)", text)
        if not mend:
            assert "store it by another codec" in text
            continue
        value = int(mend[2]) if mend[1] == "bytes" else float(mend[2])
        asked: dict[str, Any] = {"bits": None, "bytes": None, "noise": None, mend[1]: value}
        bundle, again = compressed(drawn, replace(codec, **asked))
        assert stores(bundle), text
        if "hardly felt" in text:
            of_this = text.partition(":")[0]
            assert not [each for each in again if each.startswith(f"{of_this}:")], (text, again)


def _check_resumed(drawn: Drawn, codec: Sketch, folder: Path) -> None:
    """A run over files that is stopped, and goes on, writes the same bytes."""
    files = {}
    for name, state in {"base": drawn.base, **drawn.finetuned}.items():
        files[name] = folder / f"{name}.safetensors"
        save_file({n: t.clone().contiguous() for n, t in state.items()}, files[name])
    base = files.pop("base")
    runs = [0]

    def stop(run: int, done: int, total: int) -> None:
        runs[0] += 1
        if runs[0] == 2:
            raise KeyboardInterrupt

    whole, resumed = folder / "whole", folder / "resumed"
    with quiet():
        compress(base, files, codec, whole, **drawn.arguments)
        try:
            compress(base, files, codec, resumed, progress=stop, **drawn.arguments)
        except KeyboardInterrupt:
            compress(base, files, codec, resumed, **drawn.arguments)
    assert contents(whole) == contents(resumed), "a run that was stopped writes other bytes"


def _words(codec: Sketch) -> set[str]:
    kind = "bits" if codec.bits else "bytes" if codec.bytes else "noise"
    return {f"by {kind}", f"share: {codec.share}", f"sketch: {str(codec.sketch).lower()}"}


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
