"""The pages in `docs/`: built strictly, and what they show, parsed or run."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from fusionkit.cli import main as cli

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
HOSTED = re.compile(r"(?:href|src)=\"https?://[^\"]+\.(?:js|css|woff2?)\"")
"""A script, a style or a font that a page would load from elsewhere."""


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, built: a link, an anchor or a name that leads nowhere is an error."""
    for module in ("mkdocs", "material", "mkdocstrings"):
        if find_spec(module) is None:
            pytest.skip("the docs' generator is not installed: pip install 'fusionkit[docs]'")
    folder = tmp_path_factory.mktemp("site")
    program = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_the_pages_are_built_strictly(site: Path) -> None:
    for page in PAGES:
        built = site / page.relative_to(ROOT / "docs").with_suffix(".html")
        assert built.is_file()
        assert not HOSTED.search(text_of(built))


def test_every_public_name_is_in_the_reference() -> None:
    import fusionkit

    named = re.findall(r"^::: (.*)", "".join(map(text_of, PAGES)), re.MULTILINE)
    public = [f"{place}.{name}" for name, place in fusionkit._PLACES.items()]
    assert [name for name in public if name not in named] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_command_of_a_page_exists(page: Path) -> None:
    shown = re.findall(r"^\$ (.*)", text_of(page), re.MULTILINE)
    verbs = set(re.findall(r"\bfusionkit ([a-z]+)\b", "\n".join(shown)))
    assert verbs <= set(cli.VERBS)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_python_block_of_a_page_compiles(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", text_of(page), re.DOTALL):
        compile(block, str(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    named = re.findall(r"`((?:recipes|tests|examples|plugins|fusionkit)/[\w./-]+)`", text_of(page))
    named += re.findall(r"--config ((?:recipes|tests)/[\w./]+\.yaml)", text_of(page))
    assert [name for name in named if not (ROOT / name).exists()] == []
