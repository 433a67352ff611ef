"""Parameters that a run only reads, by reference to the run that they are from."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from t5x_ext.checkpoints import trees
from t5x_ext.checkpoints.run_folder import RunFolder
from t5x_ext.checkpoints.store import CheckpointStore
from t5x_ext.contracts import Params, UserError, path_predicate
from t5x_ext.storage.digests import params_digest
from t5x_ext.storage.files import write_json
from t5x_ext.storage.remote import is_remote

BASE = "base"
"""The name of the parameters that a run with a trainable subset does not train."""


class Reference(NamedTuple):
    """Weights of another run, with a digest to check that they have not changed."""

    run_dir: str  # absolute, or an address
    step: int
    digest: str  # of the other run's weights
    rename: dict[str, str]  # from a regular expression on the other run's names to its replacement, in order
    only: tuple[str, ...]  # patterns on the new names of parameters to read; empty: all

    @classmethod
    def to_run(
        cls, folder: RunFolder, step: int, rename: Mapping[str, str] | None = None, only: tuple[str, ...] = ()
    ) -> tuple[Reference, dict[str, Any]]:
        """A reference to a checkpoint, and its parameters by their new names, as NumPy arrays."""
        params = run_params(folder, step)
        path = str(folder.path) if is_remote(folder.path) else os.path.abspath(folder.path)
        reference = cls(path, step, params_digest(params), dict(rename or {}), tuple(only))
        return reference, reference.taken(params)

    def params(self) -> dict[str, Any]:
        """The parameters by their new names, as NumPy arrays.

        Raises:
          UserError: if they are missing or have changed.
        """
        try:
            params = run_params(RunFolder(self.run_dir), self.step)
        except UserError as error:
            raise UserError(
                f"the weights that this run did not train are those of step {self.step} of {self.run_dir}, which must "
                f"not be moved: {error}"
            ) from error
        if params_digest(params) != self.digest:
            raise UserError(
                f"step {self.step} of {self.run_dir} has changed since a run was trained on top of it; restore it"
            )
        return self.taken(params)

    def taken(self, params: Params) -> dict[str, Any]:
        """Leaves of the other run under their new names, without those that are not asked for.

        Raises:
          UserError: if a pattern matches nothing, or two leaves get one name.
        """
        leaves = trees.flatten(params)
        some = f"it has {len(leaves)} parameters, as {', '.join(list(leaves)[:3])}"
        renamed: dict[str, Any] = {}
        unused = set(self.rename)
        for name, leaf in leaves.items():
            new = name
            for pattern, replacement in self.rename.items():
                changed = re.sub(pattern, replacement, new)
                unused -= {pattern} if changed != new else set()
                new = changed
            if new in renamed:
                raise UserError(f"{self.run_dir}: rename gives two parameters the name {new}")
            renamed[new] = leaf
        if unused:
            raise UserError(f"{self.run_dir}: rename finds no parameter called {min(unused)!r}; {some}")
        if not self.only:
            return renamed
        for pattern in self.only:
            if not any(map(path_predicate(pattern), renamed)):
                raise UserError(f"{self.run_dir}: only={pattern!r} finds no parameter; {some}")
        wanted = path_predicate(*self.only)
        return {name: leaf for name, leaf in renamed.items() if wanted(name)}

    def _found_from(self, folder: RunFolder) -> Reference:
        path = self.run_dir
        inside = not os.path.isabs(path) and not is_remote(path)
        return self._replace(run_dir=str(folder.path / path) if inside else path, only=tuple(self.only))

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return self._asdict() | {"only": list(self.only)}


def write_references(folder: RunFolder, references: Mapping[str, Reference]) -> None:
    """Records the parameters that a run only reads, by name; writes no file if there are none."""
    if references:
        folder.path.mkdir(parents=True, exist_ok=True)
        # Relative, because runs inside the folder move with it.
        inside = f"{os.path.abspath(folder.path)}/"
        records = {name: reference.to_json() for name, reference in references.items()}
        for record in records.values():
            record["run_dir"] = record["run_dir"].removeprefix(inside)
        write_json(folder.frozen_json, records)


def read_references(folder: RunFolder) -> dict[str, Reference]:
    """What `write_references` has recorded; an empty dictionary if there is no record.

    Raises:
      UserError: if the record is damaged.
    """
    if not folder.frozen_json.exists():
        return {}
    try:
        record = json.loads(folder.frozen_json.read_text())
        references = {name: Reference(**fields) for name, fields in record.items()}
        return {name: reference._found_from(folder) for name, reference in references.items()}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder.frozen_json} is damaged: {error!r}; restore it") from error


def run_params(folder: RunFolder, which: str | int = "best") -> Params:
    """All parameters of a run to decode or evaluate with, as NumPy arrays: their EMA if the run has one.

    Parameters that the run did not train are read from the runs that they are from.

    Args:
      folder: of the run.
      which: `best`, `last` or a step.

    Raises:
      UserError: if there is no such checkpoint, or the parameters that it was trained on top of are missing.
    """
    with CheckpointStore(folder.checkpoints) as store:
        trained = store.evaluation_params(store.checked_name(which))
    base = read_references(folder).get(BASE)
    if base is None:
        return trained
    part = trees.flatten(trained)
    rest = {name: leaf for name, leaf in base.params().items() if name not in part}
    return trees.nested(dict(sorted((rest | part).items())))
