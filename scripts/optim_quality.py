"""What the optimizers reach on real text, and how sharp the minima are in which they end: parts of bench_optim.py."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import multiprocessing
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optim_arms
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int
from optim_arms import Arm

from t5x_ext.contracts import Batch, Context, Objective, Params, UserError
from t5x_ext.corpora import aligned_files, read_lines
from t5x_ext.data import BatchConfig, DataConfig, TagPolicy, Vocabulary, VocabularyConfig, prepare, train_vocabulary
from t5x_ext.decode import DecodeConfig, Greedy, Translator
from t5x_ext.evaluate import bleu
from t5x_ext.models import EncoderDecoder, TransformerConfig, init_params, logical_axes
from t5x_ext.objectives import LabelSmoothedCrossEntropy
from t5x_ext.optim import linear_decay, mean_accumulator
from t5x_ext.train.state import create_state
from t5x_ext.train.step import make_evaluation_step, make_train_step

LANCZOS_STEPS = 20
"""Enough for three digits of the largest eigenvalue."""

LABELS = ("bad", "good")
"""What the model is to say of a sentence: words that both are one piece of the vocabulary."""


class ClassificationSizes(NamedTuple):
    """Sizes of the classification of sentences.

    Attributes:
      model: without the size of the vocabulary.
      vocab_size: pieces.
      length: of a row in tokens, end of sentence included; longer sentences are cut.
      rows: sentences of an update.
      num_examples: training sets to draw.
      updates: of a run on each of these; all are multiples of the fewest.
      seeds: of reported runs; each draws another training set, other initial weights and another order.
      tuning_seeds: of the runs that choose the learning rate; none of the reported ones.
      tuning_examples: size of their training sets, one of `num_examples`.
      held_out: sentences of the training file that nobody trains on; they choose the learning rate.
      curvature_examples: training sentences of the loss whose sharpness is measured.
    """

    model: TransformerConfig
    vocab_size: int = 4000
    length: int = 44
    rows: int = 32
    num_examples: tuple[int, ...] = (100, 300, 1000)
    updates: tuple[int, ...] = (200, 200, 400)
    seeds: tuple[int, ...] = tuple(range(6))
    tuning_seeds: tuple[int, ...] = (1000, 1001, 1002)
    tuning_examples: int = 300
    held_out: int = 1500
    curvature_examples: int = 256


class TranslationSizes(NamedTuple):
    """Sizes of the translation of captions.

    Attributes:
      model: without the size of the vocabulary.
      vocab_size: pieces.
      rows: of a batch.
      length: of a row in tokens, on both sides.
      updates: of a run.
      tuning_updates: of the runs that choose the learning rate; much shorter ones choose too large a rate.
      seeds: of initial weights and batches.
      gap_seeds: likewise of arms that a gap is measured of or to, and of those whose sharpness is measured.
      tuning_seed: of the runs that choose the learning rate; none of the others.
      decoded_lines: for BLEU.
    """

    model: TransformerConfig
    vocab_size: int = 3000
    rows: int = 12
    length: int = 80
    updates: int = 400
    tuning_updates: int = 200
    seeds: tuple[int, ...] = (0,)
    gap_seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seed: int = 1000
    decoded_lines: int = 100


class Sizes(NamedTuple):
    """Sizes of both tasks."""

    classification: ClassificationSizes
    translation: TranslationSizes


SIZES = Sizes(
    ClassificationSizes(TransformerConfig(embed_dim=64, mlp_dim=128, num_heads=4, encoder_layers=1, decoder_layers=1)),
    TranslationSizes(
        TransformerConfig(embed_dim=128, mlp_dim=256, num_heads=4, encoder_layers=2, decoder_layers=2, dropout=0.0)
    ),
)
_TINY = TransformerConfig(embed_dim=64, mlp_dim=64, num_heads=2, encoder_layers=1, decoder_layers=1)
QUICK_SIZES = Sizes(
    ClassificationSizes(_TINY, 300, 16, 8, (8, 16), (4, 4), (0, 1), (1000,), 8, 20, 8),
    TranslationSizes(_TINY, 300, 4, 32, 8, 4, (0,), (0, 1), 1000, 4),
)


class Sentences(NamedTuple):
    """Sentences with what they are labelled."""

    tokens: Int[np.ndarray, "sentences length"]
    lengths: Int[np.ndarray, " sentences"]
    labels: Int[np.ndarray, " sentences"]  # 0 or 1

    def take(self, chosen: Any) -> Sentences:
        """Some of them; an array of numbers of more axes gives axes more."""
        return Sentences(*(each[chosen] for each in self))


class Classification(NamedTuple):
    """The task: what to train on, and what all runs share."""

    config: TransformerConfig
    pool: Sentences  # training sets are drawn from
    held_out: Sentences
    dev: Sentences
    pieces: tuple[int, int]  # of the labels
    eos_id: int

    def batch(self, sentences: Sentences) -> Batch:
        """One sentence a row, the label and the end of sentence its target; leading axes are kept."""
        places = np.arange(sentences.tokens.shape[-1], dtype=np.int32)
        labels = np.asarray(self.pieces, np.int32)[sentences.labels]
        ends = np.full_like(labels, self.eos_id)
        target_positions = np.broadcast_to(np.arange(2, dtype=np.int32), (*labels.shape, 2))
        batch = {
            "source_tokens": sentences.tokens,
            "source_segment_ids": (places < sentences.lengths[..., None]).astype(np.int32),
            "source_positions": np.broadcast_to(places, sentences.tokens.shape),
            "target_inputs": np.stack([ends, labels], axis=-1),
            "target_labels": np.stack([labels, ends], axis=-1),
            "target_segment_ids": np.ones_like(target_positions),
            "target_positions": target_positions,
        }
        return cast(Batch, batch)  # the contract's arrays are JAX's; these become so when they are put on devices


def measure(part: str, sizes: Sizes, arms: Sequence[Arm], data_dir: Path, figures: Mapping[str, Any]) -> dict[str, Any]:
    """One part; `figures` holds those that were measured before it.

    Raises:
      UserError: for sharpness without the learning rates that the other two chose.
    """
    if part == "sst2":
        return sst2(sizes, arms, data_dir)
    if part == "multi30k":
        return multi30k(sizes, arms, data_dir)
    missing = [task for task in ("sst2", "multi30k") if task not in figures]
    if missing:
        raise UserError(
            f"sharpness needs the learning rates that {missing[0]} chooses: measure it, or give its --json_out"
        )
    return sharpness(sizes, arms, data_dir, {task: figures[task]["rates"] for task in ("sst2", "multi30k")})


def sst2(sizes: Sizes, arms: Sequence[Arm], data_dir: Path) -> dict[str, Any]:
    """Accuracy on SST-2 sentences of a small model trained from scratch on few of them.

    Arms that add to another one, or that differ in rank only, take its learning rate (`Arm.rate_of`).

    Returns:
      `lines`, an arm each: mean accuracy with its standard error, and the difference to Adam, paired by seeds, for
      every size of the training set; `runs`: the accuracies, percent, in the order of the seeds; `rates`: the chosen
      learning rates; `tuning`: errors on held-out sentences by learning rate, percent.
    """
    task, size = _classification(sizes.classification, data_dir), sizes.classification
    tuned = list(dict.fromkeys(arm.rate_of or arm.name for arm in arms))
    tuning = dict(zip(tuned, _side_by_side(_tune_classifier, [(name, size, task) for name in tuned])))
    rates = _best_rates(arms, tuning)
    runs = dict(zip(rates, _side_by_side(_classify, [(name, size, task, rate) for name, rate in rates.items()])))
    lines = []
    for name, accuracies in runs.items():
        line: dict[str, Any] = {"arm": name, "learning rate": rates[name]}
        for count, values in accuracies.items():
            line[f"{count} sentences"] = _mean_and_error(values)
            if "adam" in runs:
                line[f"{count}, to Adam"] = _mean_and_error(np.subtract(values, runs["adam"][count]), "+.1f")
        lines.append(line)
    return {"lines": lines, "runs": runs, "rates": rates, "tuning": tuning}


def sharpness(
    sizes: Sizes, arms: Sequence[Arm], data_dir: Path, rates: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """How sharp the training loss is where Adam, SAM and FSAM end, dropout off, on both tasks.

    Classifiers are those of the largest training set. They fit it, and where a loss is nearly zero so are its
    curvatures: of arms whose losses differ, only those of translation can be compared.

    Args:
      sizes: as those of `sst2`.
      arms: of which Adam and the family of SAM are measured.
      data_dir: as that of `sst2`.
      rates: by task, the learning rates that were chosen.

    Returns:
      `lines`, one a task and arm: the largest eigenvalue of the Hessian of the training loss, and by how much that loss
      rises at weights moved by RHO (and ten times that) in random directions and uphill; `runs`: the same by seed.
    """
    names = [arm.name for arm in arms if arm.family in ("adam", "sam")]
    sentences = _classification(sizes.classification, data_dir)
    jobs = [(name, sizes.classification, sentences, rates["sst2"][name]) for name in names]
    runs = {"sst2": dict(zip(names, _side_by_side(_classifier_sharpness, jobs)))}
    with tempfile.TemporaryDirectory() as folder:
        captions = _translation(sizes.translation, data_dir, folder)
        jobs = [(name, sizes.translation, captions, rates["multi30k"][name]) for name in names]
        runs["multi30k"] = dict(zip(names, _side_by_side(_translator_sharpness, jobs)))
    lines = [
        {"task": task, "arm": name} | {key: _mean_and_error([run[key] for run in each], ".3g") for key in each[0]}
        for task, by_name in runs.items()
        for name, each in by_name.items()
    ]
    return {"lines": lines, "runs": runs}


def multi30k(sizes: Sizes, arms: Sequence[Arm], data_dir: Path) -> dict[str, Any]:
    """Validation loss and BLEU of a small model after a short run from English to German captions.

    Every arm sees the same batches from the same initial weights. Learning rates are shared as in
    `sst2`, so that what is compared is nothing but what the arm adds.

    Returns:
      `lines`, an arm each, losses with the standard error over seeds; `gap` is to the uncompressed counterpart, paired
      by seeds; `runs`: losses (nats a token) and BLEU in the order of the seeds; `rates` and `tuning` as in `sst2`.
    """
    size = sizes.translation
    with_gap = {name for arm in arms if arm.counterpart for name in (arm.name, arm.counterpart)}
    with tempfile.TemporaryDirectory() as folder:
        task = _translation(size, data_dir, folder)
        tuned = list(dict.fromkeys(arm.rate_of or arm.name for arm in arms))
        tuning = dict(zip(tuned, _side_by_side(_tune_translation, [(name, size, task) for name in tuned])))
        rates = _best_rates(arms, tuning)
        jobs = [
            (name, size, task, rate, seed)
            for name, rate in rates.items()
            for seed in (size.gap_seeds if name in with_gap else size.seeds)
        ]
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in rates}
        for (name, *_), found in zip(jobs, _side_by_side(_translate, jobs)):
            runs[name].append(found)
    lines = []
    for arm in arms:
        losses, scores = ([run[key] for run in runs[arm.name]] for key in ("loss", "bleu"))
        line = {"arm": arm.name, "learning rate": rates[arm.name], "validation loss": _mean_and_error(losses, ".3f")}
        gap = ""
        if arm.counterpart in runs:
            others = [run["loss"] for run in runs[arm.counterpart]]
            gap = _mean_and_error(np.subtract(losses, others), "+.3f")
        lines.append(line | {"gap": gap, "BLEU": _mean_and_error(scores)})
    return {"lines": lines, "runs": runs, "rates": rates, "tuning": tuning}


class Training:
    """Runs of one arm on one model: compiled once, whatever the seed, the learning rate and the number of updates."""

    @classmethod
    @functools.cache
    def of(cls, name: str, config: TransformerConfig, updates: int) -> Training:
        """The one of an arm and a model, for runs of at most so many updates."""
        return cls(optim_arms.by_name(name), config, updates)

    def __init__(self, arm: Arm, config: TransformerConfig, updates: int):
        self._arm, self._config, self._updates = arm, config, updates
        self.objective = LabelSmoothedCrossEntropy(EncoderDecoder(config), label_smoothing=0.0)
        self.evaluate = jax.jit(make_evaluation_step(self.objective))
        self.first_scores = jax.jit(lambda params, batch: self.objective.logits(params, batch, Context(step=0))[:, 0])
        self._curvature = jax.jit(functools.partial(_curvature, self.objective))
        self._start = jax.jit(self._create_state)
        self._advance = jax.jit(self._scan, donate_argnums=0)

    def __call__(
        self, rate: float, seed: int, batches: Batch, every: int
    ) -> tuple[Params, Float[np.ndarray, " updates"]]:
        """Trains on all batches [updates, rows, ...], with warm-up in a tenth of the updates and linear decay.

        Args:
          rate: the largest learning rate.
          seed: of initial weights and dropout.
          batches: one an update, of all shapes the leading axis.
          every: updates that are given to the device at a time; it divides their number.

        Returns:
          The weights, and the mean loss of every update.
        """
        updates = len(batches["target_labels"])
        schedule = linear_decay(rate, warmup_steps=updates // 10, total_steps=updates)
        rates = np.zeros(self._updates, np.float32)
        # From 1: the first update of a run of a few moves too.
        rates[:updates] = [schedule(count) for count in range(1, updates + 1)]
        state, losses = self._start(seed, rates), []
        for start in range(0, updates, every):
            chunk = jax.tree.map(lambda array, start=start: array[start : start + every], batches)
            state, loss = self._advance(state, seed, rates, chunk)
            losses.append(loss)
        return state.params, np.concatenate(losses)

    def curvature(self, params: Params, batch: Batch, seed: int) -> dict[str, float]:
        """Sharpness of the loss of a batch; random directions follow the seed."""
        return {name: float(value) for name, value in self._curvature(params, batch, seed).items()}

    def _optimizer(self, rates: Float[Array, " updates"]) -> Any:
        return self._arm.make(lambda count: rates[count], logical_axes(self._config))

    def _create_state(self, seed: Array, rates: Array) -> Any:
        return create_state(init_params(self._config, jax.random.key(seed)), self._optimizer(rates), with_ema=False)

    def _scan(self, state: Any, seed: Any, rates: Array, batches: Batch) -> tuple[Any, Float[Array, " updates"]]:
        step = make_train_step(self.objective, self._optimizer(rates), mean_accumulator(), seed=seed)

        def update(state: Any, batch: Batch) -> tuple[Any, Array]:
            state, metrics = step(state, {}, batch)
            return state, metrics.loss.sum / metrics.loss.weight

        return jax.lax.scan(update, state, batches)


def _classification(size: ClassificationSizes, data_dir: Path) -> Classification:
    """Reads the sentences; the vocabulary is trained on those of the training file, and on the labels."""
    files = [_labelled(data_dir / "glue" / "SST-2-sentences" / f"{name}.tsv") for name in ("train", "dev")]
    texts = [text for text, _ in files[0]]
    vocabulary = train_vocabulary([*texts, *LABELS], size.vocab_size, ())
    pieces = vocabulary.encode(LABELS)
    if any(len(piece) != 1 for piece in pieces):
        raise ValueError(f"{LABELS} are not a piece each of a vocabulary of {vocabulary.size}")
    train, dev = (_sentences(file, vocabulary, size.length) for file in files)
    order = np.random.default_rng(0).permutation(len(files[0]))
    config = dataclasses.replace(size.model, vocab_size=vocabulary.size)
    held_out, pool = np.split(order, [size.held_out])
    return Classification(
        config, train.take(pool), train.take(held_out), dev, (int(pieces[0][0]), int(pieces[1][0])), vocabulary.eos_id
    )


def _labelled(path: Path) -> list[tuple[str, int]]:
    return [(text, int(label)) for label, text in (line.split("\t") for line in read_lines(str(path)))]


def _sentences(lines: Sequence[tuple[str, int]], vocabulary: Vocabulary, length: int) -> Sentences:
    tokens, lengths = np.zeros((len(lines), length), np.int32), np.zeros(len(lines), np.int32)
    for row, text in enumerate(vocabulary.encode([text for text, _ in lines])):
        ids = [*text[: length - 1], vocabulary.eos_id]
        tokens[row, : len(ids)], lengths[row] = ids, len(ids)
    return Sentences(tokens, lengths, np.array([label for _, label in lines], np.int32))


def _tune_classifier(name: str, size: ClassificationSizes, task: Classification) -> dict[float, float]:
    """Errors on held-out sentences by learning rate, percent."""
    errors = {}
    for rate in optim_arms.by_name(name).rates:
        weights = [
            _train_classifier(name, size, task, rate, seed, size.tuning_examples)[0] for seed in size.tuning_seeds
        ]
        errors[rate] = 100 - float(np.mean([_accuracy(name, size, task, params, task.held_out) for params in weights]))
        print(f"{name}: learning rate {rate:g} has {errors[rate]:.1f} % of errors", flush=True)
    return errors


def _classify(name: str, size: ClassificationSizes, task: Classification, rate: float) -> dict[int, list[float]]:
    """Accuracies by number of examples, in the order of the seeds."""
    found = {}
    for count in size.num_examples:
        weights = [_train_classifier(name, size, task, rate, seed, count)[0] for seed in size.seeds]
        found[count] = [_accuracy(name, size, task, params, task.dev) for params in weights]
        print(f"{name}, {count} sentences: {_mean_and_error(found[count])} %", flush=True)
    return found


def _train_classifier(
    name: str, size: ClassificationSizes, task: Classification, rate: float, seed: int, count: int
) -> tuple[Params, Sentences]:
    """Draws a training set and trains on it; the order of its sentences is another one in every epoch."""
    chooser = np.random.default_rng(seed)
    examples = task.pool.take(chooser.choice(len(task.pool.labels), count, replace=False))
    updates = size.updates[size.num_examples.index(count)]
    epochs = -(-updates * size.rows // count)
    order = np.concatenate([chooser.permutation(count) for _ in range(epochs)])[: updates * size.rows]
    batches = task.batch(examples.take(order.reshape(updates, size.rows)))
    training = Training.of(name, task.config, max(size.updates))
    return training(rate, seed, batches, every=min(size.updates))[0], examples


def _accuracy(
    name: str, size: ClassificationSizes, task: Classification, params: Params, sentences: Sentences
) -> float:
    """The percentage of sentences whose label is more probable than the other one."""
    scores = Training.of(name, task.config, max(size.updates)).first_scores(params, task.batch(sentences))
    says_one = scores[:, task.pieces[1]] > scores[:, task.pieces[0]]
    return 100 * float(np.mean(np.asarray(says_one) == sentences.labels))


def _classifier_sharpness(
    name: str, size: ClassificationSizes, task: Classification, rate: float
) -> list[dict[str, float]]:
    """Measures of one arm, a dictionary a seed."""
    training = Training.of(name, task.config, max(size.updates))
    found = []
    for seed in size.seeds:
        params, examples = _train_classifier(name, size, task, rate, seed, max(size.num_examples))
        batch = task.batch(examples.take(slice(size.curvature_examples)))
        found.append(training.curvature(params, batch, seed))
    print(f"{name}, sst2: {found}", flush=True)
    return found


def _translator_sharpness(name: str, size: TranslationSizes, task: Translation, rate: float) -> list[dict[str, float]]:
    """The same of translation, on the first batch of the training."""
    training = Training.of(name, task.config, size.updates)
    found = []
    for seed in size.gap_seeds:
        params, _ = training(rate, seed, task.batches[seed], size.tuning_updates // 4)
        found.append(training.curvature(params, jax.tree.map(lambda array: array[0], task.batches[seed]), seed))
    print(f"{name}, multi30k: {found}", flush=True)
    return found


def _curvature(objective: Objective, params: Params, batch: Batch, seed: Array) -> dict[str, Array]:
    """The largest eigenvalue of the Hessian of the mean loss, and rises of that loss around the weights."""
    weights, unravel = ravel_pytree(params)

    def loss(weights: Array) -> Array:
        total = objective(unravel(weights), batch, Context(step=0))
        return total.sum / total.weight

    gradient = jax.grad(loss)
    here, uphill = loss(weights), gradient(weights)
    directions = jax.random.normal(jax.random.key(seed), (10, weights.size))
    directions /= jnp.linalg.norm(directions, axis=1, keepdims=True)
    hessian = lambda vector: jax.jvp(gradient, (weights,), (vector,))[1]
    found = {"training loss": here, "largest eigenvalue": largest_eigenvalue(hessian, directions[0], LANCZOS_STEPS)}
    for radius in (optim_arms.RHO, 10 * optim_arms.RHO):
        found[f"random {radius:g}"] = jnp.mean(jax.lax.map(loss, weights + radius * directions)) - here
        found[f"uphill {radius:g}"] = loss(weights + radius * uphill / jnp.linalg.norm(uphill)) - here
    return found


def largest_eigenvalue(product: Callable[[Array], Array], start: Float[Array, " dim"], steps: int) -> Float[Array, ""]:
    """The largest eigenvalue of a symmetric matrix by Lanczos' method, every vector orthogonalised against all before.

    Args:
      product: multiplies a vector with the matrix.
      start: any vector that is not orthogonal to the eigenvector.
      steps: products that are taken; the eigenvalue is that of the matrix in the space that they span.
    """

    def step(basis: Array, number: Array) -> tuple[Array, Array]:
        image = product(basis[number])
        rest = image
        for _ in range(2):  # once leaves rounding errors that grow from step to step
            rest = rest - basis.T @ (basis @ rest)
        norm = jnp.linalg.norm(rest)
        basis = basis.at[number + 1].set(jnp.where(norm > 1e-6 * jnp.linalg.norm(image), rest / norm, 0.0))
        return basis, basis @ image

    basis = jnp.zeros((steps + 1, start.size)).at[0].set(start / jnp.linalg.norm(start))
    _, rows = jax.lax.scan(step, basis, jnp.arange(steps))
    matrix = rows[:, :steps]
    return jnp.linalg.eigvalsh((matrix + matrix.T) / 2)[-1]


class Translation(NamedTuple):
    """The task: batches of every seed, and what all runs share."""

    config: TransformerConfig
    vocabulary: str  # its folder
    batches: dict[int, Batch]  # by seed, [updates, rows, length]
    valid: Batch  # [batches, rows, length]
    lines: tuple[list[str], list[str]]  # to be translated, and their references


def _translation(size: TranslationSizes, data_dir: Path, folder: str) -> Translation:
    """Vocabulary and batches, made in the folder; every seed has an order of its own."""
    stems = (aligned_files(str(data_dir / "multi30k"), stem, "en", "de") for stem in ("train", "val"))
    train, valid = stems
    config = DataConfig(
        train=(train,),
        valid=(valid,),
        vocabulary=VocabularyConfig(size=size.vocab_size),
        batch=BatchConfig(size.rows, size.length, size.length, overlong="truncate"),
    )
    updates = dict.fromkeys((*size.seeds, *size.gap_seeds), size.updates) | {size.tuning_seed: size.tuning_updates}
    prepared = {seed: prepare(config, folder, seed=seed, num_processes=1) for seed in updates}
    batches = {seed: _stack([prepared[seed].batches[i] for i in range(count)]) for seed, count in updates.items()}
    first = prepared[size.seeds[0]]
    model = dataclasses.replace(size.model, vocab_size=first.vocabulary.size)
    pairs = [pair for pair, _ in zip(valid.pairs(), range(size.decoded_lines))]
    lines = [source for source, _ in pairs], [target for _, target in pairs]
    return Translation(model, f"{folder}/vocabulary", batches, _stack(list(first.valid_batches())), lines)


def _stack(batches: Sequence[Batch]) -> Batch:
    return jax.tree.map(lambda *arrays: np.stack(arrays), *batches)


def _tune_translation(name: str, size: TranslationSizes, task: Translation) -> dict[float, float]:
    """Validation losses of short runs by learning rate."""
    training = Training.of(name, task.config, size.updates)
    losses = {}
    for rate in optim_arms.by_name(name).rates:
        params, _ = training(rate, size.tuning_seed, task.batches[size.tuning_seed], size.tuning_updates // 4)
        losses[rate] = _valid_loss(training, params, task)
        print(f"{name}: learning rate {rate:g} gives {losses[rate]:.3f}", flush=True)
    return losses


def _translate(name: str, size: TranslationSizes, task: Translation, rate: float, seed: int) -> dict[str, Any]:
    """One reported run."""
    training = Training.of(name, task.config, size.updates)
    params, losses = training(rate, seed, task.batches[seed], size.tuning_updates // 4)
    translator = Translator(
        EncoderDecoder(task.config), params, Vocabulary.load(task.vocabulary), TagPolicy(), ("en-de",)
    )
    sources, references = task.lines
    hypotheses = translator.translate(sources, "en", "de", DecodeConfig(Greedy()))
    found = {
        "loss": _valid_loss(training, params, task),
        "bleu": bleu(hypotheses, references, "13a").value,
        "train": [round(float(loss), 4) for loss in losses[:: max(1, len(losses) // 60)]],
    }
    print(f"{name}, seed {seed}: validation loss {found['loss']:.3f}, BLEU {found['bleu']:.1f}", flush=True)
    return found


def _valid_loss(training: Training, params: Params, task: Translation) -> float:
    """Nats a token."""
    count = len(task.valid["target_labels"])
    losses = [
        training.evaluate(params, {}, (), 0, jax.tree.map(lambda array, i=i: array[i], task.valid))
        for i in range(count)
    ]
    return float(sum(loss.sum for loss in losses) / sum(loss.weight for loss in losses))


def _best_rates(arms: Sequence[Arm], tuning: Mapping[str, Mapping[float, float]]) -> dict[str, float]:
    """By arm the learning rate of the smallest loss, of its own or of the arm whose rate it takes."""

    def best(losses: Mapping[float, float]) -> float:
        return min(losses, key=lambda rate: (not np.isfinite(losses[rate]), losses[rate]))

    return {arm.name: best(tuning[arm.rate_of or arm.name]) for arm in arms}


def _side_by_side(function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
    """The results of all jobs in their order; every core that may be used does one at a time, in one thread."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) == 1:
        yield from (function(*job) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    free = context.SimpleQueue()
    for core in cores:
        free.put(core)
    with ProcessPoolExecutor(len(cores), context, _take_core, (free,)) as pool:
        yield from pool.map(function, *zip(*jobs))


def _take_core(free: Any) -> None:
    # Before JAX is asked for anything: it starts as many threads as there are cores.
    os.sched_setaffinity(0, {free.get()})


def moments(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and standard error; of a single value that is not known, and 0."""
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return float(np.mean(values)), float(error)


def _mean_and_error(values: Sequence[float] | np.ndarray, form: str = ".1f") -> str:
    """The mean, and its standard error where it is known."""
    mean, error = moments(values)
    return f"{mean:{form}}" + (f" ± {error:{form.lstrip('+')}}" if len(values) > 1 else "")


def made_up_data(folder: Path) -> None:
    """Writes a few lines in the places where the real data have theirs; labels and translations can be learned."""
    chooser = random.Random(0)
    words = {f"{a}{b}": f"{b}{a}n" for a in ("ka", "lo", "mi", "tu") for b in ("pe", "ri", "so", "da")}
    captions = folder / "multi30k"
    captions.mkdir(parents=True)
    for stem, count in (("train", 200), ("val", 20)):
        lines = [chooser.choices(list(words), k=chooser.randint(3, 8)) for _ in range(count)]
        for language, rendered in (("en", lines), ("de", [[words[word] for word in line] for line in lines])):
            text = "".join(" ".join(line) + "\n" for line in rendered)
            (captions / f"{stem}.{language}.gz").write_bytes(gzip.compress(text.encode()))
    sentences = folder / "glue" / "SST-2-sentences"
    sentences.mkdir(parents=True)
    for stem, count in (("train", 100), ("dev", 30)):
        labels = [chooser.randint(0, 1) for _ in range(count)]
        rows = [f"{label}\t{' '.join(chooser.choices(list(words), k=5))} {LABELS[label]}\n" for label in labels]
        (sentences / f"{stem}.tsv").write_text("".join(rows), encoding="utf-8")
