"""The notebook runs, and stands in the repository without outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
PATH = Path(__file__).parents[1] / "notebooks" / "01_compress.ipynb"


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture
def notebook() -> Any:
    return nbformat.read(PATH, as_version=4)


def test_outputs_are_stripped(notebook: Any) -> None:
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert len(code_cells(notebook)) == 5
    for cell in code_cells(notebook):
        assert cell.outputs == [] and cell.execution_count is None


def test_it_runs(notebook: Any, minilm_folder: Path, tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient")
    # in a folder of its own, so that the kernel imports the foldprune that the tests do
    client = nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        allow_errors=False,
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    load, compress, report, verify, plot = (cell.outputs for cell in code_cells(notebook))
    assert load[-1].data["text/plain"] == "22713216"
    assert "30.0% of the numbers removed" in compress[-1].data["text/plain"]
    assert "<table>" in report[-1].data["text/html"]
    assert "mean cosine of 24 sentence embeddings: 0.9" in verify[-1].text
    assert any("image/png" in output.get("data", {}) for output in plot)
