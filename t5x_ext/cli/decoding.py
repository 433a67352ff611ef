"""Flags of the commands that open a run folder and decode with it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from absl import flags

from t5x_ext.cli.compile_cache import define_compile_cache_flag, keep_compiled_programs
from t5x_ext.cli.field_flags import FieldFlag, define_field_flags, field_values
from t5x_ext.cli.languages import known_language
from t5x_ext.cli.messages import UsageError, did_you_mean

if TYPE_CHECKING:
    from t5x_ext.decode import DecodeConfig, Translator

_N_BEST = FieldFlag("translations for each line", lower_bound=1)
_PENALTY = {
    "length_penalty": FieldFlag("what a score is divided by: length**alpha, or ((5 + length) / 6)**alpha"),
    "alpha": FieldFlag("exponent of the length penalty", lower_bound=0.0),
}
_BEAM = {"beam_size": FieldFlag("hypotheses kept in beam search", lower_bound=1), "n_best": _N_BEST, **_PENALTY}
_SAMPLE = {
    "temperature": FieldFlag("of sampling", lower_bound=0.0),
    "top_k": FieldFlag("sample from the k most probable tokens; 0 is all", lower_bound=0),
    "top_p": FieldFlag("sample from the fewest tokens that reach this probability", lower_bound=0.0, upper_bound=1.0),
    "seed": FieldFlag("of sampling"),
}
_LENGTHS = {
    "max_length_ratio": FieldFlag("a translation has at most this many tokens a source token", lower_bound=0.0),
    "max_length_extra": FieldFlag("and so many more", lower_bound=0),
}
_BATCHING = {
    "max_source_length": FieldFlag("longer lines are truncated to so many tokens", lower_bound=4),
    "batch_tokens": FieldFlag("padded source tokens a batch; by default what suits the device", lower_bound=1),
}
_MESH = {
    "fsdp": FieldFlag(
        "devices of this process over which the weights are sharded along their width; every such group of devices "
        "decodes other lines",
        name="mesh_fsdp",
        lower_bound=1,
    ),
    "tensor": FieldFlag(
        "devices over which single matrices are sharded, also while they are used", name="mesh_tensor", lower_bound=1
    ),
}

_SEARCH_FLAGS = {**_BEAM, **_SAMPLE}
"""Flags that are fields of searches, of one or of several."""

_STRATEGIES = {"beam": "Beam", "greedy": "Greedy", "sample": "Sample"}
_CONSTRAINTS = {"minimum_length": "MinimumLength", "no_repeat_ngrams": "NoRepeatNgrams"}


def define_model_flags(values: flags.FlagValues) -> None:
    """Declares which model to open, and the direction to use it in."""
    flags.DEFINE_string("run_dir", None, "run folder that t5x_ext train wrote", flag_values=values)
    flags.DEFINE_string("checkpoint", "best", "best, last, or a step", flag_values=values)
    flags.DEFINE_list(
        "ensemble",
        [],
        "further runs of the same model shape and vocabulary, which decode together with --run_dir as one",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "ensemble_average", "log_prob", ["log_prob", "probability"], "what an ensemble averages", flag_values=values
    )
    about = "code, as de or zh; not needed if one direction of the model fits"
    flags.DEFINE_string("source_language", None, about, flag_values=values)
    flags.DEFINE_string("target_language", None, about, flag_values=values)
    define_field_flags(values, "parallel.mesh", "MeshConfig", _MESH)
    define_compile_cache_flag(values)


def define_decode_flags(values: flags.FlagValues) -> None:
    """Declares the options of decoding: fields of `DecodeConfig` and of the searches, with their defaults."""
    flags.DEFINE_string(
        "strategy", "beam", f"how to search: {', '.join(_STRATEGIES)}, or the import path of another Search, as "
        "my_module.MySearch", flag_values=values,
    )  # fmt: skip
    define_field_flags(values, "decode.beam", "Beam", _BEAM)
    define_field_flags(values, "decode.sampling", "Sample", _SAMPLE)
    define_field_flags(values, "decode.config", "DecodeConfig", _LENGTHS)
    define_batching_flags(values)
    flags.DEFINE_integer(
        "minimum_length", None, "a translation has at least so many tokens", lower_bound=1, flag_values=values
    )
    flags.DEFINE_integer(
        "no_repeat_ngrams", None, "no sequence of so many tokens occurs twice in a translation", lower_bound=1,
        flag_values=values,
    )  # fmt: skip


def define_batching_flags(values: flags.FlagValues) -> None:
    """Declares how source lines are truncated and batched, for decoding and for scoring."""
    define_field_flags(values, "decode.config", "DecodeConfig", _BATCHING)


def decode_config(values: flags.FlagValues) -> DecodeConfig:
    """The options that the flags give.

    Raises:
      UsageError: for an unknown strategy, and for flags that do not go with the one chosen.
      UserError: for values that are not allowed.
    """
    from t5x_ext import decode

    constraints = tuple(
        getattr(decode, kind)(values[name].value) for name, kind in _CONSTRAINTS.items() if values[name].value
    )
    options = field_values(values, {**_LENGTHS, **_BATCHING})
    return decode.DecodeConfig(search=_search(values), constraints=constraints, **options)


def _search(values: flags.FlagValues) -> Any:
    """The search that `--strategy` names; a class is called with the flags given that are fields of searches."""
    from t5x_ext import decode

    name = values.strategy
    search = getattr(decode, _STRATEGIES[name]) if name in _STRATEGIES else _imported(name)
    is_class = isinstance(search, type)
    fields = getattr(search, "__dataclass_fields__", {}) if is_class else {}
    given = {flag: values[flag].value for flag in _SEARCH_FLAGS if values[flag].present}
    for flag in given:
        if flag not in fields:
            raise UsageError(f"--{flag} does not go with --strategy={name}")
    return search(**given) if is_class else search


def _imported(path: str) -> Any:
    """What an import path such as `my_module.MySearch` names."""
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise UsageError(f"--strategy={path}: there is no such search{did_you_mean(path, _STRATEGIES)}")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(f"--strategy={path}: cannot import {module_name}: {error}") from None
    if not hasattr(module, name):
        raise UsageError(f"--strategy={path}: {module_name} has no '{name}'{did_you_mean(name, vars(module), most=0)}")
    return getattr(module, name)


def open_translator(values: flags.FlagValues) -> Translator:
    """The model of `--run_dir` on the devices of this process, after checking that it knows the direction asked for.

    Raises:
      UserError: for a folder that holds no whole run, an unknown language, a direction that the model does not have, or
        a mesh that does not fit the devices.
    """
    keep_compiled_programs(values)
    import jax

    from t5x_ext.decode import Translator
    from t5x_ext.parallel import MeshConfig, fsdp_tensor, make_mesh

    for language in (values.source_language, values.target_language):
        if language:
            known_language(language)
    mesh = make_mesh(MeshConfig(**field_values(values, _MESH)), jax.local_devices())
    translators = [
        Translator.from_run(run_dir, values.checkpoint, mesh, fsdp_tensor())
        for run_dir in (values.run_dir, *values.ensemble)
    ]
    translator = Translator.ensemble(translators, values.ensemble_average) if values.ensemble else translators[0]
    translator.resolve(values.source_language, values.target_language)
    return translator
