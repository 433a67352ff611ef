from __future__ import annotations

import dataclasses
from functools import partial

import pytest

import gin
from t5x_ext.cli.gin_config import build_run
from t5x_ext.cli.gin_read import Source, gin_root
from t5x_ext.contracts import UserError

RUN = """
# A run of the toy tree.
from __gin__ import dynamic_registration
import toy_plugin
import toy_plugin as other

STEPS = 50
LABEL = 'macro ' 'joined'

toy_plugin.Run.model = @toy_plugin.Small()
toy_plugin.Run.steps = %STEPS
toy_plugin.Run.name = %LABEL
toy_plugin.Run.optimizer = @other.adam()
other.adam:
    learning_rate = @toy_plugin.decay()
    momentum = 0.5
toy_plugin.decay.peak = 2
toy_plugin.Run.data = @toy_plugin.Data()
toy_plugin.Data.train = (@first/toy_plugin.Text(), @second/toy_plugin.Text())
toy_plugin.Data.weights = {'a': 1, 'b': 0.5}
toy_plugin.Text.language = 'en'
first/toy_plugin.Text.path = 'a.en'
second/toy_plugin.Text:
  path = 'b.en'
  language = 'de'
toy_plugin.Small.norm = 'post'
"""


@pytest.fixture
def run_gin(folder, toy):
    (folder / "run.gin").write_text(RUN)
    return "run.gin"


def build(toy, files, *bindings):
    return build_run(files, bindings, root=toy.Run)


def refusal(toy, files, *bindings):
    with pytest.raises(UserError) as caught:
        build(toy, files, *bindings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def gin_build(toy, text):
    """The same object built by gin itself."""
    gin.clear_config()
    try:
        gin.parse_config(text)
        return gin.get_configurable(toy.Run)()
    finally:
        gin.clear_config()


def test_builds_what_gin_builds(toy, run_gin):
    run, _ = build(toy, [run_gin])
    assert run == gin_build(toy, RUN)
    assert run.data.train == (toy.Text("a.en", "en"), toy.Text("b.en", "de"))
    assert (run.steps, run.name, run.optimizer) == (50, "macro joined", toy.Optimizer(0.2, 0.5))


def test_macros_open_a_scope_as_in_gin(toy, folder):
    text = RUN + "CHOSEN = @toy_plugin.Small()\nCHOSEN/toy_plugin.Small.width = 6\ntoy_plugin.Run.model = %CHOSEN\n"
    (folder / "scoped.gin").write_text(text)
    run, resolved = build(toy, ["scoped.gin"])
    assert run == gin_build(toy, text)
    assert run.model == toy.Small(6, "post")
    assert build(toy, (), Source(resolved, "resolved"))[0] == run


def test_resolved_text_builds_the_same_run_and_reads_by_gin(toy, run_gin):
    run, text = build(toy, [run_gin], "Run.notes=('x',)")
    again, text_again = build(toy, (), Source(text, "resolved"))
    assert again == run == gin_build(toy, text)
    assert text_again == text
    assert "toy_plugin.Small.dropout = 0.1" in text  # defaults are part of the record
    assert "# toy_plugin.Run.objective = <function loss" in text


def test_includes_are_found_beside_and_in_the_package(toy, run_gin, folder):
    (folder / "more.gin").write_text("include 'run.gin'\nimport toy_plugin\ntoy_plugin.Run.steps = 7\n")
    assert build(toy, ["more.gin"])[0].steps == 7
    assert (gin_root() / "runs").is_dir()


def test_later_files_and_bindings_override(toy, run_gin, folder):
    (folder / "late.gin").write_text("import toy_plugin as late\nlate.Run.steps = 1\nlate.Run.name = 'late'\n")
    run, _ = build(toy, [run_gin, "late.gin"], "Run.name=last", "toy_plugin.Run.bidirectional=True")
    assert (run.steps, run.name, run.bidirectional) == (1, "last", True)
    assert "nothing in this run uses %STEPS" in refusal(toy, [run_gin, "late.gin"], "STEPS=3")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("plain", "plain"),
        ("'quoted'", "quoted"),
        ("a/b.en", "a/b.en"),
        ("two words", "two words"),
        ("2024.de", "2024.de"),
    ],
)
def test_text_on_the_command_line_needs_no_quotes(toy, run_gin, text, value):
    assert build(toy, [run_gin], f"Run.name={text}")[0].name == value


def test_reference_without_call_keeps_its_bindings(toy, run_gin):
    run, text = build(toy, [run_gin], "Run.objective=@toy_plugin.loss", "Run.objective=@loss", "loss.smoothing=0.3")
    assert run.objective("m") == ("m", 0.3)
    assert isinstance(run.objective, partial)
    other, _ = build(toy, [run_gin])
    assert other.objective("m") == ("m", 0.1)
    assert build(toy, (), Source(text, "resolved"))[0].objective("m") == ("m", 0.3)


def test_a_typed_flag_reaches_all_who_share_the_macro(toy, run_gin, folder):
    (folder / "shared.gin").write_text(
        "include 'run.gin'\nimport toy_plugin\ntoy_plugin.decay.warmup_steps = %STEPS\n"
        "toy_plugin.Run.optimizer = @toy_plugin.adam()\n"
    )
    flag = Source("import toy_plugin\ntoy_plugin.Run.steps = 4", "--steps", is_flag=True, through_macros=True)
    run, _ = build(toy, ["shared.gin"], flag)
    assert (run.steps, run.optimizer.peak) == (4, 0.5)
    run, _ = build(toy, ["shared.gin"], "Run.steps=4")
    assert (run.steps, run.optimizer.peak) == (4, 0.04)


def test_a_flag_may_name_anything_importable_by_its_full_path(toy, run_gin):
    assert build(toy, [run_gin], "Run.objective=@operator.methodcaller")[0].objective("upper")("a") == "A"
    message = refusal(toy, [run_gin], "Run.objective=@operator.methodcalller")
    assert message.startswith("--gin.Run.objective: the run has no 'operator.methodcalller'")


def test_lists_become_tuples_where_tuples_are_wanted(toy, run_gin):
    assert build(toy, [run_gin], "Run.notes=['a', 'b']")[0].notes == ("a", "b")


def test_bindings_of_a_replaced_part_are_not_unused(toy, run_gin):
    run, text = build(toy, [run_gin], "Run.optimizer=@toy_plugin.sgd()", "sgd.learning_rate=3")
    assert run.optimizer == toy.Optimizer(3, 0.0)
    assert "adam" not in text
    assert "decay" not in text


def test_nothing_leaks_between_builds(toy, run_gin):
    build(toy, [run_gin], "Small.width=16")
    assert build(toy, [run_gin])[0].model.width == 4
    assert not gin.config._CONFIG
    assert not gin.config._OPERATIVE_CONFIG


FLAG_MISTAKES = {
    "Run.stesp=3": "--gin.Run.stesp: 'Run' has no parameter 'stesp'; did you mean steps?",
    "Rnu.steps=3": "--gin.Rnu.steps: the run has no 'Rnu'; did you mean Run?",
    "toy_plugin.Rnu.steps=3": "--gin.toy_plugin.Rnu.steps: 'toy_plugin.Rnu': toy_plugin has no 'Rnu'; did you mean "
    "Run?",
    "STESP=3": "--gin.STESP: the run has no value 'STESP'; did you mean STEPS?",
    "steps=3": "--gin.steps: the run has no value 'steps'; did you mean Run.steps?",
    "STEPS=abc": "--gin.STEPS: Run.steps is int, not 'abc'",
    "Run.steps=abc": "--gin.Run.steps: Run.steps is int, not 'abc'",
    "Run.steps=1.5": "--gin.Run.steps: Run.steps is int, not 1.5",
    "Run.steps=True": "--gin.Run.steps: Run.steps is int, not True",
    "Run.bidirectional=yes": "--gin.Run.bidirectional: Run.bidirectional is True or False, not 'yes'",
    "Run.notes=5": "--gin.Run.notes: Run.notes is tuple of str, not 5",
    "Run.model=@toy_plugin.Small": "--gin.Run.model: Run.model is Model, not Small; write @Small() to call it",
    "Run.model=@Smal()": "--gin.Run.model: the run has no 'Smal'; did you mean Small?",
    "Run.steps=%STESP": "--gin.Run.steps: %STESP has no value; did you mean STEPS?",
    "Run.steps=(1": "--gin.Run.steps: a bracket or a quote is not closed",
    "Run.steps=": "--gin.Run.steps needs a value: --gin.NAME=VALUE",
    "Small.norm=sandwich": "--gin.Small.norm: Small.norm is one of 'pre', 'post', not 'sandwich'",
    "Small.width=5": "--gin.Small.width: Small: width 5 is odd; it must be even",
    "toy_plugin.Model.width=16": "--gin.toy_plugin.Model.width: nothing in this run uses Model.width; "
    "did you mean Small.width?",
    "third/Text.path=c": "--gin.third/Text.path: nothing in this run uses third/Text.path",
    "frist/Text.path=c": "--gin.frist/Text.path: nothing in this run uses frist/Text.path; did you mean "
    "the scope first?",
    "decay.peak=@decay()": "--gin.decay.peak: decay refers to itself",
    "STEPS=%STEPS": "--gin.STEPS: %STEPS refers to itself",
}


@pytest.mark.parametrize("binding", FLAG_MISTAKES)
def test_mistakes_in_bindings(toy, run_gin, binding):
    assert refusal(toy, [run_gin], binding).startswith(FLAG_MISTAKES[binding])


FILE_MISTAKES = {
    "import toy_plugn": ":2: there is no module 'toy_plugn'",
    "import t5x_ext.trian": ":2: there is no module 't5x_ext.trian'; did you mean t5x_ext.train?",
    "from __gin__ import dynamic": ":2: '__gin__.dynamic' is not known; write: from __gin__ import "
    "dynamic_registration",
    "toy_plugni.Run.steps = 3": ":2: 'toy_plugni.Run': nothing named 'toy_plugni' is imported here; did you mean "
    "toy_plugin?",
    "toy_plugin.Run.steps 3": ":2: Couldn't parse statement, expected ':' or '=': toy_plugin.Run.steps 3",
    "toy_plugin.Run.name = plain": ":2: Failed to parse token 'plain': toy_plugin.Run.name = plain",
    "toy_plugin.Run.stesp = 3": ":2: 'toy_plugin.Run' has no parameter 'stesp'; did you mean steps?",
    "toy_plugin.Run:\n  stesp = 3": ":3: 'toy_plugin.Run' has no parameter 'stesp'; did you mean steps?",
    "toy_plugin.Run.steps = 'x'": ":2: Run.steps is int, not 'x'",
    "toy_plugin.Run.steps = (1,\n2": ":",
    "toy_plugin.sgd.learning_rate = 3": ":2: nothing in this run uses sgd.learning_rate",
    "UNUSED = 3": ":2: nothing in this run uses %UNUSED",
    "toy_plugin.Run.model = @toy_plugin.Tiny()": ":2: 'toy_plugin.Tiny': toy_plugin has no 'Tiny'",
    "toy_plugin.Run.data = @toy_plugin.Text()": ":2: Text.path has no value; it must be bound",
    "toy_plugin.Text = 3\ntoy_plugin.Run.steps = 2": ":2: ",
    "include 'rum.gin'": ":2: there is no gin file 'rum.gin'; did you mean run.gin?",
    "include 'bad.gin'": ":2: 'bad.gin' includes itself",
    "\tx = = 3": ":2: ",
}


@pytest.mark.parametrize("line", FILE_MISTAKES)
def test_mistakes_in_files(toy, run_gin, folder, line):
    (folder / "bad.gin").write_text("import toy_plugin\n" + line + "\n")
    assert refusal(toy, [run_gin, "bad.gin"]).startswith("bad.gin" + FILE_MISTAKES[line])


def test_missing_and_unreadable_files(toy, run_gin, folder):
    assert refusal(toy, ["rum.gin"]) == "there is no gin file 'rum.gin'; did you mean run.gin?"
    (folder / "latin.gin").write_bytes("# é\n".encode("latin-1"))
    assert "latin.gin is not UTF-8 text (at byte 2)" in refusal(toy, ["latin.gin"])
    assert refusal(toy, ["."]).startswith("there is no gin file '.'")


def test_a_required_value_is_named(toy, folder):
    (folder / "empty.gin").write_text("import toy_plugin\n")
    assert refusal(toy, ["empty.gin"]) == "Run.model has no value; it must be bound"


def test_value_errors_of_foreign_classes_are_mistakes_and_bugs_are_not(toy, run_gin, folder):
    (folder / "odd_plugin.py").write_text(
        "def refuses(rate=1):\n    raise ValueError(f'rate {rate} is too high')\n\ndef breaks():\n    return 1 / 0\n"
    )
    binding = Source(
        "import odd_plugin\nRun.optimizer = @odd_plugin.refuses()\nodd_plugin.refuses.rate = 9", "--x", True
    )
    import sys

    sys.path.append(str(folder))
    assert refusal(toy, [run_gin], binding) == "--x: refuses: rate 9 is too high"
    with pytest.raises(ZeroDivisionError):
        build(toy, [run_gin], Source("import odd_plugin\nRun.optimizer = @odd_plugin.breaks()", "--x", True))
    sys.path.remove(str(folder))


def test_fields_of_the_root_are_all_in_the_record(toy, run_gin):
    _, text = build(toy, [run_gin])
    for field in dataclasses.fields(toy.Run):
        assert f"toy_plugin.Run.{field.name} = " in text
