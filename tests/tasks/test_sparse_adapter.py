"""SparseAdapter through a whole run: what is trained, what is kept, what a resumed run finds."""

from __future__ import annotations

import functools
import json

import jax
import numpy as np
import pytest

import t5x_ext
from t5x_ext import compress
from t5x_ext.checkpoints import CheckpointStore, RunFolder, run_params, trees
from t5x_ext.contracts import UserError
from t5x_ext.models import LayerParts, houlsby, lora, mam
from t5x_ext.optim import adam, static_mask
from t5x_ext.parallel import make_mesh
from t5x_ext.train import Hook, InitFrom, PruneAtInit, execute, make_program

TRAINABLE = ("adapter", "^head/")
PRUNE = PruneAtInit(sparsity=0.4, examples=32)


class Stop(Hook):
    """Interrupts a run after an update."""

    def __init__(self, step):
        self.step = step

    def after_step(self, loop):
        if loop.step == self.step:
            loop.stop, loop.interrupted, loop.save = "test", True, "test"


@pytest.fixture
def sparse_run(classification_run, encoder):
    def make(steps=12, parts=None, hooks=(PRUNE,), **fields):
        options = {
            "optimizer": static_mask(adam(1e-2)),
            "trainable": TRAINABLE,
            "init_from": InitFrom(encoder),
            "hooks": hooks,
            **fields,
        }
        return classification_run(steps, task={"parts": parts or houlsby(8)}, **options)

    return make


def masks_of(run_dir):
    record = json.loads((run_dir / "masks.json").read_text())
    return record["entries"], record["kept"], record["matrices"]


def test_masked_entries_are_zero_from_the_first_update_on_and_the_base_is_untouched(sparse_run, encoder, tmp_path):
    run_dir = tmp_path / "run"
    execute(sparse_run(), str(run_dir))
    entries, kept, matrices = masks_of(run_dir)
    assert entries == 2 * 2 * 2 * 16 * 8  # layers, sub-layers, matrices
    assert kept == int(0.6 * entries)
    assert len(matrices) == 8
    assert sum(matrix["kept"] for matrix in matrices) == kept
    params = trees.flatten(run_params(RunFolder(run_dir)))
    kernels = [leaf for name, leaf in params.items() if "adapter" in name and name.endswith("kernel")]
    assert sum((leaf != 0).sum() for leaf in kernels) == kept
    base = trees.flatten(run_params(RunFolder(encoder)))
    assert all(np.array_equal(params[name], leaf) for name, leaf in base.items())


def test_checkpoints_hold_adapters_and_head_alone(sparse_run, tmp_path):
    execute(sparse_run(2), str(tmp_path / "run"))
    with CheckpointStore(RunFolder(tmp_path / "run").checkpoints) as store:
        stored = trees.flatten(store.evaluation_params("last"))
    whole = trees.flatten(run_params(RunFolder(tmp_path / "run"), "last"))
    assert set(stored) == {name for name in whole if "adapter" in name or name.startswith("head/")}
    assert all(np.array_equal(stored[name], whole[name]) for name in stored)


def test_a_resumed_run_has_the_masks_of_its_beginning(sparse_run, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    execute(sparse_run(8), str(whole))
    execute(sparse_run(8, hooks=(PRUNE, Stop(3))), str(resumed))
    assert not (resumed / "results.json").exists()
    execute(sparse_run(8), str(resumed))
    expected, found = (trees.flatten(run_params(RunFolder(path), "last")) for path in (whole, resumed))
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[name], found[name]) for name in expected)


def test_density_one_is_the_dense_run_bit_for_bit(sparse_run, tmp_path):
    execute(sparse_run(4, hooks=(PruneAtInit(density=1, examples=32),)), str(tmp_path / "one"))
    execute(sparse_run(4, hooks=(), optimizer=adam(1e-2)), str(tmp_path / "dense"))
    one, dense = (trees.flatten(run_params(RunFolder(tmp_path / name), "last")) for name in ("one", "dense"))
    assert all(np.array_equal(one[name], dense[name]) for name in dense)


@pytest.mark.parametrize(
    ("parts", "score"),
    [
        (lora(2), compress.grasp),
        (mam(3, 4), compress.er),
        (houlsby(4), compress.synflow),
        (houlsby(4, per_position=True), functools.partial(compress.magnitude)),
    ],
)
def test_every_kind_of_adapter_and_score_opens_again(sparse_run, tmp_path, parts, score):
    hook = PruneAtInit(score, sparsity=0.5, examples=16, rounds=2)
    execute(sparse_run(2, parts=parts, hooks=(hook,)), str(tmp_path / "run"))
    entries, kept, _ = masks_of(tmp_path / "run")
    assert kept == entries // 2
    assert t5x_ext.load(str(tmp_path / "run")).predict(["the film was good"])[0] in ("good", "bad")


def test_mistakes_are_one_line(sparse_run, tmp_path):
    cases = [
        ({"optimizer": adam(1e-2)}, r"PruneAtInit needs Run.optimizer = optim.static_mask"),
        ({"parts": houlsby(8, init="lora")}, r"snip: every score of .* is 0 and says nothing"),
        ({"parts": LayerParts()}, r"Run.trainable: no parameter is called 'adapter'"),
        ({"trainable": ("adaptor", "^head/")}, r"Run.trainable: no parameter is called 'adaptor'"),
        ({"optimizer": static_mask(adam(1e-2), ["lora"])}, r"static_mask: pattern 'lora' matches no parameter"),
    ]
    for number, (changes, message) in enumerate(cases):
        with pytest.raises(UserError, match=message) as caught:
            execute(sparse_run(2, **changes), str(tmp_path / f"run{number}"))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="give either density"):
        PruneAtInit()


def test_frozen_parameters_have_no_optimizer_state(sparse_run, tmp_path):
    run = sparse_run()
    program = make_program(run, {"vocab_size": 20, "classes": 2}, make_mesh(run.mesh))
    names = set(trees.flatten(program.template.optimizer_state))
    assert all("adapter" in name or "head/" in name or name.endswith(("count", "step")) for name in names)
    trained = sum(leaf.size for leaf in jax.tree.leaves(program.template.params))
    state = sum(leaf.size for leaf in jax.tree.leaves(program.template.optimizer_state))
    assert state < 2.3 * trained
