"""Lets the tests of optimizers share the table of what every optimizer is checked on."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))
