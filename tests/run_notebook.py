"""Run the notebook under examples/ in a kernel of its own.

`python tests/run_notebook.py` runs it and stores what its cells show.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient

PATH = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
QUIET = {
    "OMP_WAIT_POLICY": "passive",  # spinning workers slow each other down on busy machines
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # they would be stored, with their times
    "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm misses ipywidgets and says where
}


def read() -> nbformat.NotebookNode:
    """The notebook as it is stored."""
    return nbformat.read(PATH, as_version=4)


def run(notebook: nbformat.NotebookNode, timeout_s: int = 240) -> nbformat.NotebookNode:
    """The same notebook with fresh outputs; raises CellExecutionError at the first error.

    timeout_s: of a cell, many times what it takes.
    """
    notebook = nbformat.from_dict(notebook)
    client = NotebookClient(
        notebook,
        timeout=timeout_s,
        kernel_name="python3",
        resources={"metadata": {"path": str(PATH.parent)}},
        record_timing=False,
        coalesce_streams=True,
    )
    with TemporaryDirectory() as home:  # without the startup files and settings of whoever runs it
        client.execute(env={**os.environ, **QUIET, "IPYTHONDIR": home})
    notebook.metadata = nbformat.from_dict(METADATA)  # the kernel adds versions
    return notebook


def main() -> None:
    nbformat.write(run(read()), PATH)
    print(f"{PATH.name} stored", file=sys.stderr)


if __name__ == "__main__":
    main()
