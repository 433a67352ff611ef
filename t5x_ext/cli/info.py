"""Describes a run folder, a model preset, or the model of a gin file: parameters, layers, FLOPs, vocabulary, sizes.

example: t5x_ext info --run_dir=out
example: t5x_ext info --preset=base
example: t5x_ext info --gin_file=runs/multi30k_en_de.gin
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from t5x_ext.cli.files import check_writable, report
from t5x_ext.cli.messages import UsageError, did_you_mean
from t5x_ext.storage.remote import is_remote

if TYPE_CHECKING:
    from t5x_ext.models import LayerConfig, Transformer


def define_flags(values: flags.FlagValues) -> None:
    """Declares the flags of `t5x_ext info`."""
    flags.DEFINE_string("run_dir", None, "run folder to describe", flag_values=values)
    flags.DEFINE_string("preset", None, "model preset to describe, as base or vega_4b7", flag_values=values)
    flags.DEFINE_multi_string("gin_file", [], "gin file whose run to describe", flag_values=values)
    flags.DEFINE_multi_string("gin", [], "one binding over those of the file", flag_values=values)
    flags.DEFINE_integer(
        "length", 128, "tokens of source and target that FLOPs are counted for", lower_bound=1, flag_values=values
    )
    flags.DEFINE_string("json_out", None, "file for the description as JSON; - is standard output", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Runs `t5x_ext info`."""
    check_writable(values.json_out, "--json_out")
    if sum(map(bool, (values.run_dir, values.preset, values.gin_file))) != 1:
        raise UsageError("give one of --run_dir, --preset and --gin_file")
    if values.gin and not values.gin_file:
        raise UsageError("--gin. bindings go with --gin_file")
    run = _run(values.run_dir) if values.run_dir else {}
    model = _model(values, run)
    result = {**_describe(model, values.length), **run}
    report("\n".join(_lines(result)), result, values.json_out)


def _model(values: flags.FlagValues, run: dict[str, Any]) -> Transformer:
    from t5x_ext.models import PRESETS, model_from_json, model_of

    if not (values.run_dir or values.gin_file or values.preset in PRESETS):
        raise UsageError(f"--preset={values.preset} is unknown{did_you_mean(values.preset, PRESETS)}")
    model: Transformer
    if values.run_dir:
        model = model_from_json(run["model"])
    else:
        model = model_of(_config_of_gin(values) if values.gin_file else PRESETS[values.preset]())
    return model


def _config_of_gin(values: flags.FlagValues) -> LayerConfig:
    """The model of a gin file with the vocabulary that it asks for; its corpora need not be there."""
    import dataclasses

    from t5x_ext.cli.gin_config import build_field
    from t5x_ext.data import DataConfig
    from t5x_ext.tasks import LanguageModeling, Translation

    fields = (build_field("model", values.gin_file, values.gin, root=task) for task in (Translation, LanguageModeling))
    model = next((field for field in fields if field is not None), None)
    if model is None:
        raise UsageError(f"--gin_file={values.gin_file[-1]} binds no Translation.model and no LanguageModeling.model")
    vocabulary = build_field("vocabulary", values.gin_file, values.gin, root=DataConfig)
    return dataclasses.replace(model, vocab_size=vocabulary.size) if vocabulary else model


def _describe(model: Transformer, length: int) -> dict[str, Any]:
    """Sizes and costs of a model."""
    from t5x_ext.models import TransformerConfig, model_to_json, num_params

    config: Any = model.config
    translates = isinstance(config, TransformerConfig)
    flops = config.flops([length], [length]) if translates else config.flops([length])
    maps = {
        layers: list(getattr(config, sharing).layer_map(getattr(config, layers)))
        for layers, sharing in config.stacks.items()
    }
    return {
        "model": model_to_json(model),
        "parameters": num_params(model),
        "megabytes_of_weights": round(4 * num_params(model) / 1e6, 1),
        **{f"{layers.removesuffix('layers')}layer_map": layer_map for layers, layer_map in maps.items()},
        f"forward_flops_{length}_to_{length}" if translates else f"forward_flops_{length}": flops,
        "training_flops_a_target_token" if translates else "training_flops_a_token": 3 * flops / length,
    }


def _run(run_dir: str) -> dict[str, Any]:
    """What a run folder holds beside its model."""
    from t5x_ext.checkpoints import CheckpointStore, RunFolder
    from t5x_ext.data import Vocabulary

    folder = RunFolder(run_dir)
    record = folder.read_model()
    vocabulary = Vocabulary.load(str(folder.vocabulary))
    with CheckpointStore(folder.checkpoints) as store:
        steps, best = store.steps(), store.best_step()
    files = [file for file in Path(run_dir).rglob("*") if file.is_file()]
    return {
        "model": record.model,
        "directions": list(record.directions),
        "tags": record.tags,
        "vocabulary": {"size": vocabulary.size, "languages": list(vocabulary.languages)},
        "checkpoints": steps,
        "best_checkpoint": best,
        "megabytes_on_disk": None if is_remote(run_dir) else round(sum(file.stat().st_size for file in files) / 1e6, 1),
        "finished": folder.results_json.exists(),
    }


def _lines(result: dict[str, Any], indent: str = "") -> Iterator[str]:
    for name, value in result.items():
        if isinstance(value, dict):
            yield f"{indent}{name}"
            yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{name:<{30 - len(indent)}} {_shown(value)}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}" if 1 < value < 1e6 else f"{value:.4g}"
    return str(value)
