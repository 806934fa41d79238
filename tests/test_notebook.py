"""The notebook, run as it stands over a demo of short training."""

from pathlib import Path
from typing import Any

import pytest

from fusionkit.cli import demo

NOTEBOOK = Path(__file__).parents[1] / "examples/first_hour.ipynb"


def notebook() -> Any:
    nbformat = pytest.importorskip("nbformat", reason="pip install 'fusionkit[test]'")
    return nbformat.read(NOTEBOOK, 4)


def test_what_it_shows_is_stored() -> None:
    cells = [cell for cell in notebook().cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in cells)
    assert all(output.output_type != "error" for cell in cells for output in cell.outputs)
    assert NOTEBOOK.stat().st_size < 300_000


@pytest.mark.nightly
@pytest.mark.slow
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = pytest.importorskip("nbclient", reason="pip install 'fusionkit[test]'")
    for kind in ("base", "full", "lora"):
        monkeypatch.setitem(demo.SETTINGS, kind, {**demo.SETTINGS[kind], "steps": 2})
    demo.lay_out(demo.prepare(tmp_path / "cache"), tmp_path / "out/demo")
    ran = notebook()
    where = {"metadata": {"path": str(tmp_path)}}
    client.NotebookClient(ran, timeout=600, resources=where).execute()
    said = "".join(str(cell.get("outputs")) for cell in ran.cells)
    assert "'mirror'" in said
    assert "Sketch 1" in said
    assert (tmp_path / "out/demo/notebook_mirror/config.json").is_file()
