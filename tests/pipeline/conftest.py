"""Lets the tests of stages share what stands in for corpora, models and the stages that make them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))
