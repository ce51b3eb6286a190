"""Runs a notebook and turns it into a page."""

from __future__ import annotations

import base64
import tempfile
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient


def _text(output: nbformat.NotebookNode) -> str:
    if output.output_type == "stream":
        return output.text if output.name == "stdout" else ""  # warnings name folders of the machine that builds
    return output.data.get("text/plain", "")


def run(path: Path, folder: Path) -> tuple[str, dict[str, bytes]]:
    """Execute ``path`` in ``folder``.

    Returns:
        Markdown of cells and outputs, and the pictures among the outputs, by path on the site.
    """
    book = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as sockets:
        kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{sockets}/kernel")
        NotebookClient(book, km=kernel, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    parts, pictures = [], {}
    for cell in book.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                name = f"images/{path.stem}_{len(pictures)}.png"
                pictures[name] = base64.b64decode(output.data["image/png"])
                parts.append(f"![Output of the cell above](../{name})")
            elif text := _text(output).rstrip():
                parts.append(f'```{{.text .output title="Output"}}\n{text}\n```')
    return "\n\n".join(parts) + "\n", pictures
