"""Every codec, the whole way, on values at the limits of their dtypes: right, or refused by name.

More of the same: `pytest -n 0 tests/codecs/test_numbers.py --hypothesis-profile=many`.
"""

import tempfile
from pathlib import Path

import pytest
from bounds.check import hold
from bounds.codecs import CODECS
from bounds.draw import families
from hypothesis import given
from hypothesis import strategies as st
from profiles import few


@few(6)
@given(data=st.data())
@pytest.mark.parametrize("name", CODECS)
def test_what_comes_back_is_within_the_codecs_bound(name: str, data: st.DataObject) -> None:
    drawn, codec = data.draw(families()), data.draw(CODECS[name]())
    with tempfile.TemporaryDirectory() as folder:
        hold(drawn, codec, Path(folder))
