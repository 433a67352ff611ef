from __future__ import annotations

import numpy as np
import pytest
from stand_ins import Given, StandIn, opener, read

from t5x_ext.contracts import UserError
from t5x_ext.pipeline import Pipeline, Select, execute
from t5x_ext.pipeline.selection import lowest, moore_lewis

ROWS = tuple((f"line {number}", f"Zeile {number}") for number in range(10))
TEXTS = Given("texts", texts=(("a", ("en", "de"), ROWS), ("m", ("de",), tuple((row[1],) for row in ROWS[::-1]))))
MODELS = tuple(Given(name, directions=("de-de",)) for name in ("general", "news", "social"))


def number(line: str) -> int:
    return int(line.rsplit(" ", 1)[1])


# Of the news domain are lines with small numbers, of the social one those divisible by four; the general model finds
# odd ones improbable, which alone must not matter for what is of a domain.
GENERAL = StandIn(log_prob=lambda line: -5.0 - 3 * (number(line) % 2))
NEWS = StandIn(log_prob=lambda line: GENERAL.log_prob(line) - number(line))
SOCIAL = StandIn(log_prob=lambda line: GENERAL.log_prob(line) - (number(line) % 4 != 0))


def select(tmp_path, **options):
    stage = Select("chosen", ("texts",), general="general", language="de", **options)
    models = opener(general=GENERAL, news=NEWS, social=SOCIAL)
    return execute(Pipeline((TEXTS, *MODELS, stage)), tmp_path, opener=models)["chosen"]


def test_the_lines_nearest_to_a_domain_stay_in_their_order(tmp_path):
    made = select(tmp_path, in_domain=("news",), share=0.3)
    assert read(tmp_path, "chosen/a.en") == ["line 0", "line 1", "line 2"]
    assert read(tmp_path, "chosen/a.de") == ["Zeile 0", "Zeile 1", "Zeile 2"]
    assert read(tmp_path, "chosen/m.de") == ["Zeile 2", "Zeile 1", "Zeile 0"]
    assert made.counts == {"read": 20, "kept": 6}
    assert [(text.name, text.lines) for text in made.corpora] == [("a", 3), ("m", 3)]


def test_of_several_domains_the_union_is_kept(tmp_path):
    select(tmp_path, in_domain=("news", "social"), share=0.3)
    assert read(tmp_path, "chosen/a.en") == [f"line {number}" for number in (0, 1, 2, 4, 8)]


def test_all_is_all_and_there_is_always_one(tmp_path):
    select(tmp_path / "all", in_domain=("news",), share=1.0)
    assert read(tmp_path / "all", "chosen/a.en") == [row[0] for row in ROWS]
    select(tmp_path / "one", in_domain=("news",), share=0.01)
    assert read(tmp_path / "one", "chosen/a.en") == ["line 0"]


def test_the_difference_of_cross_entropies():
    rng = np.random.default_rng(0)
    in_domain, general = -rng.random(50), -rng.random(50)
    np.testing.assert_array_equal(moore_lewis(in_domain, general), (-in_domain) - (-general))
    # A constant that both models share, as a rare word does, changes no order.
    chosen = lowest(moore_lewis(in_domain, general), 0.2)
    assert chosen.sum() == 10
    np.testing.assert_array_equal(lowest(moore_lewis(in_domain - 2, general - 2), 0.2), chosen)
    assert moore_lewis(in_domain, general)[chosen].max() < moore_lewis(in_domain, general)[~chosen].min()


def test_mistakes(tmp_path):
    for fields, message in (({"share": 0.0}, "share=0.0: must be above 0"), ({"in_domain": ()}, "no language model")):
        with pytest.raises(UserError, match=message):
            Select(**{"name": "s", "texts": ("t",), "in_domain": ("n",), "general": "g", "language": "de", **fields})
    english = Given("texts", texts=(("a", ("en",), (("x",),)),))
    stages = (english, *MODELS, Select("chosen", ("texts",), ("news",), "general", "de"))
    with pytest.raises(UserError, match="'a' has no side in de"):
        execute(Pipeline(stages), tmp_path, opener=opener())
