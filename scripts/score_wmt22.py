#!/usr/bin/env python3
"""Scores the systems of WMT22's general test and holds Vega-MT's ten claimed BLEU scores against what they measure.

  scripts/score_wmt22.py --data_dir=wmt22 --json_out=wmt22.json --against=Online-B

The folder is laid out as the `txt` folder of wmt-conference/wmt22-news-systems (its `automatic-scores.tsv` in it, if
the official table is to be compared, and its `xml` folder, if scores by domain are wanted). Vega-MT's system is called
JDExploreAcademy. Japanese is scored by characters, as WMT22 did. The rest is `score_wmt.py`.
"""

from __future__ import annotations

import sys

from score_wmt import Defaults, run

from t5x_ext.evaluate import Layout

WMT22 = Defaults(
    layout=Layout(),
    tokenizers=("ja=char",),
    system="JDExploreAcademy",
    # The scores that the system paper (arXiv 2209.09444) gives, with the reference each was taken on.
    claims=(
        "zh-en.A=33.51",
        "en-zh.A=49.67",
        "de-en.A=33.70",
        "en-de.A=37.79",
        "cs-en.B=54.94",
        "en-cs.B=41.43",
        "ru-en.A=45.06",
        "en-ru.A=32.71",
        "ja-en.A=25.61",
        "en-ja.A=41.50",
    ),
    official="automatic-scores.tsv",
)

if __name__ == "__main__":
    sys.exit(run("score_wmt22.py", __doc__, WMT22, sys.argv[1:]))
