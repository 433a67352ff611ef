"""Prepares the data of a run ahead of training: vocabulary and token cache.

Takes the flags of t5x_ext train. Prints what was kept and dropped, disk space, how the directions mix, how full packed
rows are, and a few packed examples as text. Training with the same --run_dir (and --cache_dir) then starts at once.

With --runner the training text is tokenized on Apache Beam, to the same bytes. Its workers must reach --cache_dir and
the text files, and need this package: on Flink, Spark and Dataflow name a container image that has it.

example: t5x_ext cache --gin_file=runs/multi30k_en_de.gin --run_dir=out
example: t5x_ext cache --gin_file=runs/vega_mt_4b7.gin --run_dir=out --cache_dir=gs://bucket/caches \\
    --runner=DataflowRunner --runner_option=--project=ID --runner_option=--region=europe-west4 \\
    --runner_option=--temp_location=gs://bucket/tmp --runner_option=--sdk_container_image=IMAGE
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from t5x_ext.cli.files import check_folder, check_writable, report
from t5x_ext.cli.flags import require
from t5x_ext.cli.run_flags import check_texts, define_run_flags, run_from_flags
from t5x_ext.cli.runner_flags import check_runner_flags, define_runner_flags, runner_from_flags

if TYPE_CHECKING:
    from t5x_ext.data import PreparedData, TokenCache


def define_flags(values: flags.FlagValues) -> None:
    """Declares the flags of `t5x_ext cache`."""
    flags.DEFINE_string("run_dir", None, "run folder that the vocabulary goes to; required", flag_values=values)
    define_run_flags(values)
    flags.DEFINE_string(
        "cache_dir", None, "folder of token caches that runs share; by default in --run_dir", flag_values=values
    )
    define_runner_flags(values, "tokenize")
    flags.DEFINE_integer("preview", 1, "packed rows to show as text", lower_bound=0, flag_values=values)
    flags.DEFINE_string("json_out", None, "file for the counts as JSON; - is standard output", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Runs `t5x_ext cache`."""
    require(values, "run_dir")
    check_folder(values.run_dir, "--run_dir")
    check_writable(values.json_out, "--json_out")
    check_runner_flags(values)
    run, _ = run_from_flags(values)
    check_texts(run)

    from t5x_ext.data import prepare
    from t5x_ext.tasks import text_task

    beam = runner_from_flags(values)
    data = prepare(text_task(run).data, values.run_dir, values.cache_dir, run.seed, values.num_processes, beam)
    caches = list({stream.cache.path: stream.cache for stream in data.plan.streams}.values())
    result: dict[str, Any] = {
        "vocabulary": {"size": data.vocabulary.size, "languages": list(data.vocabulary.languages)},
        "caches": [_describe(cache) for cache in caches],
        "rates": data.plan.rates(),
        "batches_per_epoch": data.plan.batches_per_epoch(),
        "density": data.plan.density,
    }
    report(_text(result, data, values.preview), result, values.json_out)


def _describe(cache: TokenCache) -> dict[str, Any]:
    manifest = cache.manifest
    source_tokens, target_tokens = manifest["tokens"]
    return {
        "name": cache.name,
        "path": cache.path,
        "pairs_read": manifest["pairs_read"],
        "pairs": manifest["pairs"],
        "dropped": manifest["dropped"],
        "source_tokens": source_tokens,
        "target_tokens": target_tokens,
        "bytes": sum(file.stat().st_size for file in Path(cache.path).iterdir()),
    }


def _text(result: dict[str, Any], data: PreparedData, preview: int) -> str:
    lines = [f"vocabulary of {data.vocabulary.size:,} pieces"]
    for cache in result["caches"]:
        dropped = ", ".join(f"{rule} {count:,}" for rule, count in cache["dropped"].items() if count) or "none"
        lines.append(
            f"{cache['name']}: {cache['pairs']:,} of {cache['pairs_read']:,} pairs (dropped: {dropped}), "
            f"{cache['source_tokens']:,} + {cache['target_tokens']:,} tokens, {cache['bytes'] / 2**20:.1f} MiB"
        )
    lines += [f"{name}: {100 * rate:.2f} % of the examples drawn" for name, rate in result["rates"].items()]
    lines.append(f"{result['batches_per_epoch']:,} batches an epoch, rows {100 * result['density']:.1f} % full")
    for number, row in enumerate(data.batches.preview(0, preview) if preview else []):
        lines += [f"row {number}, {example.direction}: {example.source} ||| {example.target}" for example in row]
    return "\n".join(lines)
