"""What FusionKit does without packages that only its extras install."""

import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from fusionkit.calibration.pair_search import PROBES, PairSearch
from fusionkit.cli.report import blank_figure
from fusionkit.errors import MissingExtraError
from fusionkit.tasks import digits, transforms
from fusionkit.tasks.dual_encoders import dual_encoder

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def search() -> object:
    """A search past its probes, where it draws."""
    found = PairSearch(seed=0, spread=0.5)
    for _ in range(len(PROBES) + 1):
        found.tell(found.ask(), 1.0)
    return found


@pytest.mark.parametrize(
    ("module", "extra", "use"),
    [
        ("timm", "demo", digits.base_model),
        ("sklearn.datasets", "demo", digits._sklearn),
        ("timm.data", "vision", lambda: transforms.image_transform({"input_size": [1, 8, 8]})),
        ("matplotlib", "plots", lambda: blank_figure(1, 1)),
        ("cma", "search", search),
        ("open_clip", "clip", lambda: dual_encoder("open_clip:ViT-B-32/openai")),
    ],
)
def test_what_lacks_says_which_line_installs_it(
    module: str, extra: str, use: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=re.escape(f"pip install 'fusionkit[{extra}]'")):
        use()


def test_every_extra_that_is_named_is_there() -> None:
    code = "".join(path.read_text() for path in (ROOT / "fusionkit").rglob("*.py"))
    named = set(re.findall(r"'fusionkit\[([\w,]+)\]'", code))
    named |= set(re.findall(r'of_extra\(\s*"[\w.]+", "(\w+)"', code))
    assert {"plots", "search", "demo", "vision", "text"} <= named
    assert named <= PROJECT["optional-dependencies"].keys()


def test_the_page_has_every_extra() -> None:
    page = (ROOT / "docs/install.md").read_text()
    rows = set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE))
    assert rows == PROJECT["optional-dependencies"].keys()
