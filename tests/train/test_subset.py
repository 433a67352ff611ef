"""Trainable subsets and frozen parameters: what exists, what moves, what is stored, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import t5x_ext
from t5x_ext.checkpoints import CheckpointStore, RunFolder, run_params, trees
from t5x_ext.contracts import Context, UserError
from t5x_ext.objectives import LabelSmoothedCrossEntropy
from t5x_ext.train import CheckpointConfig, InitFrom
from t5x_ext.train.subset import leaf_names, merge_params, split_params

pytestmark = pytest.mark.usefixtures("compile_once")

NORMS = ("norm",)


def leaves(tree):
    return trees.flatten(tree)


def saved(run_dir, which="last"):
    """All arrays of a checkpoint by name."""
    with CheckpointStore(run_dir / "checkpoints") as store:
        step = store.step_of(which)
    meta = json.loads((run_dir / f"checkpoints/{step:08d}/meta/metadata").read_text())
    return {name: tuple(shape) for name, (shape, _) in meta["leaves"].items()}


@pytest.fixture(scope="module")
def pretrained(place, compile_once, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "pretrained"
    place.run(run_dir, steps=3, ema_decay=0.5)
    return run_dir


@pytest.fixture(scope="module")
def tuned(place, pretrained, tmp_path_factory):
    """Norms alone trained on top of another run, with checkpoints of updates 2 and 4."""
    run_dir = tmp_path_factory.mktemp("runs") / "tuned"
    results = place.run(
        run_dir, steps=4, trainable=NORMS, init_from=InitFrom(str(pretrained)), checkpoints=CheckpointConfig(every=2)
    )
    return run_dir, results


def test_split_and_merge_are_inverse():
    params = {"b": {"x": 1, "norm": {"scale": 2}}, "a": 3}
    part, rest = split_params(params, lambda name: "norm" in name)
    assert (part, rest) == ({"b": {"norm": {"scale": 2}}}, {"b": {"x": 1}, "a": 3})
    assert merge_params(part, rest) == merge_params(rest, part) == params
    assert sorted(leaf_names(params)) == ["a", "b/norm/scale", "b/x"]


def test_only_the_subset_has_moments_and_is_in_checkpoints(tuned, pretrained):
    run_dir, results = tuned
    shapes, whole = saved(run_dir), leaves(run_params(RunFolder(pretrained)))
    trained = {name for name in whole if "norm" in name}
    assert {name.removeprefix("params/") for name in shapes if name.startswith("params/")} == trained
    moments = [name for name in shapes if "/mu/" in name or "/nu/" in name]
    assert len(moments) == 2 * len(trained)
    assert results["parameters"] == sum(leaf.size for leaf in whole.values())
    assert results["trained_parameters"] == sum(whole[name].size for name in trained)


def test_other_parameters_stay_and_are_read_from_the_run_they_came_from(tuned, pretrained):
    run_dir, _ = tuned
    before, after = leaves(run_params(RunFolder(pretrained))), leaves(run_params(RunFolder(run_dir), "last"))
    assert before.keys() == after.keys()
    for name in before:
        assert np.array_equal(before[name], after[name]) == ("norm" not in name), name
    opened = leaves(t5x_ext.load(str(run_dir), "last").params)
    for name, leaf in after.items():
        np.testing.assert_array_equal(opened[name], leaf)


def test_a_subset_learns_as_a_whole_run_whose_other_updates_are_zero(place, pretrained, tuned, tmp_path):
    """The same gradients and moments: the optimizer sees nothing of the others but through the loss."""
    labels = lambda params: jax.tree_util.tree_map_with_path(
        lambda path, _: "train" if "norm" in str(path) else "keep", params
    )
    optimizer = place.tiny_run().optimizer
    zeroed = optax.partition({"train": optimizer, "keep": optax.set_to_zero()}, labels)
    place.run(tmp_path / "zeroed", steps=4, optimizer=zeroed, init_from=InitFrom(str(pretrained)))
    expected = leaves(run_params(RunFolder(tmp_path / "zeroed"), "last"))
    for name, leaf in leaves(run_params(RunFolder(tuned[0]), "last")).items():
        np.testing.assert_allclose(leaf, expected[name], atol=1e-6)


def test_a_subset_resumes_as_if_never_interrupted(place, pretrained, tuned, tmp_path):
    run = {"trainable": NORMS, "init_from": InitFrom(str(pretrained)), "checkpoints": CheckpointConfig(every=2)}
    place.run(tmp_path / "run", steps=2, **run)
    place.run(tmp_path / "run", steps=4, **run)
    for name, leaf in leaves(run_params(RunFolder(tuned[0]), "last")).items():
        np.testing.assert_array_equal(leaf, leaves(run_params(RunFolder(tmp_path / "run"), "last"))[name])


def test_without_another_run_the_frozen_weights_are_in_the_folder_and_move_with_it(place, tmp_path):
    place.run(tmp_path / "here", steps=2, trainable=NORMS)
    frozen = json.loads((tmp_path / "here/frozen.json").read_text())
    assert frozen["base"]["run_dir"] == "base"
    before = leaves(run_params(RunFolder(tmp_path / "here"), "last"))
    shutil.move(tmp_path / "here", tmp_path / "there")
    after = leaves(run_params(RunFolder(tmp_path / "there"), "last"))
    for name, leaf in before.items():
        np.testing.assert_array_equal(after[name], leaf)


def test_a_base_that_is_gone_or_changed_is_said(place, pretrained, tmp_path):
    base = shutil.copytree(pretrained, tmp_path / "base")
    place.run(tmp_path / "run", steps=1, trainable=NORMS, init_from=InitFrom(str(base), "last"))
    with CheckpointStore(base / "checkpoints") as store:
        params = store.restore_params("last")
        step = store.steps()[-1]
        store.save(step, {"params": jax.tree.map(lambda leaf: leaf + 1, params)})
    with pytest.raises(UserError, match=r"step 3 of .*base has changed since a run was trained on top of it"):
        run_params(RunFolder(tmp_path / "run"))
    shutil.rmtree(base)
    with pytest.raises(UserError, match=r"those of step 3 of .*base, which must not be moved"):
        t5x_ext.load(str(tmp_path / "run"))


@dataclasses.dataclass(frozen=True)
class Towards:
    """Half the squared distance of all parameters from the teacher's, whatever the batch."""

    model: object

    def __call__(self, params, batch, context: Context):
        teacher = context.frozen["teacher"]
        squares = jax.tree.map(lambda one, other: jnp.sum((one - other) ** 2) / 2, params, teacher)
        loss = LabelSmoothedCrossEntropy(self.model)(params, batch, context)
        return loss._replace(sum=sum(jax.tree.leaves(squares)) * loss.weight)


def test_a_teacher_is_read_and_never_written(place, pretrained, tmp_path):
    """Gradient descent at rate 1/2 halves the distance from the teacher at every update."""
    frozen = {"teacher": InitFrom(str(pretrained), "last")}
    place.run(tmp_path / "run", steps=4, objective=Towards, optimizer=optax.sgd(0.5), frozen=frozen)
    assert not any("teacher" in name for name in saved(tmp_path / "run"))
    teacher = leaves(run_params(RunFolder(pretrained), "last"))
    for name, leaf in leaves(run_params(RunFolder(tmp_path / "run"), "last")).items():
        assert np.abs(leaf - teacher[name]).max() < 0.2
    record = json.loads((tmp_path / "run/frozen.json").read_text())
    assert record["teacher"]["run_dir"] == str(pretrained)


def test_a_part_of_another_run_under_other_names(place, pretrained, tmp_path):
    """The encoder becomes the decoder's embedding: `rename`, then `only`."""
    init_from = InitFrom(str(pretrained), "last", only=("^embedding",), transform=lambda params: params)
    place.run(tmp_path / "run", steps=1, optimizer=optax.sgd(0.0), init_from=init_from)
    mine, theirs = (leaves(run_params(RunFolder(folder), "last")) for folder in (tmp_path / "run", pretrained))
    same = {name for name in mine if np.array_equal(mine[name], theirs[name])}
    assert "embedding/table" in same
    assert not any("kernel" in name for name in same)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"trainable": ("adaptr",)}, "Run.trainable: no parameter is called 'adaptr'; there are"),
        ({"trainable": ("",)}, "Run.trainable: all parameters are trained; leave it empty"),
        ({"init_from": InitFrom("PRETRAINED", only=("adaptr",))}, "only='adaptr' finds no parameter; it has"),
        ({"init_from": InitFrom("PRETRAINED", rename={"xyz": "a"})}, "rename finds no parameter called 'xyz'"),
        ({"init_from": InitFrom("PRETRAINED", rename={"^": "x/"})}, "this model has no parameter x/decoder"),
        ({"init_from": InitFrom("PRETRAINED", 77)}, "no whole checkpoint of step 77"),
        ({"frozen": {"teacher": InitFrom("nowhere")}}, f"no whole checkpoint in {Path.cwd()}/nowhere/checkpoints"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(place, pretrained, tmp_path, change, complaint):
    for name, value in change.items():
        if isinstance(value, InitFrom):
            change[name] = value._replace(run_dir=value.run_dir.replace("PRETRAINED", str(pretrained)))
    with pytest.raises(UserError) as error:
        place.run(tmp_path / "run", **change)
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run/checkpoints").exists()


def test_base_is_no_name_for_a_teacher(place):
    with pytest.raises(UserError, match=r"Run\.frozen: 'base' is what Run.trainable leaves frozen"):
        place.tiny_run(frozen={"base": InitFrom("x")})
