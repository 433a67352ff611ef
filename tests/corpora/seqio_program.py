"""Run by test_seqio.py in a process of its own, so that TensorFlow stays out of the other tests: writes found.json."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from t5x_ext.contracts import UserError
from t5x_ext.corpora import seqio_tasks
from t5x_ext.corpora.seqio_mixture import SeqioMixture

folder = Path(sys.argv[1])
builder = tfds.folder_dataset.TranslateFolder(str(folder / "text"))


def folder_source(split, shuffle_files, seed=None):
    return builder.as_dataset(split=split, shuffle_files=shuffle_files)


source = seqio.FunctionDataSource(folder_source, splits=("train", "test"))
rekey = functools.partial(seqio.preprocessors.rekey, key_map={"inputs": "de", "targets": "en"})
absent = seqio.SentencePieceVocabulary(str(folder / "there-is-no-such-model"))
ids = {name: seqio.Feature(absent) for name in ("inputs", "targets")}
seqio_steps = [
    rekey,
    seqio.CacheDatasetPlaceholder(required=True),
    functools.partial(seqio.preprocessors.tokenize, with_eos=False),
    seqio.preprocessors.append_eos_after_trim,
]
seqio.TaskRegistry.add("folder_de_en", source=source, preprocessors=seqio_steps, output_features=ids)

numbers = {name: seqio.Feature(seqio.PassThroughVocabulary(size=0), dtype=tf.int32) for name in ("inputs", "targets")}


@seqio.map_over_dataset
def own_tokenizer(example):
    return {name: tf.cast(tf.strings.unicode_decode(text, "UTF-8"), tf.int32) for name, text in example.items()}


def not_reached(dataset):
    raise AssertionError("a step after tokenization was run")


@seqio.map_over_dataset
def mark(example):
    return {**example, "inputs": tf.strings.join(["<", example["inputs"], ">"])}


seqio.TaskRegistry.add(
    "own_de_en", source=source, preprocessors=[rekey, mark, own_tokenizer, not_reached], output_features=numbers
)


@seqio.map_over_dataset(num_seeds=1)
def noise(example, seed):
    number = tf.strings.as_string(tf.random.stateless_uniform([], seed, maxval=1000, dtype=tf.int32))
    return {**example, "inputs": tf.strings.join([example["inputs"], number])}


text = {name: seqio.Feature(seqio.PassThroughVocabulary(0), False, dtype=tf.string, rank=0) for name in numbers}
seqio.TaskRegistry.add("random_de_en", source=source, preprocessors=[rekey, noise], output_features=text)
seqio.MixtureRegistry.add("both_de_en", [("own_de_en", 1.0), ("random_de_en", 5.0)])


def bytes_source(split, shuffle_files, seed=None):
    rows = {"odd": (["a\nb\r\nc", "d\u2028e"], ["x", "y\rz"]), "broken": (["ok", b"\xff\xfe"], ["ok", "ok"])}
    return tf.data.Dataset.from_tensor_slices(dict(zip(("inputs", "targets"), rows[split])))


seqio.TaskRegistry.add(
    "bytes", source=seqio.FunctionDataSource(bytes_source, splits=("odd", "broken")), output_features=text
)


class Toy(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.Translation(("de", "en")))

    def _split_generators(self, manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number in range(3000):
            yield number, {"de": f"Zeile {number}", "en": f"line {number}"}


prepared = Toy(data_dir=folder / "tfds")
offline = tfds.download.DownloadConfig(try_download_gcs=False)
prepared.download_and_prepare(download_config=offline)
seqio_tasks.register_translation_task("toy_de_en", "toy:1.0.0", "de", "en", data_dir=str(folder / "tfds"))
seqio_tasks.register_translation_task("toy_absent", "toy:1.0.0", "de", "en", data_dir=str(folder / "nothing"))


def error_of(mixture):
    try:
        list(mixture.pairs())
    except UserError as error:
        return str(error)


corpus = SeqioMixture("folder_de_en", "train", "de", "en")
found = {}
found["train"] = [list(corpus.pairs()), list(corpus.pairs())]
found["test"] = list(SeqioMixture("folder_de_en", "test", "de", "en").pairs())
found["reversed"] = list(SeqioMixture("folder_de_en", "train", "en", "de", "en", "de").pairs())
found["own"] = list(SeqioMixture("own_de_en", "train", "de", "en").pairs())
found["random"] = [list(SeqioMixture("random_de_en", "train", "de", "en").pairs()) for _ in range(2)]
found["mixture"] = list(SeqioMixture("both_de_en", "train", "de", "en").pairs())
found["odd"] = list(SeqioMixture("bytes", "odd", "de", "en").pairs())
found["toy"] = [list(SeqioMixture("toy_de_en", "train", "de", "en").pairs()) for _ in range(2)]
found["fingerprints"] = [
    corpus.fingerprint(),
    SeqioMixture("folder_de_en", "train", "de", "en").fingerprint(),
    SeqioMixture("folder_de_en", "test", "de", "en").fingerprint(),
    SeqioMixture("folder_de_en", "train", "de", "nl").fingerprint(),
]
found["errors"] = [
    error_of(SeqioMixture("folder_de_em", "train", "de", "en")),
    error_of(SeqioMixture("folder_de_en", "valid", "de", "en")),
    error_of(SeqioMixture("folder_de_en", "train", "de", "en", source_feature="source")),
    error_of(SeqioMixture("bytes", "broken", "de", "en")),
    error_of(SeqioMixture("toy_absent", "train", "de", "en")),
]
found["registered"] = sorted(name for name in seqio.TaskRegistry.names() if name.startswith(("wmt", "para")))
found["mixtures"] = {
    name: [task.name for task in seqio.MixtureRegistry.get(name).tasks]
    for name in seqio.MixtureRegistry.names()
    if name.startswith("wmt")
}
found["wmt"] = [
    [
        task.source.tfds_dataset.name,
        list(task.source.splits),
        {k: v.dtype.name for k, v in task.output_features.items()},
    ]
    for task in [seqio.TaskRegistry.get("wmt14_translate_de_en"), seqio.TaskRegistry.get("wmt19_translate_fr_de")]
]
(folder / "found.json").write_text(json.dumps(found))
