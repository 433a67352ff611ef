"""Floor 7: what is Vega-MT's own (arXiv 2209.09444): augmentation by translation, noisy development text.

Its system, from raw text to scores, is a `pipeline.Pipeline` of these stages and general ones; gin/pipelines has it.
"""

from __future__ import annotations

from t5x_ext.vega_mt.augmentation import CycleTranslate, Synthesize
from t5x_ext.vega_mt.noising import NoisyDev

__all__ = ["CycleTranslate", "NoisyDev", "Synthesize"]
