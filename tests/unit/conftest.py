"""What many unit tests need."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tables import Write


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file of the test's folder and returns its path."""

    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write
