"""Flags of the commands that open a run folder and decode with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from absl import flags

from t5x_ext.cli.compile_cache import define_compile_cache_flag, keep_compiled_programs
from t5x_ext.cli.languages import known_language

if TYPE_CHECKING:
    from t5x_ext.decode import DecodeConfig, Translator

_OPTIONS = (
    "strategy", "beam_size", "n_best", "length_penalty", "alpha", "max_length_ratio", "max_length_extra",
    "max_source_length", "batch_tokens", "temperature", "top_k", "top_p", "seed",
)  # fmt: skip


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
    about = "code, as de or zh; may be left out where the model has one direction that fits"
    flags.DEFINE_string("source_language", None, about, flag_values=values)
    flags.DEFINE_string("target_language", None, about, flag_values=values)
    flags.DEFINE_integer(
        "mesh_fsdp", 1, "devices of this process among which the weights are cut along their width; what devices "
        "are left decode lines of their own with weights of their own", lower_bound=1, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "mesh_tensor", 1, "devices among which single matrices are cut and stay cut", lower_bound=1, flag_values=values
    )
    define_compile_cache_flag(values)


def define_decode_flags(values: flags.FlagValues) -> None:
    """Declares the options of decoding, with the defaults of `DecodeConfig`."""
    flags.DEFINE_enum("strategy", "beam", ["beam", "greedy", "sample"], "how to search", flag_values=values)
    flags.DEFINE_integer("beam_size", 5, "hypotheses kept in beam search", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("n_best", 1, "translations for each line", lower_bound=1, flag_values=values)
    flags.DEFINE_enum(
        "length_penalty", "fairseq", ["fairseq", "gnmt"], "what a score is divided by: length**alpha, or "
        "((5 + length) / 6)**alpha", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_float("alpha", 1.0, "exponent of the length penalty", lower_bound=0.0, flag_values=values)
    flags.DEFINE_float(
        "max_length_ratio", 3.0, "a translation has at most this many tokens a source token", lower_bound=0.0,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer("max_length_extra", 20, "and so many more", lower_bound=0, flag_values=values)
    define_batching_flags(values)
    flags.DEFINE_float("temperature", 1.0, "of sampling", lower_bound=0.0, flag_values=values)
    flags.DEFINE_integer(
        "top_k", 0, "sample from the k most probable tokens; 0 is all", lower_bound=0, flag_values=values
    )
    flags.DEFINE_float(
        "top_p", 1.0, "sample from the fewest tokens that reach this probability", lower_bound=0.0, upper_bound=1.0,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer("seed", 0, "of sampling", flag_values=values)


def define_batching_flags(values: flags.FlagValues) -> None:
    """Declares how source lines are cut and batched, for decoding and for scoring."""
    flags.DEFINE_integer("max_source_length", 512, "tokens beyond are cut", lower_bound=4, flag_values=values)
    flags.DEFINE_integer(
        "batch_tokens",
        None,
        "padded source tokens a batch; by default what suits the device",
        lower_bound=1,
        flag_values=values,
    )


def decode_config(values: flags.FlagValues) -> DecodeConfig:
    """The options that the flags give.

    Raises:
      UserError: for options that do not go together.
    """
    from t5x_ext.decode import DecodeConfig

    options: dict[str, Any] = {name: getattr(values, name) for name in _OPTIONS}
    return DecodeConfig(**options)


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
