"""Fixtures that several test files use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("EDGESIGHT_SHARED", ROOT.parent / "shared"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs the development photos where they are not there."""
    if SHARED.is_dir():
        return
    mark = pytest.mark.skip(reason=f"no development photos and weights at {SHARED}")
    for item in items:
        if "shared" in item.keywords:
            item.add_marker(mark)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of development photos and weights."""
    return SHARED
