"""Model to text: greedy and beam search, sampling, forced scoring, and translation of lines and files.

The searches (`beam_search`, `greedy`, `sample`) work on any `tokens_to_logits` callable; `Translator` joins them with a
model and its vocabulary; `translate_file`, `score_file` and `translate_stream` add files. All options are in
`DecodeConfig`.
"""

from __future__ import annotations

from t5x_ext.decode.config import DecodeConfig
from t5x_ext.decode.ensemble import Ensemble
from t5x_ext.decode.files import FileReport, score_file, translate_file, translate_stream
from t5x_ext.decode.sampling import sample
from t5x_ext.decode.scoring import Score, perplexity
from t5x_ext.decode.search import Hypotheses, beam_search, fairseq_penalty, gnmt_penalty, greedy
from t5x_ext.decode.translator import Hypothesis, Translator

__all__ = [
    "DecodeConfig",
    "Ensemble",
    "FileReport",
    "Hypotheses",
    "Hypothesis",
    "Score",
    "Translator",
    "beam_search",
    "fairseq_penalty",
    "gnmt_penalty",
    "greedy",
    "perplexity",
    "sample",
    "score_file",
    "translate_file",
    "translate_stream",
]
