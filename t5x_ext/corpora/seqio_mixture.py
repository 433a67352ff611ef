"""`SeqioMixture`: text of any registered seqio Task or Mixture; TensorFlow is imported when it is read, not before."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

from t5x_ext.contracts import UserError


@dataclass(frozen=True)
class SeqioMixture:
    """The raw text of a seqio Task or Mixture; satisfies `contracts.Corpus`.

    Text is read before seqio's tokenization (see `seqio_tasks.read_pairs`): vocabulary, lengths and mixing are this
    package's. A Mixture gives each example of its Tasks once and ignores its rates; to weigh Tasks against each
    other, give each as a corpus. Your own Tasks must be registered before: import their module.

    Attributes:
      name: the registered name; `t5x_ext.corpora.seqio_tasks` registers WMT14, 17, 19 and 22-style ones on TFDS.
      split: a split of its source (`train`, `validation`, `test`).
      source_language: language code of the first side.
      target_language: language code of the second side.
      source_feature: the feature that holds the first side.
      target_feature: the feature that holds the second side. Both may also be features of the source itself that a
        preprocessor renames later, such as `de` and `en`.

    Raises:
      UserError: for equal languages at once; on reading for an unknown name, split or feature, data that is not
        prepared or not UTF-8, or if the extra `seqio` is not installed.
    """

    name: str
    split: str = "train"
    source_language: str = "en"
    target_language: str = "de"
    source_feature: str = "inputs"
    target_feature: str = "targets"

    def __post_init__(self) -> None:
        if self.source_language == self.target_language:
            raise UserError(f"SeqioMixture {self.name!r}: source and target language are both {self.source_language!r}")

    @property
    def languages(self) -> tuple[str, str]:
        """Language codes of the two sides."""
        return self.source_language, self.target_language

    def pairs(self) -> Iterator[tuple[str, str]]:
        """The aligned texts, in the source's order; imports seqio and TensorFlow."""
        tasks = _import_tasks()
        yield from tasks.read_pairs(self.name, self.split, self.source_feature, self.target_feature)

    def fingerprint(self) -> str:
        """A hash of languages and text; reads everything, once an instance: a name does not tell what a Task does."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256("\t".join(self.languages).encode())
        for pair in self.pairs():
            digest.update("\n{}\n{}".format(*pair).encode())
        return digest.hexdigest()


def _import_tasks() -> ModuleType:
    try:
        from t5x_ext.corpora import seqio_tasks
    except ImportError as error:
        raise UserError(f"SeqioMixture needs seqio and TensorFlow: pip install 't5x_ext[seqio]' ({error})") from error
    return seqio_tasks
