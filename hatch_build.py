"""The README of wheel and sdist: with BATCHNORM_BASE_URL, links to files of the repository begin with that address.

A package index shows the README without the repository's files. The release workflow sets the variable, once.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class ReadmeHook(MetadataHookInterface):
    """Set the project's readme."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Read README.md and complete its relative links."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        base = os.environ.get("BATCHNORM_BASE_URL", "").rstrip("/")
        if base:
            text = re.sub(r"(!\[[^]]*\])\((?!https?://)([^)]+)\)", rf"\1({base}/\2?raw=true)", text)
            text = re.sub(r"\]\((?!https?://|#)", f"]({base}/", text)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
