"""What studies keep comes back or is refused by its name; tables show what was found; commands are read back."""

from __future__ import annotations

import ast
import json
import math
import re
import shlex
import tempfile
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from study_stand_ins import Share

from t5x_ext.contracts import UserError
from t5x_ext.study import Arm, Budget, MeasuredRun, Recorded, Results, Study, select
from t5x_ext.study.figures import styles
from t5x_ext.study.jobs import reported_jobs
from t5x_ext.study.records import Measured, Record, read_measured, read_record, write_measured, write_record
from t5x_ext.study.report import without_folders
from t5x_ext.study.statistics import Moments, Paired, moments, paired
from t5x_ext.study.table import Cell, RunResult, markdown, show, tables, to_json

FLOATS = st.floats(allow_nan=True, allow_infinity=True)
NAMES = st.sampled_from(["loss", "valid/loss", "least valid/loss", "bleu/en-de"])


# Records


@settings(max_examples=10)
@given(st.dictionaries(st.sampled_from(["a", "b_1"]), st.dictionaries(NAMES, FLOATS)), st.text(max_size=9))
def test_measured_values_come_back_and_what_is_not_finite_as_no_number(values, error):
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        lines = {name: np.arange(6.0).reshape(3, 2) + len(name) for own in values.values() for name in own}
        found = {arm: Measured(own, {name: lines[name] for name in own}) for arm, own in values.items()}
        write_measured(folder, "run", "key", found, error)
        kept = read_measured(folder, "run", "key")
        assert kept.error == error
        assert kept.by_arm.keys() == values.keys()
        for arm, own in values.items():
            expected = {name: value if math.isfinite(value) else math.nan for name, value in own.items()}
            assert kept.by_arm[arm].values == pytest.approx(expected, rel=0, nan_ok=True)
            assert kept.by_arm[arm].lines.keys() == own.keys()
            for name, sums in kept.by_arm[arm].lines.items():
                np.testing.assert_array_equal(sums, lines[name])
        assert read_measured(folder, "run", "another key") is None
        assert read_measured(folder, "never", "key") is None


def test_lines_of_an_earlier_measurement_are_not_those_of_a_later_one(tmp_path):
    write_measured(tmp_path, "run", "old", {"a": Measured({"bleu": 1.0}, {"bleu": np.ones((2, 2))})})
    write_measured(tmp_path, "run", "new", {"a": Measured({"bleu": 2.0}, {})})
    assert read_measured(tmp_path, "run", "new").by_arm == {"a": Measured({"bleu": 2.0}, {})}


def test_the_state_of_a_run_comes_back(tmp_path):
    record = Record("failed", "line 3: ü", 12.5, "t5x_ext train 'a b'", "text\nof two lines")
    assert read_record(tmp_path, "run") is None
    write_record(tmp_path, "run", record)
    assert read_record(tmp_path, "run") == record


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"format": 0}',
        '{"format": 1}',
        '{"format": 1, "run": {"state": "x"}}',
        '{"format": 1, "run": 3}',
    ],
)
def test_a_damaged_state_is_named(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"run\.json: not a record of ours.*Delete it to have it made again"):
        read_record(tmp_path, "run")


@pytest.mark.parametrize("values", ["3", "null", '{"a": 3}', '{"a": {"loss": "much"}}', '{"a": {"loss": []}}'])
def test_damaged_values_are_named(tmp_path, values):
    (tmp_path / "run.measured.json").write_text(f'{{"format": 1, "measurements": "key", "values": {values}}}')
    with pytest.raises(UserError, match=r"run\.measured\.json: not a record of ours"):
        read_measured(tmp_path, "run", "key")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"text", np.lib.format.MAGIC_PREFIX])
def test_damaged_lines_are_named(tmp_path, content):
    write_measured(tmp_path, "run", "key", {"a": Measured({"bleu": 1.0}, {"bleu": np.ones((2, 2))})})
    (tmp_path / "run.lines.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"run\.lines\.npz: not a record of ours"):
        read_measured(tmp_path, "run", "key")


@settings(max_examples=20)
@given(st.recursive(FLOATS | st.booleans() | st.text(max_size=3), lambda inner: st.dictionaries(st.text("ab"), inner)))
def test_what_is_called_recorded_can_be_asked_for(results):
    """Of any `results.json`, the names in the message are exactly those that give a number."""
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        results = results if isinstance(results, dict) else {"x": results}
        (folder / "metrics.jsonl").write_text("")
        (folder / "results.json").write_text(json.dumps(results))
        run = MeasuredRun(folder, None, 0, None, "")
        with pytest.raises(UserError) as error:
            Recorded("absent")(run)
        named = str(error.value).removeprefix("absent was not recorded; recorded are ")
        for name in [] if named == "no values" else named.split(", "):
            assert isinstance(Recorded(name)(run)[name], float)


# Tables


@given(st.floats(-1e6, 1e6), st.one_of(st.none(), st.floats(1e-7, 1e5)))
def test_a_cell_shows_its_mean_to_the_places_of_two_digits_of_the_error(mean, error):
    text = show(Cell(Moments(mean, error, 1 if error is None else 3)))
    parts = text.replace(",", "").split(" ± ")
    places = {len(part.partition(".")[2]) for part in parts}
    assert len(places) == 1
    unit = Decimal(10) ** -places.pop()
    assert abs(Decimal(parts[0]) - Decimal(mean)) <= unit / 2
    assert not re.match(r"-[0.]*$", parts[0]), "no negative zero"
    if error is not None:
        assert abs(Decimal(parts[1]) - Decimal(error)) <= unit / 2
        digits = parts[1].replace(".", "").lstrip("0")
        assert len(digits) >= 2 if unit < 1 else len(digits) >= 1


@given(st.floats(-50, 50), st.floats(0.001, 10), st.floats(0, 1))
def test_differences_have_a_sign_and_very_small_p_values_a_bound(difference, error, p_value):
    text = show(Cell(Moments(20.0, error, 3), "a", Paired(difference, error, 3, p_value, 0.25)))
    found = re.fullmatch(r"20[\d.]* ± ([\d.]+) \(([+-][\d.]+) ± ([\d.]+), p (<|=) (\S+)\)", text)
    assert found, text
    assert found[1] == found[3]
    assert abs(float(found[2]) - difference) <= 0.5001 * 10.0 ** -len(found[2].partition(".")[2])
    assert not re.fullmatch(r"-[0.]+", found[2])
    assert found[4] == ("<" if p_value < 0.001 else "=")
    if found[4] == "=":
        assert float(found[5]) == pytest.approx(p_value, rel=0.051)


def results_of(values, **fields):
    """Of arms by name, each with its values by seed."""
    seeds = tuple(sorted({seed for own in values.values() for seed in own})) or (0,)
    study = Study("s", tuple(map(Arm, values)), seeds, baseline="a", **fields)
    runs = {
        arm: {
            seed: RunResult(
                f"{arm}/{seed}", "finished" if seed in own else "failed", values={"x": own[seed]} if seed in own else {}
            )
            for seed in seeds
        }
        for arm, own in values.items()
    }
    return Results(study, runs)


SEEDED = st.dictionaries(st.integers(0, 4), st.floats(-5, 5), max_size=5)


@settings(max_examples=15)
@given(SEEDED, SEEDED)
def test_arms_are_compared_over_the_seeds_that_both_have(ours, theirs):
    results = results_of({"a": theirs, "b": ours})
    cell = results.cell(results.study.arm("b"), "x")
    both = sorted(ours.keys() & theirs.keys())
    if not ours:
        assert cell == Cell(None)
        return
    assert cell.moments == pytest.approx(moments([ours[seed] for seed in sorted(ours)]))
    assert (cell.difference is None) == (not both)
    if both:
        expected = paired([ours[seed] for seed in both], [theirs[seed] for seed in both])
        assert cell.difference == pytest.approx(expected)
        assert cell.against == "a"
    missing = [(arm.name, seed) for arm, seed, _ in results.errors()]
    absent = [
        (name, seed) for name, own in (("a", theirs), ("b", ours)) for seed in results.study.seeds if seed not in own
    ]
    assert missing == absent
    assert tables(results)[0].rows[1][2] == (
        str(len(ours)) if len(ours) == len(results.study.seeds) else f"{len(ours)} of {len(results.study.seeds)}"
    )


def test_a_direction_that_one_seed_lacks_is_not_resampled():
    right = lambda *lines: np.stack([np.array(lines, float), np.ones(len(lines))], axis=-1)
    names = {0: ("share/p", "share/q"), 1: ("share/p",)}
    study = Study("s", (Arm("a"), Arm("b")), (0, 1), measurements=(Share(),), baseline="a")
    runs = {
        arm: {
            seed: RunResult("r", "finished", values={"share": 0.5}, lines=dict.fromkeys(names[seed], right(*own)))
            for seed in names
        }
        for arm, own in {"a": (0, 1, 0, 1), "b": (1, 1, 0, 1)}.items()
    }
    cell = Results(study, runs).cell(study.arm("b"), "share")
    assert cell.resampled.difference == pytest.approx(0.25)
    assert cell.difference.size == 2


@pytest.mark.filterwarnings("ignore:invalid value")
@settings(max_examples=10)
@given(SEEDED, st.sampled_from([math.nan, math.inf, 1.0]))
def test_json_of_results_has_no_number_that_json_does_not_know(own, odd):
    results = results_of({"a": own | {0: odd}, "b": own})
    found = json.loads(json.dumps(to_json(results), allow_nan=False))
    assert [arm["name"] for arm in found["arms"]] == ["a", "b"]
    kept = found["arms"][0]["runs"]["0"]["values"]["x"]
    assert kept == (odd if math.isfinite(odd) else None)


@given(st.lists(st.text("xy|* ", min_size=1).map(str.strip).filter(bool), min_size=1, max_size=4, unique=True))
def test_titles_with_bars_stay_one_cell_of_markdown(titles):
    arms = tuple(Arm(f"a{number}", label=title) for number, title in enumerate(titles))
    study = Study("s", arms, (0,))
    results = Results(study, {arm.name: {0: RunResult("p", "finished", values={"valid/loss": 1.0})} for arm in arms})
    rows = [line for line in markdown(tables(results)).splitlines() if line.startswith("|")]
    cells = [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
    assert cells[0] == ["arm", "seeds", "valid/loss"]
    assert [row[0] for row in cells[2:]] == titles
    assert {len(row) for row in cells} == {3}


# Pictures, paths and commands


@given(st.lists(st.integers(0, 11), min_size=1, max_size=24))
def test_arms_look_different_and_families_have_one_colour(families):
    arms = tuple(Arm(f"arm{number}", family=f"family{family}") for number, family in enumerate(families))
    found = styles(Study("s", arms, (0,)))
    colours = {
        family: {found[arm.name].colour for arm in arms if arm.family == f"family{family}"} for family in families
    }
    assert all(len(members) == 1 for members in colours.values())
    by_colour = {}
    for style in found.values():
        by_colour.setdefault(style.colour, []).append(style)
    assert all(len(set(members)) == min(8, len(members)) for members in by_colour.values()), "eight looks a colour"


@given(
    st.lists(st.sampled_from(["home", "out", "a.gin", "data-1"]), min_size=2, max_size=4),
    st.sampled_from([" ", "=", "'", ","]),
)
def test_no_folder_of_a_machine_is_left_in_a_report_and_the_rest_is(parts, before):
    path = "/" + "/".join(parts)
    text = without_folders(f"--flag{before}{path} rel/ative 1/2 gs://bucket/x", Path("/home/out"))
    assert not re.search(r"(?<![\w.:/])/\w+/", text.replace("OUT/", ""))
    assert text.endswith(" rel/ative 1/2 gs://bucket/x")
    assert parts[-1] in text or text.startswith(f"--flag{before}OUT")


PLAIN = st.recursive(
    st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3),
)


@given(
    st.dictionaries(st.sampled_from(["Run.x", "optim.adam.rate", "N"]), PLAIN), st.integers(0, 99), st.integers(1, 99)
)
def test_a_command_that_is_typed_is_the_arguments_and_its_values_are_read_back(bindings, seed, steps):
    study = Study("s", (Arm("a", bindings=bindings),), (seed,), budget=Budget(steps=steps))
    (job,) = reported_jobs(study, "/out dir", select(study), {})
    assert tuple(shlex.split(job.command)) == ("t5x_ext", *job.arguments)
    given_values = [flag.removeprefix("--gin.").partition("=") for flag in job.arguments if flag.startswith("--gin.")]
    assert {name: ast.literal_eval(value) for name, _, value in given_values} == bindings
    assert {f"--seed={seed}", f"--steps={steps}", f"--run_dir=/out dir/arms/a/seed_{seed}"} <= set(job.arguments)


@given(st.sets(st.sampled_from("abcz")), st.sets(st.integers(0, 3)))
def test_selected_are_those_named_in_the_order_of_the_study(arms, seeds):
    study = Study("s", (Arm("c"), Arm("a"), Arm("b")), (2, 0, 1))
    if "z" in arms or 3 in seeds:
        with pytest.raises(UserError, match=r"there is no arm 'z'; there are c, a, b|has no seed 3; it has 2, 0, 1"):
            select(study, arms, seeds)
    else:
        chosen = select(study, arms, seeds)
        assert chosen.arms == tuple(name for name in "cab" if name in (arms or "cab"))
        assert chosen.seeds == tuple(seed for seed in (2, 0, 1) if seed in (seeds or {0, 1, 2}))
