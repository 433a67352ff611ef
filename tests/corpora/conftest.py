"""Keeps pytest's doctest collection from importing the program that test_seqio.py runs with TensorFlow."""

from __future__ import annotations

collect_ignore = ["seqio_program.py"]
