"""Model to text: beam and greedy search, sampling, all tokens at once, forced scoring, lines and files.

A `Search` (`Beam`, `Greedy`, `Sample`, `LengthBeam`, or any other) finds hypotheses with a model; `Constraint`s forbid
what it may not say; `Translator` joins model and vocabulary; `translate_file`, `score_file` and `translate_stream` add
files. All options are in `DecodeConfig`.
"""

from __future__ import annotations

from t5x_ext.decode.beam import Beam
from t5x_ext.decode.config import DecodeConfig
from t5x_ext.decode.constraints import ForbidTokens, MinimumLength, NoRepeatNgrams
from t5x_ext.decode.ensemble import Ensemble
from t5x_ext.decode.files import FileReport, score_file, translate_file, translate_stream
from t5x_ext.decode.greedy import Greedy
from t5x_ext.decode.parallel import CtcGreedy, LengthBeam, ParallelGreedy, default_search
from t5x_ext.decode.sampling import Sample
from t5x_ext.decode.scoring import Score, perplexity
from t5x_ext.decode.search import Constraint, Hypotheses, Search, SearchInputs
from t5x_ext.decode.steps import decoding_steps, require_methods, rollout
from t5x_ext.decode.translator import Hypothesis, Translator

__all__ = [
    "Beam",
    "Constraint",
    "CtcGreedy",
    "DecodeConfig",
    "Ensemble",
    "FileReport",
    "ForbidTokens",
    "Greedy",
    "Hypotheses",
    "Hypothesis",
    "LengthBeam",
    "MinimumLength",
    "NoRepeatNgrams",
    "ParallelGreedy",
    "Sample",
    "Score",
    "Search",
    "SearchInputs",
    "Translator",
    "decoding_steps",
    "default_search",
    "perplexity",
    "require_methods",
    "rollout",
    "score_file",
    "translate_file",
    "translate_stream",
]
