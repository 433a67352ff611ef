"""What the tests of the launchers share: calling one, and programs that write down how they are called."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SHELLCHECK = Path(sys.executable).parent / "shellcheck"

_FAKE = """#!{python} -SE
import json, sys
called = json.load(open({log!r}))
answers = json.load(open({answers!r}))
called.append(["{name}", *sys.argv[1:]])
json.dump(called, open({log!r}, "w"))
status, text = answers.pop(0) if answers else (0, "")
json.dump(answers, open({answers!r}, "w"))
print(text)
sys.exit(status)
"""


def launch(launcher: ModuleType, *arguments: str) -> int:
    """Calls a launcher as its script does."""
    return launcher.run_script(launcher.define, launcher.main, f"{launcher.__name__}.py", launcher.__doc__, arguments)


class Programs:
    """Programs on the PATH that write down their arguments and answer as told."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self._folder = folder
        self._files = {name: folder / f"{name}.json" for name in ("log", "answers")}
        for file in self._files.values():
            file.write_text("[]")
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def add(self, *names: str) -> None:
        """Puts programs of these names on the PATH."""
        for name in names:
            program = self._folder / name
            files = {key: str(file) for key, file in self._files.items()}
            program.write_text(_FAKE.format(python=sys.executable, name=name, **files))
            program.chmod(0o755)

    def answer(self, *answers: tuple[int, str]) -> None:
        """Exit status and output of the coming calls; then 0 and nothing."""
        self._files["answers"].write_text(json.dumps(answers))

    @property
    def called(self) -> list[list[str]]:
        """All calls so far, each with the program's name first."""
        return json.loads(self._files["log"].read_text())


def check_shell(script: str, folder: Path) -> None:
    """Fails where bash cannot read a script, or shellcheck finds anything to say."""
    path = folder / "script.sh"
    path.write_text(script)
    for command in (["bash", "-n", path], [SHELLCHECK, "--shell=bash", path]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
