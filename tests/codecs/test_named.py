"""Codecs by id, class name or class, and what is wrong with a name or a setting."""

from typing import Any

import pytest

from fusionkit import EMR, SVD, MagnitudePrune
from fusionkit.codecs.named import codec_of
from fusionkit.errors import CodecError, PluginError


@pytest.mark.parametrize("name", ["svd", "SVD", SVD])
def test_by_each_of_its_names(name: Any) -> None:
    assert codec_of(name, rank=4, dtype="int4") == SVD(4, dtype="int4")
    assert codec_of("MagnitudePrune") == MagnitudePrune()


def test_one_that_is_made() -> None:
    codec = EMR()
    assert codec_of(codec) is codec
    with pytest.raises(CodecError, match=r"rank: is no argument, and EMR\(.*settings already"):
        codec_of(codec, rank=3)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("svd", {"rnak": 3}, "SVD has no setting 'rnak'; did you mean 'rank'"),
        (3, {}, "expected a DeltaCodec, got 3; its id or class will do"),
        (int, {}, "expected a DeltaCodec, got <class 'int'>"),
        ("svd", {"rank": -1}, "rank"),
    ],
)
def test_what_can_not_be(name: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(CodecError, match=said):
        codec_of(name, **settings)


def test_a_name_that_is_not_installed() -> None:
    with pytest.raises(PluginError, match=r"'Sketsh'; did you mean 'sketch'\?\ninstalled: "):
        codec_of("Sketsh")
