"""Compiles a run's update, or its decoding, for accelerators that are not here, and says whether it fits and how fast.

Takes the flags of t5x_ext train, or a pipeline and --stage, whose training or decoding it is then; texts need not be
there. TPUs (v4, v5e, v5p, v6e, any shape) are compiled for by their own compiler, from pip install 't5x_ext[tpu]'. For
GPUs (h100:8) sharding, operations and collectives come from virtual CPU devices, and memory is an estimate by formula.
Prints memory of one device by what it is for, operations, bytes of each kind of collective, the least seconds of a step
with communication overlapped and not, and what they mean in tokens a device-day and days. Ends with exit code 1 where
it does not fit, saying what is largest and what would make it fit.

example: t5x_ext check --gin_file=runs/vega_mt_4b7_v5e_8x8.gin --topology=v5e:8x8
example: t5x_ext check --gin_file=runs/vega_mt_4b7_v5e_8x8.gin --topology=v6e:16x16 --num_slices=2 --json_out=plan.json
example: t5x_ext check --gin_file=runs/vega_mt_4b7_v5e_8x8.gin --topology=v5p:2x2x4 --search
example: t5x_ext check --gin_file=runs/vega_mt_4b7_v5e_8x8.gin --topology=v5e:4x4 --program=decode --decode_rows=256
example: t5x_ext check --gin_file=runs/vega_mt_4b7_pipeline_v5p_4x4x4.gin --topology=v5p:4x4x4 --stage=best_test
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING

from absl import flags

from t5x_ext.cli.files import check_writable, report
from t5x_ext.cli.flags import require
from t5x_ext.cli.messages import UsageError
from t5x_ext.cli.pipeline import pipeline_from_flags
from t5x_ext.cli.run_flags import RUN_FLAGS, define_run_flags, run_from_flags
from t5x_ext.cli.stage_work import stage_work

if TYPE_CHECKING:
    from t5x_ext.decode import DecodeConfig
    from t5x_ext.pipeline import StageWork
    from t5x_ext.plan.report import CheckReport
    from t5x_ext.plan.topology import Target
    from t5x_ext.train import Run


def define_flags(values: flags.FlagValues) -> None:
    """Declares the flags of `t5x_ext check`."""
    flags.DEFINE_string(
        "topology", None, "devices, as v5e:8x8, v4:4x4x4, v5p:2x2x4, v6e:16x16 or h100:8; required", flag_values=values
    )
    flags.DEFINE_integer("num_slices", 1, "TPU slices, or GPU nodes", lower_bound=1, flag_values=values)
    flags.DEFINE_enum("program", "train", ["train", "decode"], "what to compile", flag_values=values)
    flags.DEFINE_string(
        "stage", None, "of a pipeline: the stage whose training or decoding is compiled", flag_values=values
    )
    flags.DEFINE_float(
        "mfu", None, "model FLOPs utilisation to reckon with beside the bounds, as 0.4", lower_bound=0.001,
        upper_bound=1.0, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "mean_length", 32, "target tokens of an example that model FLOPs are counted for", lower_bound=1,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "decode_rows", None, "sentences of a batch to decode, over all devices; by default the source tokens that the "
        "run decodes at once on each copy of the model, in sentences of --decode_length", lower_bound=1,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer("decode_length", 64, "source tokens of a sentence", lower_bound=1, flag_values=values)
    flags.DEFINE_integer(
        "beam_size", None, "of beam search; by default that of the stage, or of the run's final test",
        lower_bound=1, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_boolean(
        "search", False, "try meshes, remat policies and numbers of microbatches, and rank those that fit",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "search_compiles", 12, "most programs that --search compiles", lower_bound=1, flag_values=values
    )
    flags.DEFINE_string("json_out", None, "file for the findings as JSON; - is standard output", flag_values=values)
    define_run_flags(values)


def main(values: flags.FlagValues) -> int:
    """Runs `t5x_ext check`; 1 where the run does not fit."""
    require(values, "topology")
    check_writable(values.json_out, "--json_out")
    if values.search and values.program != "train":
        raise UsageError("--search goes with --program=train")
    # Nothing is run, so that accelerators of this machine are left alone.
    os.environ["JAX_PLATFORMS"] = "cpu"
    vocab_size = values.vocab_size
    # It says how many pieces there are here, not how many to train.
    values["vocab_size"].value = None
    work = _work_of_stage(values) if values.stage else _work_of_run(values)
    if values.program == "decode" and work.decode is None:
        from t5x_ext.tasks import Translation, text_task

        task = text_task(work.run)
        if not isinstance(task, Translation):
            raise UsageError("--program=decode goes with a translation; a language model decodes nothing")
        work = work._replace(decode=task.test_decode)

    from t5x_ext.plan.topology import find_target

    target = find_target(values.topology, values.num_slices)
    vocab_size = vocab_size or _vocab_size(work.run)
    if values.search:
        return _search(values, work.run, vocab_size, target)
    return _examine(values, work, vocab_size, target)


def _work_of_run(values: flags.FlagValues) -> StageWork:
    """The training of a run, as of a stage that consists of it."""
    from t5x_ext.pipeline import StageWork

    return StageWork(run_from_flags(values)[0])


def _work_of_stage(values: flags.FlagValues) -> StageWork:
    """What the stage of a pipeline computes.

    Raises:
      UsageError: for flags that do not go with a stage, and for a stage that computes nothing.
    """
    require(values, "gin_file")
    if values["program"].present:
        raise UsageError("--program goes with a run; a --stage has its own")
    for name in RUN_FLAGS:
        if getattr(values, name) not in (None, []):
            raise UsageError(f"--{name} goes with a run; for a --stage write --gin.NAME=VALUE")
    work = stage_work(pipeline_from_flags(values)[0], values.stage)
    if values.search and work.decode is not None:
        raise UsageError(f"--search goes with training, and --stage={values.stage} decodes")
    return work


def _examine(values: flags.FlagValues, work: StageWork, vocab_size: int, target: Target) -> int:
    import dataclasses

    found = dataclasses.replace(_check(values, work, vocab_size, target), assumed_mfu=values.mfu)
    report(str(found), found.to_json(), values.json_out)
    return 0 if found.fits else 1


def _check(values: flags.FlagValues, work: StageWork, vocab_size: int, target: Target) -> CheckReport:
    import dataclasses

    from t5x_ext.plan.check import check, check_decoding, on_slices

    run, decode = work.run, work.decode
    if decode is None:
        return check(run, vocab_size, target, values.mean_length)
    if values.beam_size:
        if not hasattr(decode.search, "beam_size"):
            raise UsageError(f"--beam_size: the search is {type(decode.search).__name__}, which has no beam")
        search = dataclasses.replace(decode.search, beam_size=values.beam_size)  # type: ignore[type-var]
        decode = dataclasses.replace(decode, search=search)
    rows = values.decode_rows or _decode_rows(on_slices(run, target), decode, len(target.devices), values.decode_length)
    return check_decoding(run, vocab_size, target, decode, rows, values.decode_length, work.members)


def _decode_rows(run: Run, decode: DecodeConfig, devices: int, length: int) -> int:
    """The rows of the batch that `t5x_ext translate` makes of sentences of one length."""
    from t5x_ext.decode.batching import ACCELERATOR_BATCH_TOKENS, batch_rows

    slices, data, fsdp, _ = run.mesh.sizes(devices)
    copies = slices * data
    return batch_rows(length, decode.batch_tokens or ACCELERATOR_BATCH_TOKENS, copies, shards=copies * fsdp)


def _search(values: flags.FlagValues, run: Run, vocab_size: int, target: Target) -> int:
    from t5x_ext.plan.search import search

    # What a layout does not cut would be logged once for each layout.
    logger = logging.getLogger("t5x_ext.parallel")
    level = logger.level
    logger.setLevel(logging.WARNING)
    found = search(run, vocab_size, target, values.mean_length, values.search_compiles, progress=_progress)
    logger.setLevel(level)
    report(str(found), found.to_json(), values.json_out)
    return 0 if found.fitting else 1


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _vocab_size(run: Run) -> int:
    """Pieces of the vocabulary: of the given one, where it is here, else as many as are to be trained."""
    from t5x_ext.contracts import UserError
    from t5x_ext.data import Vocabulary
    from t5x_ext.tasks import text_task

    data = text_task(run).data
    config = data.vocabulary
    if config.path is None:
        return config.size
    corpora = (*data.train, *data.valid, *data.test)
    languages = list(dict.fromkeys(language for corpus in corpora for language in corpus.languages))
    try:
        folder = os.path.isdir(config.path)
        saved = Vocabulary.load(config.path) if folder else Vocabulary(config.path, languages)
    except UserError:
        size = text_task(run).model.vocab_size
        _progress(f"the vocabulary {config.path} is not here; taking the {size:,} pieces of the model, or --vocab_size")
        return size
    return Vocabulary.from_model(saved.model, [*saved.languages, *languages]).size if folder else saved.size
