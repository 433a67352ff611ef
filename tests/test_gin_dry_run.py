"""Every packaged gin file, dry: built into a run whose update is traced at its real shapes. Nothing is computed."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import jax
import pytest

from t5x_ext.cli.flags import parse
from t5x_ext.cli.gin_config import build_parts, build_run
from t5x_ext.cli.gin_read import Source, gin_root
from t5x_ext.cli.run_flags import DEFAULT_RUN, define_run_flags, run_from_flags
from t5x_ext.cli.study import define_flags as define_study_flags
from t5x_ext.cli.study import make_configure, study_from_flags
from t5x_ext.contracts import UserError
from t5x_ext.corpora import ParallelText
from t5x_ext.decode import Beam, LengthBeam
from t5x_ext.models import num_params
from t5x_ext.parallel import MeshConfig, make_mesh
from t5x_ext.pipeline import Pipeline, Stage, Train
from t5x_ext.study import check, select
from t5x_ext.tasks import ParallelTranslation, Translation, with_model
from t5x_ext.train import Run
from t5x_ext.train.program import Program, make_program

FILES = sorted(path.relative_to(gin_root()).as_posix() for path in gin_root().rglob("*.gin"))


def with_included(name: str) -> list[str]:
    """A file, and all that it includes."""
    text = (gin_root() / name).read_text(encoding="utf-8")
    included = re.findall(r"^include '(.*)'", text, flags=re.MULTILINE)
    return [name, *(inner for other in included for inner in with_included(other))]


PIPELINES = [
    name
    for name in FILES
    if name.startswith("runs/") and any(other.startswith("pipelines/") for other in with_included(name))
]
CLASSIFICATIONS = [name for name in FILES if "tasks.Classification()" in (gin_root() / name).read_text("utf-8")]
GRAPHS = [name for name in FILES if "tasks.NodeClassification()" in (gin_root() / name).read_text("utf-8")]
RUNS = [name for name in FILES if name.startswith("runs/") and name not in (*PIPELINES, *CLASSIFICATIONS, *GRAPHS)]
OPTIMIZERS = [name for name in FILES if name.startswith("optim/")]
STAGES = [name for name in FILES if name.startswith("pipelines/")]  # dry-run by the files that include them
STUDIES = [name for name in FILES if name.startswith("studies/")]
METHODS = [name for name in FILES if name.startswith("methods/")]  # dry-run by the files that include them
FRAGMENTS = [
    name
    for name in FILES
    if name not in (*RUNS, *PIPELINES, *CLASSIFICATIONS, *GRAPHS, *OPTIMIZERS, *STAGES, *STUDIES, *METHODS)
]
QUICKSTART = "runs/quickstart.gin"
TWO_FILES = ["--train_source=a.en", "--train_target=a.de", "--source_language=en", "--target_language=de"]


def build_with_text(*names: str, flags: tuple[str, ...] = ()) -> tuple[Run, str]:
    """The run of these files with its resolved text; the packaged default run takes its corpora from flags."""
    needs_corpora = DEFAULT_RUN in names and not any(name.startswith("data/") for name in names)
    files = (f"--gin_file={name}" for name in names)
    return run_from_flags(parse(define_run_flags, [*files, *flags, *(TWO_FILES if needs_corpora else [])]))


def build(*names: str, flags: tuple[str, ...] = ()) -> Run:
    return build_with_text(*names, flags=flags)[0]


def program_of(run: Run) -> Program:
    """On one device, whatever the run is for."""
    return make_program(run, {"vocab_size": run.task.data.vocabulary.size}, make_mesh(MeshConfig(), jax.devices()[:1]))


def trace(run: Run) -> None:
    """Traces one update; what comes out must be a state like the one that went in."""
    program = program_of(run)
    state = program.template
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == num_params(program.model)
    after, metrics = jax.eval_shape(program.step(), state, program.frozen, program.batch)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    kind = lambda leaf: (leaf.shape, leaf.dtype)
    assert jax.tree.map(kind, after) == jax.tree.map(kind, state)
    assert metrics.loss.sum.shape == ()


def trace_scanned(run: Run) -> None:
    """The same with scanned layers, so that tracing a deep model is not what a test spends its time on."""
    trace(with_model(run, scan_layers=True))


@pytest.fixture(autouse=True)
def without_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A current folder without any text."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", RUNS)
def test_every_run_can_take_a_step(name):
    trace(build(name))


@pytest.mark.parametrize("name", PIPELINES)
def test_every_run_of_a_pipeline_can_take_a_step(name):
    pipeline, texts = build_parts("stages", [name], root=Pipeline)
    assert len(texts) == len(pipeline.stages)
    runs = [stage.run for stage in pipeline.stages if isinstance(stage, Train)]
    assert runs
    # Updates of one model differ in rows and rates only. What a pipeline includes is traced as a run of its own.
    own = {build(other).task.model for other in with_included(name)[1:] if other in RUNS}
    for run in {run.task.model: run for run in runs if run.task.model not in own}.values():
        trace(run)
    # A stage has no settings but its own: those of no other one, by whose name it would be in a scope of that.
    for stage, text in zip(pipeline.stages, texts):
        scopes = {line.split("/")[0] for line in text.splitlines() if "/" in line.split(" = ")[0]}
        assert not scopes & {other.name for other in pipeline.stages if other is not stage} - {"dev", "test"}


@pytest.mark.parametrize("name", CLASSIFICATIONS)
def test_every_classification_can_take_a_step(name):
    run, text = build_run([name])
    program = make_program(run, {"vocab_size": 1000, "classes": 3}, make_mesh(MeshConfig(), jax.devices()[:1]))
    after, metrics = jax.eval_shape(program.step(), program.template, program.frozen, program.batch)
    assert jax.tree.structure(after) == jax.tree.structure(program.template)
    assert metrics.loss.sum.shape == ()
    assert "PruneAtInit.score" in text


@pytest.mark.parametrize("name", GRAPHS)
def test_every_classification_of_nodes_can_take_a_step(name):
    run, text = build_run([name])
    sizes = {"classes": 3, "nodes": 20, "channels": 8, "edges": 40, "edge_logits": 40}
    program = make_program(run, sizes, make_mesh(MeshConfig(), jax.devices()[:1]))
    after, metrics = jax.eval_shape(program.step(), program.template, program.frozen, program.batch)
    assert jax.tree.structure(after) == jax.tree.structure(program.template)
    assert metrics.loss.sum.shape == ()
    assert "gradual_pruning.end" in text


@pytest.mark.parametrize("name", STUDIES)
def test_every_arm_of_a_study_can_be_run(name):
    """Built as its command builds it; of arms that train, one of each optimizer is traced."""
    study = study_from_flags(parse(define_study_flags, [f"--gin_file={name}"]))
    configure = make_configure()
    jobs = {job.arm: job for job in check(study, "out", configure, select(study, seeds=study.seeds[:1]))}
    assert len(jobs) == len({arm.run_name for arm in study.arms})
    runs = {study.arm(arm).gin_files: configure(job.arguments).config for arm, job in jobs.items()}
    for run in runs.values():
        if isinstance(run, Run):
            assert run.steps == study.budget.limit
            trace(run)


def stages_of(*names: str) -> list[Stage]:
    return list(build_run(names, root=Pipeline)[0].stages)


LARGE = {
    ("runs/vega_mt_4b7_pipeline_v5e_16x16.gin",): 256,
    ("runs/vega_mt_4b7_pipeline_v5p_4x4x4.gin",): 64,
    ("runs/vega_mt_4b7_pipeline_h100_64.gin",): 64,
    ("runs/vega_mt_4b7_v6e_8x8.gin", "pipelines/vega_mt_4b7.gin"): 64,
}


@pytest.mark.parametrize("names", LARGE, ids=lambda names: names[0])
def test_the_large_pipeline_is_the_tiny_one_with_other_sizes_and_texts(names):
    graph = lambda stages: [(stage.name, type(stage), stage.inputs()) for stage in stages]
    stages = stages_of(*names)
    assert graph(stages) == graph(stages_of("runs/vega_mt_tiny.gin"))
    by_name = {stage.name: stage for stage in stages}
    assert all(isinstance(corpus, ParallelText) for stage in stages for corpus in stage.sources())
    runs = {name: stage.run for name, stage in by_name.items() if isinstance(stage, Train)}
    for run in runs.values():
        assert run.task.data.batch.rows % (LARGE[names] * run.num_microbatches) == 0
    sizes = {name: num_params(dataclasses.replace(run.task.model, vocab_size=128_009)) for name, run in runs.items()}
    assert {name for name, size in sizes.items() if size == 4_693_321_728} == runs.keys() - {"lm", "past_lm"}
    assert by_name["best_test"].decode.search == Beam(beam_size=5, length_penalty="fairseq", alpha=1.0)


@pytest.mark.parametrize("name", FRAGMENTS)
def test_every_fragment_goes_with_the_default_run(name):
    run, plain = build(DEFAULT_RUN, name), build(DEFAULT_RUN)
    if name.startswith("data/"):
        assert run.task.data != plain.task.data
        assert run.task.model == plain.task.model
    elif name.startswith("models/"):
        trace_scanned(run)
    assert run.steps == plain.steps


@pytest.mark.parametrize("run_name", [DEFAULT_RUN, QUICKSTART])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_takes_a_step_of_a_run(name, run_name):
    run, plain = build(run_name, name), build(run_name)
    trace_scanned(run)
    assert (run.steps, run.task.model, run.task.data) == (plain.steps, plain.task.model, plain.task.data)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_schedules_of_optimizers_end_with_the_run_and_warm_up_as_it_says(name):
    run, text = build_with_text(QUICKSTART, name, flags=("--steps=7",))
    assert run.steps == 7
    assert "linear_decay.total_steps = 7\n" in text
    assert "linear_decay.warmup_steps = 200\n" in text


def state_sizes(run: Run) -> tuple[int, int]:
    """Entries of the optimizer's state and of the parameters."""
    state = program_of(run).template
    return tuple(sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (state.optimizer_state, state.params))


@pytest.mark.parametrize("run_name", RUNS)
def test_flora_compresses_the_momentum_of_every_run(run_name):
    size, params = state_sizes(build(run_name, "optim/flora.gin"))
    assert size < 0.6 * params  # half of the momentum in the small ones, and vectors


@pytest.mark.parametrize("name", ["optim/flora.gin", "optim/ginger.gin"])
def test_flags_for_the_model_also_reach_the_axes_of_the_optimizer(name):
    """Untied embeddings are parameters that the axes of the model of the file would not have."""
    run = build(QUICKSTART, name, flags=("--gin.VegaTiny.tied_embeddings=none", "--gin.VegaTiny.decoder_layers=3"))
    assert (run.task.model.tied_embeddings, run.task.model.decoder_layers) == ("none", 3)
    program_of(run)


def test_the_record_of_a_run_names_its_model_once_and_without_macros():
    run, text = build_with_text(QUICKSTART, "optim/flora.gin")
    again, text_again = build_run((), [Source(text, "resolved.gin")])
    assert (again.task.model, again.task.data, text_again) == (run.task.model, run.task.data, text)
    assert "MODEL" not in text
    assert text.count("VegaTiny.embed_dim") == 1
    program_of(again)


def test_axes_of_another_model_are_one_line():
    flags = (
        "--gin.Translation.model=@t5x_ext.models.TransformerConfig()",
        "--gin.TransformerConfig.tied_embeddings=none",
    )
    run = build(QUICKSTART, "optim/flora.gin", flags=flags)
    with pytest.raises(UserError, match=r"axis names .* of another model") as error:
        program_of(run)
    assert "\n" not in str(error.value)


def test_an_optimizer_that_needs_the_model_says_so_where_the_run_has_no_macro(tmp_path):
    (tmp_path / "mine.gin").write_text(
        "from t5x_ext import models\nfrom t5x_ext import tasks\n"
        "include 'data/cldr.gin'\ntasks.Translation.model = @models.VegaTiny()\nSTEPS = 5\n"
    )
    with pytest.raises(UserError, match=r"optim/flora\.gin:\d+: %MODEL has no value"):
        build_run(["mine.gin", "optim/flora.gin"])


def test_a_parallel_student_is_distilled_behind_its_run():
    stages = {stage.name: stage for stage in stages_of("runs/nat_quickstart.gin", "pipelines/distil_parallel.gin")}
    teacher, student = stages["teacher"].run, stages["student"].run
    assert (type(teacher.task), type(student.task)) == (Translation, ParallelTranslation)
    assert stages["student"].corpora == ("distilled",)
    assert stages["student_test"].decode.search == LengthBeam()
    for run in (teacher, student):
        trace(run)
