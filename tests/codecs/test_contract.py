"""The contract of `fusionkit.testing`: the built-in codecs pass, faulty ones fail."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_net import TASKS, TESTS

from fusionkit import (
    DBMS,
    EMR,
    SVD,
    TIES,
    Dense,
    Elect,
    MagnitudePrune,
    Mean,
    Merged,
    Normalized,
    Sketch,
    TaskArithmetic,
    Weighted,
)
from fusionkit.errors import BundleError
from fusionkit.registry import load
from fusionkit.testing import CodecContract, models

FAULTS = {
    "random": "test_the_same_input_makes_the_same_bytes",
    "writes to the base": "test_nothing_that_it_is_given_is_written_to",
    "writes to the payload": "test_nothing_that_it_is_given_is_written_to",
    "infinite": "test_finite_values_come_back_finite_or_are_refused",
    "half": "test_it_comes_back_from_disk_as_it_was_encoded",
    "memory": "test_a_task_can_be_added_later",
    "decoded": "test_it_comes_back_from_disk_as_it_was_encoded",
    "order": "test_tensors_are_encoded_each_by_itself",
}
OTHERS = {
    "changing": "test_it_is_a_frozen_dataclass",
    "forgetful": "test_its_settings_come_back_through_json",
}
ARGUMENTS = {"dtype": torch.float32, "scale": 1.0, "bad": float("nan")}


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The codecs at fault, by id, installed."""
    monkeypatch.syspath_prepend(TESTS / "faulty_plugin")
    return lambda name: load("fusionkit.codecs", name)


def hold(test: str, codec: Any, folder: Path) -> None:
    """Hold a codec to one test of the contract."""
    method = getattr(CodecContract(), test)
    given = {"codec": codec, "tmp_path": folder, **ARGUMENTS}
    method(**{name: given[name] for name in inspect.signature(method).parameters})


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(faulty: Any, fault: str, tmp_path: Path) -> None:
    codec = faulty("faulty")(fault)
    error = BundleError if fault == "decoded" else AssertionError
    with pytest.raises(error):
        hold(FAULTS[fault], codec, tmp_path)


@pytest.mark.parametrize("name", OTHERS)
def test_a_faulty_class_is_found(faulty: Any, name: str, tmp_path: Path) -> None:
    codec = faulty(name)()
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        hold(OTHERS[name], codec, tmp_path)


def test_what_keeps_to_the_contract_passes_all_of_it(faulty: Any, tmp_path: Path) -> None:
    tests = [name for name in vars(CodecContract) if name.startswith("test_")]
    assert set(FAULTS.values()) | set(OTHERS.values()) <= set(tests)
    for codec in (faulty("faulty")(), faulty("lender")()):
        for test in tests:
            folder = tmp_path / codec.id / test
            folder.mkdir(parents=True)
            hold(test, codec, folder)


def test_a_class_that_names_no_codec_is_an_error(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        from fusionkit.testing import CodecContract

        class TestNothing(CodecContract):
            pass
        """
    )
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines("*TestNothing.codecs is empty; name what to test*")


def test_its_models_have_every_shape() -> None:
    arguments = models(torch.bfloat16)
    base = arguments["base"]
    assert tuple(arguments["finetuned"]) == TASKS
    assert {tensor.ndim for tensor in base.values()} == {0, 1, 2, 3, 4}
    assert {tensor.dtype for tensor in base.values()} == {torch.bfloat16}
    assert not base["transposed"].is_contiguous()
    assert base["embedding"].data_ptr() == base["decoder"].data_ptr()
    assert not base["empty"].numel()


class TestDense(CodecContract):
    codecs = (Dense(), Dense("fp32"), Dense("int4"), Dense("int3"))


class TestEMR(CodecContract):
    codecs = (
        EMR(),
        EMR(rescale="l2", scope="tensor", dtype="int8"),
        EMR(dtype="int3"),
        EMR(dtype="int2"),
    )


class TestMagnitudePrune(CodecContract):
    codecs = (
        MagnitudePrune(),
        MagnitudePrune(0.3, scope="tensor", merge=TIES(), dtype="bf16"),
        MagnitudePrune(1.0, merge=TaskArithmetic()),
        MagnitudePrune(0.2, dtype="int2"),
    )


class TestMerged(CodecContract):
    codecs = (
        Merged(Mean()),
        Merged(Normalized(TIES()), dtype="int4"),
        Merged(Elect()),
        Merged(Weighted({"ant": 0.5, "bee": -1.0, "cat": 2.0})),
    )


class TestSVD(CodecContract):
    codecs = (
        SVD(rank=2),
        SVD(energy=0.9, scope="model", dtype="int8"),
        SVD(budget=2000),
        SVD(rank=3, dtype="int3"),
        SVD(budget=1000, dtype="int2"),
    )


class TestSketch(CodecContract):
    codecs = (
        Sketch(bits=12),
        Sketch(bytes=20_000, share="equal"),
        Sketch(noise=0.02),
        Sketch(bits=20, sketch=False),
    )


class TestDBMS(CodecContract):
    codecs = (
        DBMS(MagnitudePrune(0.1)),
        DBMS(SVD(rank=1), MagnitudePrune(0.1)),
        DBMS(EMR(), grid=()),
    )
