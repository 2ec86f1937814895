"""The documentation site, built once for the tests that look at it."""

from __future__ import annotations

from pathlib import Path

import pytest
from site_building import ROOT, build


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    pytest.importorskip("material", reason="the site's tools are not installed: pip install 'batchnorm[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder
