from __future__ import annotations

import subprocess
import sys
import time

import pytest
from absl import flags as absl_flags

from t5x_ext.cli import main as cli_main
from t5x_ext.cli.flags import parse
from t5x_ext.cli.main import VERBS, main
from t5x_ext.cli.messages import UsageError


def define(values):
    absl_flags.DEFINE_integer("steps", 7, "number of updates", lower_bound=1, flag_values=values)
    absl_flags.DEFINE_float("alpha", 1.0, "length penalty", flag_values=values)
    absl_flags.DEFINE_enum("strategy", "beam", ["beam", "greedy"], "search", flag_values=values)
    absl_flags.DEFINE_boolean("bidirectional", False, "both directions", flag_values=values)
    absl_flags.DEFINE_multi_string("gin", [], "a binding", flag_values=values)
    absl_flags.DEFINE_multi_string("gin_file", [], "a file", flag_values=values)


MISTAKES = {
    "--stesp=3": "unknown flag --stesp; did you mean --steps?",
    "--nobidirectionl": "unknown flag --nobidirectionl; did you mean --bidirectional?",
    "--steps=abc": "--steps=abc: expected a positive integer",
    "--steps=0": "--steps=0: expected a positive integer",
    "--alpha=long": "--alpha=long: expected a number",
    "--strategy=bema": "--strategy=bema: value should be one of <beam|greedy>",
    "--bidirectional=perhaps": "--bidirectional=perhaps: expected true or false",
    "--steps": "Missing value for flag --steps",
    "steps=3": "unexpected argument 'steps=3'; flags are written --name=value",
}


@pytest.mark.parametrize("argument", MISTAKES)
def test_mistakes_in_flags(argument):
    with pytest.raises(UsageError) as caught:
        parse(define, [argument])
    assert str(caught.value) == MISTAKES[argument]


def test_flags_and_gin_bindings():
    arguments = ["--steps=3", "--gin.A.b=c=d", "--gin.train/X.y=@z()", "--gin_file=a.gin", "--gin_file", "b.gin"]
    values = parse(define, [*arguments, "--bidirectional"])
    assert values.gin == ["A.b=c=d", "train/X.y=@z()"]
    assert (values.steps, values.gin_file, values.bidirectional) == (3, ["a.gin", "b.gin"], True)
    assert parse(define, []).gin == []


def test_overview_and_unknown_verbs(capsys):
    assert main([]) == main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {verb} " in out for verb in VERBS)
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "t5x_ext: no command 'trian'; did you mean train?\n"


def test_other_exceptions_pass_and_interrupts_are_130(monkeypatch, capsys):
    def raises(error):
        def run_verb(verb, arguments):
            raise error

        monkeypatch.setattr(cli_main, "_run_verb", run_verb)

    raises(KeyboardInterrupt())
    assert main(["train"]) == 130
    raises(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main(["train"])
    from t5x_ext.contracts import UserError

    capsys.readouterr()
    raises(UserError("two\n  lines"))
    assert main(["train"]) == 2
    assert capsys.readouterr().err == "t5x_ext train: two lines\n"


def test_help_is_fast_and_loads_no_jax():
    script = "import sys; from t5x_ext.cli.main import main; main(sys.argv[1:]); assert 'jax' not in sys.modules"
    for arguments in ([], ["train", "--help"]):
        subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "t5x_ext", "--help"], check=True, capture_output=True)
    assert time.perf_counter() - start < 2  # 0.05 s on an idle machine; this one may be busy
