"""Writes a pretrained encoder of another project as a run folder, to start from or to embed texts with.

Reads BERT-like models: config.json, model.safetensors and a tokenizer, in a folder, a zip archive or an installed
package.

example: t5x_ext convert --source=package:all_minilm_l6_v2 --run_dir=minilm
"""

from __future__ import annotations

from absl import flags

from t5x_ext.cli.files import check_writable, report
from t5x_ext.cli.flags import require


def define_flags(values: flags.FlagValues) -> None:
    """Declares the flags of `t5x_ext convert`."""
    flags.DEFINE_string("source", None, "folder, zip archive or package:NAME; required", flag_values=values)
    flags.DEFINE_string("run_dir", None, "run folder to write; required", flag_values=values)
    flags.DEFINE_string("json_out", None, "file for the result as JSON; - is standard output", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Runs `t5x_ext convert`."""
    from t5x_ext.convert import import_encoder
    from t5x_ext.models import num_params

    require(values, "source", "run_dir")
    check_writable(values.json_out, "--json_out")
    config = import_encoder(values.source, values.run_dir)
    parameters = num_params(config)
    result = {"run_dir": values.run_dir, "parameters": parameters, "model": config.to_json()}
    text = f"{values.run_dir}: an encoder of {config.layers} layers x {config.embed_dim}, {parameters:,} parameters"
    report(text, result, values.json_out)
