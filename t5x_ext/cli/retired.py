"""Names that gin files of earlier versions use, and what they are called now."""

from __future__ import annotations

_TO_CORPORA = (
    *("BeamRunner", "CldrCorpus", "ParallelText", "SeqioMixture", "aligned_files"),
    *("monolingual_text", "cldr", "filters", "noise", "parallel_text", "seqio_mixture"),
)
_TO_PIPELINE = (
    *("Average", "Clean", "Evaluate", "GreedyEnsemble", "Pipeline", "Select", "Texts", "Train", "Translate"),
)

MOVED_TO_ROOM: dict[tuple[str, str], str] = {
    **{("t5x_ext.data", name): "corpora" for name in _TO_CORPORA},
    **{("t5x_ext.vega_mt", name): "pipeline" for name in _TO_PIPELINE},
}
"""From a module and a name that it no longer has to the room that has it."""

RENAMED: dict[tuple[str, str], str] = {
    (module, "CleaningConfig"): "corpora.PairRules (from t5x_ext import corpora); max_length_ratio, in characters, is"
    " now max_ratio, in words"
    for module in ("t5x_ext.data", "t5x_ext.corpora", "t5x_ext.corpora.cleaning")
}
"""From a module and a name that it no longer has to the new name, as the end of a message."""

SETTINGS: dict[str, str] = {
    "Run.data": "tasks.Translation.data, with train.Run.task = @tasks.Translation()",
    "Run.model": "tasks.Translation.model, with train.Run.task = @tasks.Translation()",
    "EvaluationConfig.max_lines": "tasks.Translation.max_lines",
    "EvaluationConfig.decode": "tasks.Translation.decode",
    "EvaluationConfig.test_decode": "tasks.Translation.test_decode",
    "logical_axes.config": "models.logical_axes.model",
}
"""From a class and a parameter that it no longer has to what takes its place."""


def moved_name(module: str, name: str) -> str:
    """What to write instead of a name that a module no longer has, as the end of a message; nothing if it never had it.

    >>> moved_name("t5x_ext.data", "ParallelText")
    '; it is now corpora.ParallelText (from t5x_ext import corpora)'
    """
    if (module, name) in RENAMED:
        return f"; it is now {RENAMED[module, name]}"
    room = MOVED_TO_ROOM.get((module, name))
    return f"; it is now {room}.{name} (from t5x_ext import {room})" if room else ""


def retired_setting(target: str, parameter: str) -> str:
    """What took the place of a setting, as the end of a message; nothing for a setting that never was.

    >>> retired_setting("EvaluationConfig", "max_lines")
    '; use tasks.Translation.max_lines'
    """
    from t5x_ext.decode.config import RETIRED

    new = {**SETTINGS, **RETIRED}.get(f"{target}.{parameter}")
    return f"; use {new}" if new else ""
