"""Flags that are fields of dataclasses have the fields' types and defaults."""

from __future__ import annotations

import dataclasses

import pytest

from t5x_ext.cli import decoding, distributed_flags, vocab
from t5x_ext.cli.field_flags import FieldFlag, dataclass_fields, define_field_flags, field_values
from t5x_ext.cli.flags import help_text, parse
from t5x_ext.cli.messages import UsageError
from t5x_ext.data import VocabularyConfig
from t5x_ext.decode import Beam, DecodeConfig, Greedy, Sample
from t5x_ext.parallel import DistributedConfig, MeshConfig

SOURCES = [
    ("parallel.mesh", MeshConfig, ()),
    ("parallel.distributed", DistributedConfig, ()),
    ("data.vocabulary", VocabularyConfig, ("markers",)),
    ("decode.beam", Beam, ()),
    ("decode.sampling", Sample, ()),
    ("decode.config", DecodeConfig, ("search", "constraints")),
]


@pytest.mark.parametrize(("module", "config", "not_plain"), SOURCES, ids=lambda value: getattr(value, "__name__", ""))
def test_the_source_says_what_the_class_says(module, config, not_plain):
    read = dataclass_fields(module, config.__name__)
    fields = {field.name: field for field in dataclasses.fields(config) if field.name not in not_plain}
    assert {name: default for name, (_, default) in read.items()} == {
        name: field.default for name, field in fields.items()
    }


def test_flags_without_values_make_the_default_configuration():
    values = parse(distributed_flags.define_distributed_flags, [])
    assert DistributedConfig(**field_values(values, distributed_flags._FLAGS)) == DistributedConfig()
    values = parse(decoding.define_model_flags, [])
    assert MeshConfig(**field_values(values, decoding._MESH)) == MeshConfig()
    values = parse(vocab.define_flags, [])
    assert VocabularyConfig(**field_values(values, vocab._TRAINING)) == VocabularyConfig()


def test_options_of_decoding_have_a_flag_each():
    values = parse(decoding.define_decode_flags, [])
    for config in (Beam, Greedy, Sample, DecodeConfig):
        for field in dataclasses.fields(config):
            if field.name not in ("search", "constraints"):
                assert values[field.name].default == field.default


def test_types_choices_and_bounds():
    mesh = {"fsdp": FieldFlag("copies", name="mesh_fsdp", lower_bound=1), "tensor": FieldFlag("parts")}

    def define(values):
        define_field_flags(values, "parallel.mesh", "MeshConfig", mesh)
        define_field_flags(values, "data.vocabulary", "VocabularyConfig", vocab._TRAINING)

    values = parse(define, ["--mesh_fsdp=2", "--split_digits", "--model_type=bpe", "--character_coverage=0.99"])
    assert field_values(values, mesh) == {"fsdp": 2, "tensor": 1}
    assert (values.split_digits, values.model_type, values.character_coverage) == (True, "bpe", 0.99)
    for argument in ("--mesh_fsdp=0", "--model_type=word", "--character_coverage=2", "--size=many"):
        with pytest.raises(UsageError, match=argument):
            parse(define, [argument])
    assert "(default: 32768)" in help_text("vocab", "", define)
