"""What the tests of this folder start from: a digest cache of their own, a tiny base and an adapter of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_files import make_adapter, make_base


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keeps tests away from the digest cache of whoever runs them; returns where theirs lies."""
    path = tmp_path_factory.mktemp("cache") / "digests.sqlite"
    monkeypatch.setenv("ADAPTERTOOL_CACHE", str(path))
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter")
