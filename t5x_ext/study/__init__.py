"""Floor 7: experiments: arms with seeds under a budget, trained in processes, measured, compared and reported.

A `Study` says what is compared, `execute` runs what has not run yet and writes tables, pictures and one HTML page.
"""

from __future__ import annotations

from t5x_ext.study.execute import Configured, Ended, Options, check, execute, measure, status
from t5x_ext.study.jobs import Job, Selection, select
from t5x_ext.study.measurements import LineMeasurement, MeasuredRun, Measurement, Recorded
from t5x_ext.study.sharpness import Sharpness
from t5x_ext.study.study import Arm, Budget, Study, Tuning
from t5x_ext.study.table import Results
from t5x_ext.study.translations import DecodingSpeed, ExactMatch, TranslationBleu

__all__ = [
    "Arm",
    "Budget",
    "Configured",
    "DecodingSpeed",
    "Ended",
    "ExactMatch",
    "Job",
    "LineMeasurement",
    "MeasuredRun",
    "Measurement",
    "Options",
    "Recorded",
    "Results",
    "Selection",
    "Sharpness",
    "Study",
    "TranslationBleu",
    "Tuning",
    "check",
    "execute",
    "measure",
    "select",
    "status",
]
