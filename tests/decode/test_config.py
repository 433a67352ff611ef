"""Options of decoding: checks, retired names, and JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import pytest

from t5x_ext.contracts import UserError
from t5x_ext.decode import Beam, DecodeConfig, ForbidTokens, Greedy, MinimumLength, NoRepeatNgrams, Sample
from t5x_ext.decode.config import RETIRED


@dataclass(frozen=True)
class Outside:
    """A search of another package."""

    passes: int = 4
    partner: object = Greedy()
    n_best = 1
    rows_per_source = 1

    def __call__(self, model, params, inputs):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search": "beam"}, r"search = 'beam': must be a Search, as Beam\(\), Greedy\(\) or Sample\(\)"),
        ({"search": Beam}, r"search is the class Beam; write Beam\(\)"),
        ({"search": Outside(partner=[])}, "cannot be hashed; make it a frozen dataclass of plain values"),
        ({"max_source_length": 1}, "max_source_length"),
        ({"max_length_ratio": -1.0}, "max_length_ratio"),
        ({"max_length_extra": float("nan")}, "max_length_extra"),
        ({"batch_tokens": 0}, "batch_tokens"),
    ],
)
def test_options_are_checked_when_they_are_made(options, message):
    with pytest.raises(UserError, match=message) as error:
        DecodeConfig(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", RETIRED)
def test_retired_options_say_their_new_name(name):
    field = name.removeprefix("DecodeConfig.")
    assert field not in {one.name for one in dataclasses.fields(DecodeConfig)}
    with pytest.raises(UserError) as error:
        DecodeConfig(**{field: 1})
    assert str(error.value) == f"{name} is retired; use {RETIRED[name]}"


def test_other_unknown_options_are_mistakes_of_the_program():
    with pytest.raises(TypeError, match="beem_size"):
        DecodeConfig(beem_size=3)


@pytest.mark.parametrize(
    "config",
    [
        DecodeConfig(),
        DecodeConfig(Beam(beam_size=3, n_best=2, length_penalty="gnmt", alpha=0.6), max_length_ratio=1.5),
        DecodeConfig(Greedy(), (MinimumLength(2), ForbidTokens((3, 4)), NoRepeatNgrams(3)), batch_tokens=64),
        DecodeConfig(Sample(n_best=3, temperature=0.5, top_k=9, top_p=0.9, seed=4), max_length_extra=1),
    ],
)
def test_json_gives_the_options_back(config):
    record = json.loads(json.dumps(config.to_json()))
    assert record == config.to_json()
    assert DecodeConfig.from_json(record) == config


@pytest.mark.parametrize(
    ("changes", "search"),
    [
        ({"beam_size": 4, "n_best": 2, "alpha": 0.6}, Beam(beam_size=4, n_best=2, alpha=0.6)),
        ({"strategy": "greedy", "length_penalty": "gnmt"}, Greedy("gnmt")),
        ({"strategy": "sample", "n_best": 9, "top_k": 10, "seed": 3}, Sample(n_best=9, top_k=10, seed=3)),
    ],
)
def test_flat_records_of_earlier_versions_are_read(changes, search):
    flat = {
        "strategy": "beam",
        "beam_size": 5,
        "n_best": 1,
        "length_penalty": "fairseq",
        "alpha": 1.0,
        "max_length_ratio": 1.5,
        "max_length_extra": 10,
        "max_source_length": 64,
        "batch_tokens": None,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "seed": 0,
    }
    expected = DecodeConfig(search, max_length_ratio=1.5, max_length_extra=10, max_source_length=64)
    assert DecodeConfig.from_json(flat | changes) == expected


def test_a_search_from_outside_is_described_but_not_read_back():
    record = json.loads(json.dumps(DecodeConfig(Outside(passes=2), (print,)).to_json()))
    kind = f"{Outside.__module__}.Outside"
    assert record["search"] == {"kind": kind, "passes": 2, "partner": repr(Greedy())}
    assert record["constraints"] == [{"kind": "builtins.print", "text": "<built-in function print>"}]
    with pytest.raises(UserError, match=f"{kind} is not of t5x_ext, so that its record cannot be read back"):
        DecodeConfig.from_json(record | {"constraints": []})


def test_records_of_later_versions_are_refused():
    record = DecodeConfig().to_json()
    with pytest.raises(UserError, match="a record of DecodeConfig has fields that are not known here: patience"):
        DecodeConfig.from_json(record | {"patience": 1})
    with pytest.raises(UserError, match="a record of Beam has fields that are not known here: width"):
        DecodeConfig.from_json(record | {"search": record["search"] | {"width": 1}})
