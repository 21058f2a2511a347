"""The working directory as a worker process is told it, in every case that ``os`` knows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from wiseflow_nb.pool import _process_directory
from wiseflow_nb.pool._process_directory import directory

pytestmark = pytest.mark.skipif(os.name != "posix", reason="workers are POSIX processes")


@pytest.fixture(autouse=True)
def _back(tmp_path: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(tmp_path)
    yield
    os.chdir(before)


def test_each_change_is_seen() -> None:
    for name in ("one", "zwei drei", "\N{SNOWMAN}"):
        os.mkdir(name)
        os.chdir(name)
        assert directory() == os.getcwdb()


def test_a_path_longer_than_the_room_is_asked_of_the_system_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_process_directory, "ROOM_BYTES", 4)
    _process_directory._reader.cache_clear()
    assert directory() == os.getcwdb()
    _process_directory._reader.cache_clear()


def test_a_directory_that_was_removed_is_empty() -> None:
    os.mkdir("gone")
    os.chdir("gone")
    os.rmdir(os.getcwdb())
    assert directory() == b""
