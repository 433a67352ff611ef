"""What a study says, what it refuses, and the commands of its runs."""

from __future__ import annotations

import pytest

from t5x_ext.contracts import UserError
from t5x_ext.study import Arm, Budget, Study, Tuning, select
from t5x_ext.study.jobs import reported_jobs, tuning_jobs

A, B = Arm("a"), Arm("b")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Study("s", (), (0,)), "Study.arms: there is no arm"),
        (lambda: Study("s", (A, B, A), (0,)), "Study.arms: 2 arms are called 'a'"),
        (lambda: Study("s", (A,), ()), "Study.seeds: there is no seed"),
        (lambda: Study("s", (A,), (1, 1)), "Study.seeds=[1, 1]: seeds are different numbers"),
        (lambda: Study("s", (A,), (-1,)), "Study.seeds=[-1]: seeds are different numbers"),
        (lambda: Study("s", (A,), (0,), measurements=()), "Study.measurements: nothing is measured"),
        (lambda: Study("s", (A,), (0,), baseline="x"), "Study.baseline='x': there are a"),
        (lambda: Study("s", (Arm("a", baseline="x"),), (0,)), "Arm 'a': baseline='x': there are a"),
        (lambda: Arm("A b"), "Arm.name='A b': write lower case"),
        (lambda: Arm("a", run="../b"), "write lower case"),
        (lambda: Arm("a", bindings={"x": object}), "Arm 'a': bindings['x'] is <class 'object'>; write a number"),
        (lambda: Arm("a", tuned={"x": []}), "tuned['x'] has no value"),
        (lambda: Arm("a", tuned={"x": [1]}, tuned_as="b"), "give either tuned or tuned_as"),
        (lambda: Study("s", (Arm("a", tuned={"x": [1]}),), (0,)), "Arm 'a' is tuned, but Study.tuning"),
        (lambda: Study("s", (Arm("a", tuned_as="b"), B), (0,)), "tuned_as='b', which has nothing to choose from"),
        (
            lambda: Study("s", (Arm("a", tuned={"x": [1]}),), (0, 1000), tuning=Tuning()),
            "Tuning.seeds: 1000 is a seed of the reported runs",
        ),
        (lambda: Tuning(seeds=()), "Tuning.seeds: there is no seed"),
        (lambda: Budget(), "not none of them"),
        (lambda: Budget(steps=1, seconds=2.0), "not steps, seconds"),
        (lambda: Budget(target_tokens=0), "Budget.target_tokens is 0"),
        (
            lambda: Study("s", (Arm("a", run="r"), Arm("b", run="r", bindings={"x": 1})), (0,)),
            "'a' and 'b' share the run 'r' but differ",
        ),
        (
            lambda: Study("s", (Arm("a", command="pipeline"),), (0,), budget=Budget(steps=1)),
            "Arm 'a' is a pipeline",
        ),
    ],
)
def test_mistakes_say_what_and_where(build, message):
    with pytest.raises(UserError) as error:
        build()
    assert message in str(error.value)


def commands(study, folder="out", chosen=None, **selected):
    jobs = reported_jobs(study, folder, select(study, **selected), chosen or {})
    return {job.path: job.command for job in jobs}


def test_bindings_of_an_arm_are_over_those_of_the_study_and_become_flags():
    arm = Arm("a", gin_files=("arm.gin",), bindings={"x.rate": 0.5, "x.name": "@f()", "x.axes": ["p", None]})
    study = Study(
        "s", (arm,), (3,), gin_files=("base.gin",), bindings={"x.rate": 1, "x.on": True}, budget=Budget(steps=7)
    )
    assert commands(study) == {
        "arms/a/seed_3": "t5x_ext train --gin_file=base.gin --gin_file=arm.gin --gin.x.rate=0.5 --gin.x.on=True "
        "'--gin.x.name=@f()' '--gin.x.axes=['\"'\"'p'\"'\"', None]' --seed=3 --steps=7 --run_dir=out/arms/a/seed_3 "
        "--cache_dir=out/cache"
    }


def test_other_budgets_are_bound_in_the_run():
    (command,) = commands(Study("s", (A,), (0,), budget=Budget(model_flops=1e12))).values()
    assert (
        "'--gin.Run.budget=@t5x_ext.train.Budget()' --gin.t5x_ext.train.Budget.model_flops=1000000000000.0" in command
    )
    assert "--steps" not in command


def test_a_pipeline_takes_its_seed_as_a_binding():
    study = Study("s", (Arm("a", command="pipeline", gin_files=("p.gin",)),), (4,))
    (command,) = commands(study).values()
    assert command == "t5x_ext pipeline --gin_file=p.gin --gin.Run.seed=4 --output_dir=out/arms/a/seed_4"


def test_runs_are_in_the_order_of_seeds_and_those_that_are_shared_are_made_once():
    study = Study("s", (A, Arm("b", run="r"), Arm("c", run="r")), (0, 1))
    assert list(commands(study)) == [f"arms/{run}/seed_{seed}" for seed in (0, 1) for run in ("a", "r")]
    assert list(commands(study, arms=["c"], seeds=[1])) == ["arms/r/seed_1"]


def test_tuning_tries_all_combinations_and_runs_take_what_was_chosen():
    tuned = Arm("a", bindings={"y": 0}, tuned={"x": [1, 2], "y": [3, 4]})
    study = Study("s", (tuned, Arm("b", tuned_as="a"), Arm("c")), (0,), tuning=Tuning(budget=Budget(steps=5)))
    tried = [(arm.name, dict(choice), job.path) for arm, choice, job in tuning_jobs(study, "out", select(study))]
    assert tried == [
        ("a", {"x": x, "y": y}, f"tuning/a/choice_{number}/seed_1000")
        for number, (x, y) in enumerate([(1, 3), (1, 4), (2, 3), (2, 4)])
    ]
    assert not list(tuning_jobs(study, "out", select(study, arms=["c"])))
    made = commands(study, chosen={"a": {"x": 2, "y": 3}})
    assert "--gin.y=3 --gin.x=2" in made["arms/a/seed_0"]
    assert "--gin.x=2 --gin.y=3" in made["arms/b/seed_0"]
    assert list(commands(study, chosen={"a": None})) == ["arms/c/seed_0"]
