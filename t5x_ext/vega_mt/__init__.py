"""Floor 7: what is Vega-MT's own (arXiv 2209.09444), and nothing that another system would use.

That is its augmentation by translation (`Synthesize`, `CycleTranslate`), its noisy development text (`NoisyDev`) and
its released postprocessing of Chinese (`widen_as_released`). The whole system, from raw text to scores, is a
`pipeline.Pipeline` of these stages and general ones: gin/pipelines/vega_mt.gin, described in docs/methods/vega_mt.md.
"""

from __future__ import annotations

from t5x_ext.vega_mt.augmentation import CycleTranslate, Synthesize
from t5x_ext.vega_mt.noising import NoisyDev
from t5x_ext.vega_mt.released import widen_as_released

__all__ = ["CycleTranslate", "NoisyDev", "Synthesize", "widen_as_released"]
