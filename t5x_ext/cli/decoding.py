"""Flags of the commands that open a run folder and decode with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from absl import flags

from t5x_ext.cli.compile_cache import define_compile_cache_flag, keep_compiled_programs
from t5x_ext.cli.field_flags import define_field_flags, field_names, imported
from t5x_ext.cli.languages import known_language
from t5x_ext.cli.messages import UsageError

if TYPE_CHECKING:
    from t5x_ext.decode import DecodeConfig, Translator

_CONSTRAINTS = {"minimum_length": "MinimumLength", "no_repeat_ngrams": "NoRepeatNgrams"}
"""Flags of constraints, and the constraint that each stands for."""


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
    flags.DEFINE_integer(
        "mesh_fsdp", 1, "devices of this process among which the weights are sharded along their width; each further "
        "group of so many devices decodes lines of its own with weights of its own", lower_bound=1, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "mesh_tensor", 1, "devices among which single matrices are sharded, also while they are used", lower_bound=1,
        flag_values=values,
    )  # fmt: skip
    define_compile_cache_flag(values)


def define_decode_flags(values: flags.FlagValues) -> None:
    """Declares the options of decoding: fields of `DecodeConfig` and of the searches, with their defaults."""
    from t5x_ext.decode import DecodeConfig

    searches = _searches()
    flags.DEFINE_string(
        "strategy", "beam", f"how to search: {', '.join(searches)}, or the import path of another Search",
        flag_values=values,
    )  # fmt: skip
    for search in searches.values():
        define_field_flags(search, values)
    define_field_flags(DecodeConfig, values, ("max_length_ratio", "max_length_extra"))
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
    from t5x_ext.decode import DecodeConfig

    define_field_flags(DecodeConfig, values, ("max_source_length", "batch_tokens"))


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
    options: dict[str, Any] = {name: values[name].value for name in field_names(decode.DecodeConfig) if name in values}
    return decode.DecodeConfig(search=_search(values), constraints=constraints, **options)


def _searches() -> dict[str, type]:
    """The strategies that have flags, by name."""
    from t5x_ext.decode import Beam, Greedy, Sample

    return {search.__name__.lower(): search for search in (Beam, Greedy, Sample)}


def _search(values: flags.FlagValues) -> Any:
    """The search that `--strategy` names, with the flags that are its fields."""
    known, name = _searches(), values.strategy
    search = known[name] if name in known else imported(name, "--strategy", known)
    given = {name: values[name].value for kind in known.values() for name in field_names(kind) if values[name].present}
    own = field_names(search) if isinstance(search, type) else ()
    for flag in given:
        if flag not in own:
            raise UsageError(f"--{flag} does not go with --strategy={name}")
    return search(**given) if isinstance(search, type) else search


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
    mesh = make_mesh(MeshConfig(fsdp=values.mesh_fsdp, tensor=values.mesh_tensor), jax.local_devices())
    translators = [
        Translator.from_run(run_dir, values.checkpoint, mesh, fsdp_tensor())
        for run_dir in (values.run_dir, *values.ensemble)
    ]
    translator = Translator.ensemble(translators, values.ensemble_average) if values.ensemble else translators[0]
    translator.resolve(values.source_language, values.target_language)
    return translator
