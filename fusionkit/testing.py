"""A test kit for codec authors: derive a class from `CodecContract`, and pytest does the rest.

    from fusionkit.testing import CodecContract
    from my_package import Ternary

    class TestTernary(CodecContract):
        codecs = (Ternary(), Ternary(cut=2.0))

Every codec is held to what bundles, models and the Trainer rely on; what its values should be is
for tests of its own.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import Tensor

from fusionkit import registry
from fusionkit.bundles.add_tasks import add_tasks
from fusionkit.bundles.bundle import Bundle
from fusionkit.bundles.compress import compress
from fusionkit.codecs.base import WHOLE_MODEL, DeltaCodec, Encoded, Parts
from fusionkit.errors import FamilyError, FusionKitError
from fusionkit.task_vectors.family import Family
from fusionkit.task_vectors.workers import full_precision, total

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""The dtypes of checkpoints that a codec must take."""

Arguments = dict[str, Any]
"""What `fusionkit.compress` takes beside the codec: `base`, `finetuned`, `private`, …"""

_SHAPES = {
    "scalar": (),
    "one": (1,),
    "bias": (7,),
    "empty": (0,),
    "empty_matrix": (3, 0),
    "square": (16, 16),
    "wide": (5, 48),
    "tall": (64, 3),
    "row": (1, 9),
    "conv1d": (6, 4, 3),
    "conv2d": (8, 3, 3, 3),
    "transposed": (12, 10),
    "embedding": (20, 6),
    "still": (6, 6),
    "still_in_one": (6, 6),
}


class CodecContract:
    """The tests that every codec must pass, each run with each of `codecs`.

    Those of them that take a `dtype` run in all of `DTYPES` with the first setting of each class;
    with its others, which differ in what the dtype of checkpoints has no part in, in float32.

    Attributes:
        codecs: the codecs, as a recipe would set them; the settings that differ most.
    """

    codecs: ClassVar[Sequence[DeltaCodec]] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run each test with each codec, and in the dtypes that are its to take."""
        if not self.codecs:
            raise pytest.UsageError(f"{type(self).__name__}.codecs is empty; name what to test")
        if {"codec", "dtype"} <= set(metafunc.fixturenames):
            pairs = list(_with_dtypes(self.codecs))
            names = [f"{_brief(codec)}-{dtype}" for codec, dtype in pairs]
            metafunc.parametrize(("codec", "dtype"), pairs, ids=names)
        elif "codec" in metafunc.fixturenames:
            metafunc.parametrize("codec", self.codecs, ids=_brief)

    def models(self, folder: Path, dtype: torch.dtype) -> Arguments:
        """A base and three fine-tuned models, for `fusionkit.compress`; `folder` is empty.

        Override it for a codec that takes only a certain kind of model.
        """
        return models(dtype)

    def test_it_is_registered_under_its_id(self, codec: DeltaCodec) -> None:
        """One entry-point line, in the group of codecs."""
        found = registry.load(codec.group, codec.id)
        assert found is type(codec), f"'{codec.id}' is registered as {found!r}"

    def test_it_is_a_frozen_dataclass(self, codec: DeltaCodec) -> None:
        """Equal settings, equal codecs; none changes later."""
        assert dataclasses.replace(cast(Any, codec)) == codec, (
            "a copy with the same settings is not equal"
        )
        for field in dataclasses.fields(cast(Any, codec)):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(codec, field.name, getattr(codec, field.name))

    def test_its_settings_come_back_through_json(self, codec: DeltaCodec) -> None:
        """As a bundle's manifest keeps them."""
        text = json.dumps(registry.to_config(codec))
        back = registry.from_config(json.loads(text))
        assert back == codec, f"{codec!r} comes back as {back!r}"
        assert repr(back) == repr(codec)

    def test_it_comes_back_from_disk_as_it_was_encoded(
        self, codec: DeltaCodec, dtype: torch.dtype, tmp_path: Path
    ) -> None:
        """For every task, tensor and shape; to the bit, where a codec restores tensors."""
        arguments = self.models(tmp_path, dtype)
        family = Family(**arguments)
        wanted = _decoded(codec, family)
        compress(codec=codec, out=tmp_path / "bundle", **arguments)
        bundle = Bundle(tmp_path / "bundle", arguments["base"])
        assert bundle.codec == codec
        for task in family.tasks:
            for name in family.names("delta"):
                base = bundle.base[name]
                found = (
                    bundle.tensor(task, name, base) if codec.restores else bundle.delta(task, name)
                )
                what = f"'{name}' of task '{task}'"
                _check_same(found, wanted[task, name], what, exact=codec.restores)
                if found is not None:
                    assert found.shape == base.shape, what
                    assert found.dtype == (dtype if codec.restores else torch.float32), what

    def test_its_operands_are_what_it_decodes(self, codec: DeltaCodec, tmp_path: Path) -> None:
        """In a batch of many tasks; None where they have to be decoded."""
        bundle = compress(codec=codec, **self.models(tmp_path, torch.float32))
        for task in bundle.tasks:
            for name in bundle.manifest.base.names("delta"):
                if operand := bundle.operand(task, name):
                    found = operand.dense(bundle.base[name].shape)
                    _check_same(found, bundle.delta(task, name), f"'{name}' of '{task}'", False)

    def test_whole_models_come_back(
        self, codec: DeltaCodec, dtype: torch.dtype, tmp_path: Path
    ) -> None:
        """Every tensor of every task, finite, in shape and dtype of the base."""
        arguments = self.models(tmp_path, dtype)
        bundle = compress(codec=codec, **arguments)
        for task in bundle.tasks:
            state = bundle.state_dict(task)
            for name, tensor in bundle.manifest.base.tensors.items():
                if name in state:
                    assert list(state[name].shape) == tensor.shape, name
                    assert state[name].isfinite().all(), f"'{name}' of '{task}' is not finite"
                    assert str(state[name].dtype) == f"torch.{tensor.dtype}", name

    def test_one_task_is_enough(self, codec: DeltaCodec, tmp_path: Path) -> None:
        """A family of one."""
        arguments = self.models(tmp_path, torch.float32)
        task = next(iter(arguments["finetuned"]))
        arguments["finetuned"] = {task: arguments["finetuned"][task]}
        bundle = compress(codec=codec, **arguments)
        assert all(tensor.isfinite().all() for tensor in bundle.state_dict(task).values())

    def test_the_same_input_makes_the_same_bytes(self, codec: DeltaCodec, tmp_path: Path) -> None:
        """Whatever random state the process is in."""
        arguments = self.models(tmp_path, torch.float32)
        contents = []
        for seed in (1, 2):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                bundle = compress(codec=codec, out=tmp_path / f"bundle{seed}", **arguments)
            contents.append({path.name: path.read_bytes() for path in bundle.path.iterdir()})
        first, second = contents
        assert first.keys() == second.keys()
        for name, data in first.items():
            assert data == second[name], f"{name} differs between two runs"

    def test_tensors_are_encoded_each_by_itself(self, codec: DeltaCodec, tmp_path: Path) -> None:
        """In any order, so that threads and processes can share them."""
        family = Family(**self.models(tmp_path, torch.float32))
        encoder = codec.prepare(family)
        try:
            names = family.names("delta")
            first = {name: encoder.encode(family.vectors(name)) for name in names}
            again = {name: encoder.encode(family.vectors(name)) for name in reversed(names)}
        finally:
            encoder.close()
        for name in names:
            what = f"'{name}', encoded in another order,"
            _check_same(first[name].sums, again[name].sums, what)
            pairs = [(first[name].shared, again[name].shared)]
            pairs += zip(first[name].tasks, again[name].tasks, strict=True)
            for one, other in pairs:
                assert one.keys() == other.keys(), f"{what} has other parts"
                for part, tensor in one.items():
                    _check_same(other[part], tensor, what)

    def test_bytes_reported_are_bytes_on_disk(self, codec: DeltaCodec, tmp_path: Path) -> None:
        """Sizes are what the files weigh."""
        bundle = compress(codec=codec, **self.models(tmp_path, torch.float32))
        on_disk = {path.name: path.stat().st_size for path in bundle.path.iterdir()}
        assert bundle.nbytes == sum(on_disk.values()), f"the files weigh {on_disk}"

    def test_a_task_is_decoded_from_its_own_file(self, codec: DeltaCodec, tmp_path: Path) -> None:
        """And the shared one: what the other tasks' files hold does not matter."""
        bundle = compress(codec=codec, **self.models(tmp_path, torch.float32))
        first, *others = bundle.tasks
        before = bundle.state_dict(first)
        for task in others:
            (path,) = bundle.path.glob(f"task-{task}.*")
            path.write_bytes(bytes(path.stat().st_size))
        again = Bundle(bundle.path, bundle.base).state_dict(first)
        for name, tensor in before.items():
            _check_same(again[name], tensor, name)

    def test_nothing_that_it_is_given_is_written_to(
        self, codec: DeltaCodec, tmp_path: Path
    ) -> None:
        """Neither the models nor, on decoding, the payload and the base."""
        arguments = self.models(tmp_path, torch.float32)
        family = Family(**arguments)
        sources = {"base": family.base, **family.finetuned}
        before = {(s, n): t.clone() for s, each in sources.items() for n, t in each.items()}
        encoded = list(_encoded(codec, family))
        for source, each in sources.items():
            for name, tensor in each.items():
                _check_same(tensor, before[source, name], f"'{name}' of {source}, after encoding,")
        for _, name, parts in _parts(encoded, family):
            kept = {part: tensor.clone() for part, tensor in parts.items()}
            base = family.base[name].clone()
            first = _decode(codec, parts, base)
            for part, tensor in parts.items():
                _check_same(tensor, kept[part], f"part '{part}' of '{name}', after decoding,")
            _check_same(base, family.base[name], f"the base's '{name}', after decoding,")
            first = first.clone()
            _check_same(_decode(codec, parts, base), first, f"'{name}', decoded twice,")

    @pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-6, 1e4, 1e30], ids=str)
    def test_finite_values_come_back_finite_or_are_refused(
        self, codec: DeltaCodec, scale: float, tmp_path: Path
    ) -> None:
        """However small, large or absent the deltas are."""
        arguments = self.models(tmp_path, torch.float32)
        if not all(isinstance(source, Mapping) for source in arguments["finetuned"].values()):
            pytest.skip("the models of this codec are files; their deltas are not scaled")
        base, names = arguments["base"], Family(**arguments).names("delta")
        for state in arguments["finetuned"].values():
            for name in names:
                state[name] = base[name] + scale * (state[name] - base[name])
            state["decoder"] = state["embedding"]
        try:
            bundle = compress(codec=codec, **arguments)
        except FusionKitError as error:
            assert re.search(r"[a-z]{3}", str(error)), "refused without a word"  # noqa: PT017
            return
        for task in bundle.tasks:
            for name, tensor in bundle.state_dict(task).items():
                assert tensor.isfinite().all(), f"'{name}' of '{task}' is not finite"

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
    def test_values_that_are_not_finite_are_refused_by_name(
        self, codec: DeltaCodec, bad: float, tmp_path: Path
    ) -> None:
        """Naming tensor and task; no bundle is left."""
        arguments = self.models(tmp_path, torch.float32)
        task = list(arguments["finetuned"])[-1]
        if not isinstance(arguments["finetuned"][task], Mapping):
            pytest.skip("the models of this codec are files; they are left whole")
        arguments["finetuned"][task]["square"][2, 3] = bad
        with pytest.raises(FamilyError, match=f"'square' .*NaN or infinite.*'{task}'"):
            compress(codec=codec, out=tmp_path / "bundle", **arguments)
        assert not (tmp_path / "bundle").exists()

    def test_a_task_can_be_added_later(self, codec: DeltaCodec, tmp_path: Path) -> None:
        """The others' files stay as they are; against shared parts only if that is asked for."""
        arguments = self.models(tmp_path, torch.float32)
        *first, last = arguments["finetuned"]
        added = {last: arguments["finetuned"].pop(last)}
        bundle = compress(codec=codec, out=tmp_path / "bundle", **arguments)
        before = {task: bundle.state_dict(task) for task in first}
        add_tasks(bundle, added, keep_shared=bundle.tasks_share)
        opened = Bundle(tmp_path / "bundle", bundle.base)
        assert opened.tasks == (*first, last)
        for task, state in before.items():
            now = opened.state_dict(task)
            for name, tensor in state.items():
                _check_same(now[name], tensor, f"'{name}' of task '{task}'")
        assert all(tensor.isfinite().all() for tensor in opened.state_dict(last).values())


def models(dtype: torch.dtype = torch.float32, seed: int = 0) -> Arguments:
    """A base and three fine-tuned models, with every shape that real ones have, and some more.

    Scalars to 4-D, empty, not contiguous, tied, of zero deltas, private; deltas have a heavy tail.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...], scale: float) -> Tensor:
        values = torch.randn(shape, generator=generator)
        return scale * values * values.abs().sqrt()

    base = {name: draw(shape, 0.5).to(dtype) for name, shape in _SHAPES.items()}
    base["transposed"] = base["transposed"].mT.contiguous().mT
    finetuned = {}
    for place, task in enumerate(("ant", "bee", "cat")):
        state = {
            name: (tensor.to(torch.float32) + draw(_SHAPES[name], 0.05)).to(dtype)
            for name, tensor in base.items()
        }
        state["still"] = base["still"].clone()
        if place == 0:
            state["still_in_one"] = base["still_in_one"].clone()
        state["transposed"] = state["transposed"].mT.contiguous().mT
        state["decoder"] = state["embedding"]
        state["head.weight"] = draw((place + 2, 6), 1.0).to(dtype)
        finetuned[task] = state
    base["decoder"] = base["embedding"]
    base["head.weight"] = draw((4, 6), 1.0).to(dtype)
    return {"base": base, "finetuned": finetuned, "private": ["head.*"]}


def _with_dtypes(codecs: Sequence[DeltaCodec]) -> Iterator[tuple[DeltaCodec, torch.dtype]]:
    """Each codec with the dtypes that it is tested in: all, for the first of its class."""
    seen: set[type[DeltaCodec]] = set()
    for codec in codecs:
        for dtype in DTYPES[:1] if type(codec) in seen else DTYPES:
            yield codec, dtype
        seen.add(type(codec))


def _brief(codec: DeltaCodec) -> str:
    """The codec with those of its settings that are not the default."""
    own = [
        f"{field.name}={value!r}"
        for field in dataclasses.fields(cast(Any, codec))
        if (value := getattr(codec, field.name)) != field.default
    ]
    return f"{type(codec).__name__}({', '.join(own)})"


def _encoded(codec: DeltaCodec, family: Family) -> Iterator[Encoded]:
    """Each tensor's payload, then the whole model's, as the contract has it."""
    encoder = codec.prepare(family)
    try:
        sums = []
        for vectors in family:
            encoded = encoder.encode(vectors)
            assert encoded.name == vectors.name, f"'{vectors.name}' is encoded as '{encoded.name}'"
            sums.append(encoded.sums)
            yield encoded
        whole = (
            encoder.finish(total(each for each in sums if each is not None))
            if encoder.finish
            else None
        )
        if whole is not None:
            yield whole
    finally:
        encoder.close()


def _parts(encoded: Sequence[Encoded], family: Family) -> Iterator[tuple[str, str, Parts]]:
    """Task, tensor, and all the parts that decode it, as a bundle would hand them over."""
    whole: Encoded = next((e for e in encoded if e.name == WHOLE_MODEL), Encoded(WHOLE_MODEL))
    for each in encoded:
        if each.name == WHOLE_MODEL:
            continue
        for place, task in enumerate(family.tasks):
            own = each.tasks[place] if each.tasks else {}
            if own or each.shared:
                of_model = {**whole.shared, **(whole.tasks[place] if whole.tasks else {})}
                yield task, each.name, {**of_model, **each.shared, **own}


def _decode(codec: DeltaCodec, parts: Parts, base: Tensor) -> Tensor:
    return codec.restore(parts, base) if codec.restores else codec.decode(parts, base.shape)


def _decoded(codec: DeltaCodec, family: Family) -> dict[tuple[str, str], Tensor | None]:
    """Every task's every tensor, decoded in memory."""
    found: dict[tuple[str, str], Tensor | None] = {
        (task, name): None for task in family.tasks for name in family.names("delta")
    }
    with full_precision():
        for task, name, parts in _parts(list(_encoded(codec, family)), family):
            found[task, name] = _decode(codec, parts, family.base[name])
    return found


def _check_same(found: Tensor | None, wanted: Tensor | None, what: str, exact: bool = True) -> None:
    """Equal to the bit; or but for the order in which a product's terms were added."""
    if found is None or wanted is None:
        missing = "missing" if found is None else "there"
        assert found is wanted, f"{what} is {missing}, against what was encoded"
        return
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), f"{what} changed its form"
    if exact:
        assert torch.equal(found, wanted), f"{what} differs"
    elif wanted.numel():
        least = 1e-6 * float(wanted.abs().max())
        assert torch.allclose(found, wanted, rtol=1e-5, atol=least), f"{what} differs"
