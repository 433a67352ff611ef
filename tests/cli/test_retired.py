"""Names of earlier versions lead to what they are called now, and everything that they lead to exists."""

from __future__ import annotations

import importlib

import pytest

from t5x_ext.cli.gin_config import build_run
from t5x_ext.cli.retired import MOVED_TO_ROOM, RENAMED, moved_name
from t5x_ext.contracts import UserError


def test_a_renamed_class_leads_to_the_new_one():
    hint = moved_name("t5x_ext.data", "CleaningConfig")
    assert hint.startswith("; it is now corpora.PairRules (from t5x_ext import corpora); max_length_ratio")
    assert moved_name("t5x_ext.data", "Cleaning") == ""


@pytest.mark.parametrize(
    ("binding", "new"),
    [
        ("DecodeConfig.beam_size=3", "decode.Beam.beam_size, with decode.DecodeConfig.search = @decode.Beam()"),
        ("DecodeConfig.strategy=greedy", "decode.DecodeConfig.search = @decode.Beam(), @decode.Greedy() or "),
        ("Run.model=3", "tasks.Translation.model"),
    ],
)
def test_a_retired_setting_leads_to_the_new_one(binding, new):
    with pytest.raises(UserError) as error:
        build_run(["runs/quickstart.gin"], [binding])
    name, _, field = binding.partition("=")[0].partition(".")
    assert str(error.value).startswith(f"--gin.{name}.{field}: '{name}' has no parameter '{field}'; use {new}")


def test_new_names_exist():
    for (_, name), room in MOVED_TO_ROOM.items():
        assert hasattr(importlib.import_module(f"t5x_ext.{room}"), name), name
    for (module, name), text in RENAMED.items():
        room, new = text.split(" ")[0].split(".")
        assert hasattr(importlib.import_module(f"t5x_ext.{room}"), new)
        assert not hasattr(importlib.import_module(module), name)
