"""Translation Tasks on TFDS sources, registered on import, and reading any seqio Task as lines of text.

The only module that imports TensorFlow; nothing but `SeqioMixture` imports it, and only when its text is read.

Tasks hold raw text: `inputs` and `targets` are strings, one Task a language pair, since training reverses pairs
itself. Names are `wmt14_translate_de_en` (also cs, fr, hi, ru), `wmt17_translate_...` (cs, de, fi, lv, ru, tr, zh),
`wmt19_translate_...` (cs, de, fi, gu, kk, lt, ru, zh; fr_de) and `para_crawl_...` (cs, de). The Mixtures
`wmt22_translate_{cs,de,ru,zh}_en` join what TFDS has of a WMT22 system's data: the newest WMT release and, where there
is one, ParaCrawl. TFDS has no Japanese WMT data.

Reading never downloads: prepare a dataset once with `tfds build wmt19_translate/de-en`.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import seqio
import tensorflow as tf

from t5x_ext.contracts import UserError

# Text is read on the host; otherwise TensorFlow takes the accelerator's memory from JAX. TensorFlow refuses this call
# after its own start; then the importing program has made the choice.
with contextlib.suppress(RuntimeError):
    tf.config.set_visible_devices([], "GPU")

_TOKENIZERS = (seqio.preprocessors.tokenize, seqio.preprocessors.tokenize_and_append_eos)
_SEED = 0
_BATCH = 1024  # examples fetched from tf.data at once, for speed only

_TEXT = seqio.Feature(seqio.PassThroughVocabulary(size=0), add_eos=False, dtype=tf.string, rank=0)


def register_translation_task(
    name: str,
    tfds_name: str,
    source_language: str,
    target_language: str,
    *,
    splits: Sequence[str] | None = None,
    data_dir: str | None = None,
) -> seqio.Task:
    """Registers a seqio Task that reads a TFDS translation dataset as raw text.

    Args:
      name: of the Task.
      tfds_name: a TFDS dataset whose features are named by language, with its version as seqio demands:
        `wmt19_translate/de-en:1.0.0`.
      source_language: name of the feature that becomes `inputs`.
      target_language: name of the feature that becomes `targets`.
      splits: names of its splits; None asks the prepared dataset.
      data_dir: where the dataset was prepared; None for TFDS's default folder.

    Returns:
      The Task, for use in Mixtures.
    """
    return seqio.TaskRegistry.add(
        name,
        source=seqio.TfdsDataSource(tfds_name, tfds_data_dir=data_dir, splits=splits, read_only=True),
        preprocessors=[
            functools.partial(
                seqio.preprocessors.rekey, key_map={"inputs": source_language, "targets": target_language}
            )
        ],
        output_features={"inputs": _TEXT, "targets": _TEXT},
    )


def read_pairs(name: str, split: str, source_feature: str, target_feature: str) -> Iterator[tuple[str, str]]:
    """The text of a registered Task or Mixture, each example once, in the source's own order.

    A Task is read through its preprocessors up to the last step at which both features are scalar strings: steps from
    tokenization on are not run, so no seqio vocabulary is loaded and no length limit applies. Offline caches are not
    used. Random preprocessors get a fixed seed. The Tasks of a Mixture follow one another by name, each
    once: its rates do not apply, because the batch plan mixes.

    Args:
      name: of the Task or Mixture; if both have this name, the Mixture, as in seqio.
      split: a split of the source.
      source_feature: name of the first text feature, at any step before tokenization.
      target_feature: name of the second.

    Yields:
      The two texts, line ends within them turned into spaces.

    Raises:
      UserError: no such name, split or feature; data that is not prepared or not UTF-8.
    """
    for task in _tasks(name, split):
        dataset = _text_dataset(task, split, (source_feature, target_feature))
        for number, (source, target) in enumerate(_examples(task, dataset)):
            where = f"{task.name} [{split}] example {number}"
            yield _line(source, f"{where}, {source_feature}"), _line(target, f"{where}, {target_feature}")


def _tasks(name: str, split: str) -> list[seqio.Task]:
    names = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if name not in names:
        near = difflib.get_close_matches(name, sorted(names), n=3, cutoff=0.4)
        hint = f"the nearest are {', '.join(near)}" if near else f"{len(names)} others are"
        raise UserError(f"seqio has no Task or Mixture {name!r} registered; {hint}")
    tasks = seqio.get_subtasks(seqio.get_mixture_or_task(name))
    # A TFDS source knows no splits before its data is prepared; reading reports that.
    with_split = [task for task in tasks if split in task.source.splits or not task.source.splits]
    if not with_split:
        splits = sorted({split for task in tasks for split in task.source.splits})
        raise UserError(f"{name!r} has no split {split!r}; it has {', '.join(splits)}")
    return with_split


def _text_dataset(task: seqio.Task, split: str, features: tuple[str, str]) -> tf.data.Dataset:
    """The latest step of a task's preprocessing at which both features are text, as (source, target) bytes."""
    text = None
    seen: set[str] = set()
    for dataset in _steps(task, split):
        here = _text_features(dataset)
        seen |= here
        if here.issuperset(features):
            text = dataset
        elif text is not None:
            break
    if text is None:
        raise UserError(
            f"{task.name!r} has no text features {features[0]!r} and {features[1]!r} at one step before tokenization; "
            f"its text features are {', '.join(sorted(seen)) or 'none'}"
        )
    return text.map(lambda example: (example[features[0]], example[features[1]]))


def _steps(task: seqio.Task, split: str) -> Iterator[tf.data.Dataset]:
    """The source, then the data after each preprocessor, up to seqio's tokenizers."""
    dataset = _source_dataset(task, split)
    yield dataset
    with seqio.utils.map_seed_manager(_SEED):
        for step in task.preprocessors:
            if _unwrapped(step) in _TOKENIZERS:
                return
            if not isinstance(step, seqio.CacheDatasetPlaceholder):
                transform = seqio.utils.add_kwargs_to_transform(
                    step, sequence_length=None, output_features=task.output_features
                )
                dataset = transform(dataset)
                yield dataset


def _source_dataset(task: seqio.Task, split: str) -> tf.data.Dataset:
    try:
        return task.source.get_dataset(split=split, shuffle=False, seed=_SEED)
    except AssertionError as error:
        if not isinstance(task.source, seqio.TfdsDataSource):
            raise
        # TFDS asserts that there is data.
        dataset = task.source.tfds_dataset.name
        raise UserError(f"the data of {task.name!r} is not prepared: run `tfds build {dataset}` once") from error


def _unwrapped(step: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(step, functools.partial):
        step = step.func
    return step


def _text_features(dataset: tf.data.Dataset) -> set[str]:
    spec = dataset.element_spec
    if not isinstance(spec, dict):
        return set()
    return {name for name, value in spec.items() if value.dtype == tf.string and value.shape.rank == 0}


def _examples(task: seqio.Task, dataset: tf.data.Dataset) -> Iterator[tuple[bytes, bytes]]:
    options = tf.data.Options()
    options.deterministic = True
    for sources, targets in dataset.batch(_BATCH).with_options(options).as_numpy_iterator():
        yield from zip(sources, targets)


def _line(text: bytes, where: str) -> str:
    try:
        line = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8: {error.reason} at byte {error.start}") from error
    return line.replace("\r\n", " ").replace("\n", " ").replace("\r", " ")


def _register_wmt() -> None:
    years: dict[str, tuple[str, tuple[str, ...]]] = {
        "wmt14": ("cs de fr hi ru", ("train", "validation", "test")),
        "wmt17": ("cs de fi lv ru tr zh", ("train", "validation", "test")),
        "wmt19": ("cs de fi gu kk lt ru zh", ("train", "validation")),
    }
    for year, (languages, splits) in years.items():
        for language in languages.split():
            dataset = f"{year}_translate/{language}-en:1.0.0"
            register_translation_task(f"{year}_translate_{language}_en", dataset, language, "en", splits=splits)
    register_translation_task("wmt19_translate_fr_de", "wmt19_translate/fr-de:1.0.0", "fr", "de", splits=splits)
    for language in ("cs", "de"):
        dataset = f"para_crawl/en{language}:1.2.0"
        register_translation_task(f"para_crawl_{language}_en", dataset, language, "en", splits=("train",))
    for language, crawled in (("cs", True), ("de", True), ("ru", False), ("zh", False)):
        tasks = [f"wmt19_translate_{language}_en", *([f"para_crawl_{language}_en"] if crawled else [])]
        seqio.MixtureRegistry.add(f"wmt22_translate_{language}_en", tasks, default_rate=seqio.mixing_rate_num_examples)


_register_wmt()
