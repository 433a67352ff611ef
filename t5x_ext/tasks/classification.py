"""Classification of texts or pairs of texts: an encoder with a head, accuracy, F1 and Matthews' correlation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float

from t5x_ext.checkpoints import RunFolder, run_params
from t5x_ext.contracts import Batch, Frozen, Params, PyTree, UserError
from t5x_ext.corpora.labelled_text import Labelled, LabelledText, class_names, fingerprint, label_numbers
from t5x_ext.data.labelled import Examples, LabelledBatches, RowConfig, batch_arrays, in_order, where_examples_are
from t5x_ext.data.wordpiece import FILE, WordPiece
from t5x_ext.evaluate import classification_scores
from t5x_ext.models import (
    UNPLACED,
    Classifier,
    EncoderConfig,
    LayerParts,
    Placement,
    Pooling,
    config_from_json,
    init_params,
    logical_axes,
    model_to_json,
)
from t5x_ext.parallel import global_batch, host_rows, is_primary
from t5x_ext.tasks.held_out import HeldOutLoss
from t5x_ext.train.program import Program
from t5x_ext.train.task import ArraySpec, Definition, Evaluator

TASK = "classification"
"""What the record of such a run calls its task."""


@dataclass(frozen=True)
class Classification:
    """Classes of texts, or of pairs of texts (`train.Task`).

    Parameters of the head are called `head/...`, those of adapters have `adapter` in their names: a run that trains
    nothing else sets `Run.trainable = ("adapter", "^head/")`.

    Attributes:
      model: the encoder; the vocabulary size is taken from the tokenizer.
      train: examples to learn.
      valid: examples to measure on during training; None measures nothing.
      test: examples for the final test; None tests nothing.
      tokenizer: a folder with `tokenizer.json` or `vocab.txt`, a run folder for example; None takes that of the run
        whose weights this one starts from.
      batch: shape of a batch.
      parts: what the layers are made of, adapters for example.
      pooling: the vector of an example.
      classes: names of the classes in the order of their numbers; None takes the labels that occur in `train`, sorted.
        Any other label is a mistake.
    """

    model: EncoderConfig
    train: LabelledText
    valid: LabelledText | None = None
    test: LabelledText | None = None
    tokenizer: str | None = None
    batch: RowConfig = field(default_factory=RowConfig)
    parts: LayerParts = field(default_factory=LayerParts)
    pooling: Pooling = "first"
    classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        most = self.model.max_positions
        if most is not None and self.batch.length > most:
            raise UserError(f"RowConfig.length is {self.batch.length}, but the model has {most} positions")

    @property
    def rows(self) -> int:
        """Rows of a batch."""
        return self.batch.rows

    def starting_from(self, folder: RunFolder) -> Classification:
        """The same task with the tokenizer of a run whose weights it starts from."""
        return self if self.tokenizer else dataclasses.replace(self, tokenizer=str(folder.path))

    def define(self, sizes: Mapping[str, int], placement: Placement) -> Definition:
        """A classifier; `sizes` gives `vocab_size` and `classes`."""
        model = self.classifier(sizes, placement)
        arrays = {name: ArraySpec(shape) for name, shape in batch_arrays(self.batch).items()}
        if not self.model.token_types:
            del arrays["token_types"]
        return Definition(model, partial(init_params, model), logical_axes(model), arrays)

    def classifier(self, sizes: Mapping[str, int], placement: Placement | None = None) -> Classifier:
        """The model with the sizes that the data gives."""
        config = dataclasses.replace(self.model, vocab_size=sizes["vocab_size"])
        classes = sizes.get("classes", len(self.classes or ()) or 2)
        placement = UNPLACED if placement is None else placement
        return Classifier(config, parts=self.parts, classes=classes, pooling=self.pooling, placement=placement)

    def prepare(self, folder: RunFolder, cache_dir: str | None, seed: int) -> PreparedClassification:
        """Reads and tokenizes all examples; the tokenizer is kept in the run folder."""
        del cache_dir  # tables of labelled texts are small
        own = (folder.path / FILE).exists()
        if self.tokenizer is None and not own:
            raise UserError(
                "Classification.tokenizer is missing: give a folder with tokenizer.json, or start from the run folder "
                "of an encoder (Run.init_from)"
            )
        tokenizer = WordPiece.from_folder(self.tokenizer or folder.path)
        if is_primary():
            tokenizer.save(folder.path)
        return PreparedClassification(self, tokenizer, seed)


class PreparedClassification:
    """A classification task with its data (`train.Prepared`).

    Attributes:
      task: what is learned.
      tokenizer: of the texts.
      classes: names of the classes, in order.
      sizes: `vocab_size` and `classes`.
      batches: training batches.
    """

    def __init__(self, task: Classification, tokenizer: WordPiece, seed: int):
        """Reads the examples.

        Args:
          task: what is learned.
          tokenizer: of the texts.
          seed: of the order of training examples.
        """
        self.task, self.tokenizer = task, tokenizer
        read = task.train.read()
        self.classes = task.classes or class_names(read)
        if len(self.classes) < 2:
            raise UserError(
                f"{task.train.path}: all labels are {self.classes[0]!r}; a classification needs two or more"
            )
        self.sizes = {"vocab_size": tokenizer.size, "classes": len(self.classes)}
        self._wanted = [name for name in batch_arrays(task.batch) if name != "token_types" or task.model.token_types]
        description = {
            "train": fingerprint(read),
            "classes": list(self.classes),
            "tokenizer": tokenizer.fingerprint(),
            "batch": dataclasses.asdict(task.batch),
            "seed": seed,
        }
        examples = self._tokenized(read, task.train.path)
        work = lambda lengths: 3 * task.model.flops(lengths)
        self.batches = LabelledBatches(examples, task.batch, seed, description, work, self._wanted)
        self._valid = self._read(task.valid)
        self._test = self._read(task.test)

    @property
    def has_test(self) -> bool:
        """Whether there are test examples."""
        return self._test is not None

    def evaluators(self, program: Program) -> Sequence[Evaluator]:
        """Loss and scores on the validation examples; nothing without any."""
        return () if self._valid is None else (HeldOutClasses(program, self, self._valid),)

    def test(self, program: Program, params: Params) -> dict[str, Any]:
        """Scores on the test examples."""
        assert self._test is not None
        return {"examples": len(self._test.labels), **self.scores(program, params, self._test)}

    def record(self) -> dict[str, Any]:
        """Model, classes and shape of the input."""
        model = self.task.classifier(self.sizes)
        return {
            "task": TASK,
            "model": model_to_json(model),
            "classes": list(self.classes),
            "pooling": self.task.pooling,
            "length": self.task.batch.length,
            "texts": len(self.task.train.text_columns),
            "tokenizer": self.tokenizer.fingerprint(),
        }

    def scores(self, program: Program, params: Params, examples: Examples) -> dict[str, float]:
        """See `evaluate.classification_scores`; all processes get the same."""
        counts = np.zeros((len(self.classes),) * 2, np.int64)
        for batch in self.held_out(examples, *host_rows(program.mesh, self.task.rows)):
            program.check_interrupt()
            placed = global_batch(program.mesh, batch, set(self._wanted))
            counts += np.asarray(_confusion(program.model, params, placed)).astype(np.int64)
        return classification_scores(counts)

    def held_out(self, examples: Examples, start: int, stop: int) -> list[dict[str, np.ndarray]]:
        """All examples in their order, as rows `start` to `stop` of batches."""
        batches = in_order(examples, self.task.batch, start, stop)
        return [{name: batch[name] for name in self._wanted} for batch in batches]

    def _read(self, source: LabelledText | None) -> Examples | None:
        return None if source is None else self._tokenized(source.read(), source.path)

    def _tokenized(self, read: Sequence[Labelled], path: str) -> Examples:
        labels = np.array(label_numbers(read, self.classes, path), np.int32)
        return Examples(self.tokenizer.encode([example.texts for example in read], self.task.batch.length), labels)


class HeldOutClasses:
    """Loss, accuracy, F1 and Matthews' correlation on held-out examples: `valid/f1`, ... (`train.Evaluator`)."""

    name = "held-out classes"
    every = None

    def __init__(self, program: Program, prepared: PreparedClassification, examples: Examples):
        """Prepares the measurement of some examples."""
        self._program, self._prepared, self._examples = program, prepared, examples
        batches = lambda start, stop: prepared.held_out(examples, start, stop)
        self._loss = HeldOutLoss(program, batches, rows=prepared.task.rows)

    def __call__(self, params: Params, frozen: Frozen, mutable: PyTree, step: int) -> dict[str, float]:
        """Measures."""
        scores = self._prepared.scores(self._program, params, self._examples)
        named = {f"valid/{name}": value for name, value in scores.items()}
        return self._loss(params, frozen, mutable, step) | named


class TextClassifier:
    """A trained classification, ready to use.

    Attributes:
      classes: names of the classes, in the order of their numbers.
      texts: 1, or 2 if it classifies pairs.
    """

    def __init__(
        self,
        model: Classifier,
        params: Params,
        tokenizer: WordPiece,
        classes: Sequence[str],
        length: int,
        texts: int = 1,
    ):
        """Joins a model with what its texts go through.

        Args:
          model: the classifier.
          params: its parameters.
          tokenizer: of the texts.
          classes: names of the classes.
          length: tokens of a text that are read.
          texts: texts of an example.
        """
        self.classes, self.texts = tuple(classes), texts
        self._model, self._params, self._tokenizer = model, jax.tree.map(jnp.asarray, params), tokenizer
        self._rows = RowConfig(rows=16, length=length)

    @classmethod
    def from_run(cls, run_dir: epath.PathLike, checkpoint: str | int = "best") -> TextClassifier:
        """Opens the folder of a run.

        Raises:
          UserError: if it is of another task or damaged, or a part that its model needs is not built in.
        """
        folder = RunFolder(run_dir)
        record = folder.read_record()
        if record["task"] != TASK:
            raise UserError(f"{run_dir} is a run of the task {record['task']!r}, which classifies no texts")
        tokenizer = WordPiece.from_folder(folder.path)
        if tokenizer.fingerprint() != record["tokenizer"]:
            raise UserError(f"{folder.path / FILE} is not the tokenizer that the run was trained with; restore it")
        fields = dict(record["model"])
        parts = LayerParts.from_json(fields.pop("parts", {}))
        config: Any = config_from_json(fields)
        model = Classifier(config, parts=parts, classes=len(record["classes"]), pooling=record["pooling"])
        params = run_params(folder, checkpoint)
        return cls(model, params, tokenizer, record["classes"], record["length"], record["texts"])

    def predict(self, lines: Sequence[str | tuple[str, str]]) -> list[str]:
        """The most probable class of each text, or pair of texts."""
        return [self.classes[number] for number in np.argmax(self.probabilities(lines), axis=-1)]

    def probabilities(self, lines: Sequence[str | tuple[str, str]]) -> Float[np.ndarray, "lines classes"]:
        """The probability of each class for each text, or pair of texts; float32.

        Raises:
          UserError: if texts are given where it classifies pairs, or pairs where it classifies texts.
        """
        texts = [(line,) if isinstance(line, str) else tuple(line) for line in lines]
        for number, one in enumerate(texts):
            if len(one) != self.texts:
                wanted = "pairs of texts" if self.texts == 2 else "single texts"
                raise UserError(f"line {number} has {len(one)} texts; this model classifies {wanted}")
        found = np.zeros((len(texts), len(self.classes)), np.float32)
        examples = Examples(self._tokenizer.encode(texts, self._rows.length), np.zeros(len(texts), np.int32))
        batches = in_order(examples, self._rows) if texts else []
        for batch, (inside, numbers) in zip(batches, where_examples_are(examples, self._rows), strict=True):
            scores = np.asarray(_probabilities(self._model, self._params, batch))
            found[numbers] = scores[inside]
        return found


@partial(jax.jit, static_argnums=0)
def _probabilities(model: Classifier, params: Params, batch: Batch) -> Float[Array, "rows examples classes"]:
    scores: Any = model.apply({"params": params}, batch)
    return jax.nn.softmax(scores)


@partial(jax.jit, static_argnums=0)
def _confusion(model: Classifier, params: Params, batch: Batch) -> Float[Array, "classes classes"]:
    scores: Any = model.apply({"params": params}, batch)
    one_hot = lambda numbers: jax.nn.one_hot(numbers, model.classes)
    weights = (batch["target_segment_ids"] > 0).astype(jnp.float32)
    truth, predicted = one_hot(batch["target_labels"]) * weights[..., None], one_hot(jnp.argmax(scores, axis=-1))
    return jnp.einsum("rei,rej->ij", truth, predicted)
