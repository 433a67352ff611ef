"""Lets the tests of Vega-MT's stages use the stand-ins of the tests of pipelines."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "pipeline"))
