"""Every notebook runs clean from top to bottom, and is stored without outputs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGE = ROOT / "wiseflow_nb" / "dashboard" / "app.ipynb"


@pytest.mark.parametrize("path", [*NOTEBOOKS, PAGE], ids=lambda path: path.name)
def test_is_valid_and_stripped(path: Path) -> None:
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    for cell in notebook.cells:
        assert cell.cell_type != "code" or (cell.outputs == [] and cell.execution_count is None)


@pytest.mark.kernel
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_runs_from_top_to_bottom(path: Path) -> None:
    import nbclient

    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=90, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]


_NESTED = """
import asyncio
from wiseflow_nb import run_nested

async def slow():
    await asyncio.sleep(0.5)
    return 42

assert asyncio.get_running_loop().is_running()
print(run_nested(slow()))
"""


@pytest.mark.kernel
def test_cells_queued_behind_run_nested_all_run() -> None:
    statuses, written = _queue_cells()
    assert statuses == ["ok"] * 6
    assert written.split() == ["42", "0", "1", "2", "3", "4"]


def _queue_cells() -> tuple[list[str], str]:
    from jupyter_client.manager import KernelManager

    manager = KernelManager(kernel_name="python3")
    manager.start_kernel()
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        asked = [client.execute(_NESTED), *(client.execute(f"print({number})") for number in range(5))]
        answered: dict[str, str] = {}
        # A second answer to wait_for_ready's own question may come in between.
        while not set(asked) <= set(answered):
            reply = client.get_shell_msg(timeout=30)
            answered[reply["parent_header"]["msg_id"]] = reply["content"]["status"]
        written, idle = "", 0
        while idle < len(asked):
            message = client.get_iopub_msg(timeout=30)
            if message["parent_header"].get("msg_id") not in asked:
                continue
            if message["msg_type"] == "stream":
                written += message["content"]["text"]
            idle += message["msg_type"] == "status" and message["content"]["execution_state"] == "idle"
        return [answered[item] for item in asked], written
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()
        manager.context.destroy(linger=0)
