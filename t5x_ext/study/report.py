"""What a study leaves for people: tables, pictures, and one HTML page that holds all of it and needs no other file."""

from __future__ import annotations

import base64
import html
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import t5x_ext
from t5x_ext.storage.files import write_json, write_text
from t5x_ext.study.figures import Picture, pictures
from t5x_ext.study.table import NOTE, Results, Table, markdown, tables, to_json

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy", "sacrebleu")
_ABSOLUTE = re.compile(r"(?<![\w/.:])/(?:[^\s/'\"=,;]+/)+(?=[^\s/'\"=,;]*)")

_CSS = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { border-bottom: 1px solid #8886; padding: 0.35rem 0.8rem 0.35rem 0; text-align: left; vertical-align: top; }
th { border-bottom-width: 2px; }
td { font-variant-numeric: tabular-nums; }
figure { margin: 1.5rem 0; }
img { background: white; height: auto; max-width: 100%; }
figcaption, .note { font-size: 0.9rem; opacity: 0.8; }
pre { background: #8882; font-size: 0.8rem; overflow-wrap: anywhere; padding: 0.6rem; white-space: pre-wrap; }
dt { font-weight: 600; } dd { margin: 0 0 0.4rem 0; }
"""


def write_report(results: Results, folder: Path) -> None:
    """Writes `table.json`, `table.md`, `figures/*.png` and `report.html`, each of which appears whole.

    Args:
      results: what the study has found.
      folder: of the study.
    """
    drawn = list(pictures(results, folder))
    found = [_without_folders(table, folder) for table in tables(results)]
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for old in (folder / "figures").glob("*.png"):
        if old.stem not in {picture.name for picture in drawn}:
            old.unlink()
    for picture in drawn:
        _write_bytes(folder / "figures" / f"{picture.name}.png", picture.png)
    facts = {**versions(), **machine(), **devices(results, folder)}
    write_json(folder / "table.json", {**to_json(results), "facts": facts})
    write_text(folder / "table.md", f"# {results.study.name}\n\n{markdown(found)}")
    write_text(folder / "report.html", page(results, found, drawn, facts, folder))


def versions() -> dict[str, str]:
    """Of Python, this package and those that decide a result."""
    found = {"python": platform.python_version(), "t5x_ext": t5x_ext.__version__}
    return found | {name: metadata.version(name) for name in _PACKAGES}


def machine() -> dict[str, str]:
    """What this machine is, without its name or any path."""
    found = {"system": f"{platform.system()} {platform.release()}", "processor": _processor()}
    if hasattr(os, "sched_getaffinity"):
        found["cores that may be used"] = f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory"] = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
    return found


def devices(results: Results, folder: Path) -> dict[str, str]:
    """What the runs have computed on, as they have recorded it; runs that were made elsewhere are listed, too."""
    found = []
    for run in (run for by_seed in results.runs.values() for run in by_seed.values()):
        record = _json(folder / run.path / "environment.json")
        kinds = record.get("devices")
        if isinstance(kinds, list) and kinds:
            threads = f", {record['cpu_threads']} threads" if kinds[0] == "cpu" and "cpu_threads" in record else ""
            found.append(f"{len(kinds)} x {kinds[0]}{threads}")
    return {"devices of the runs": "; ".join(dict.fromkeys(found))} if found else {}


def page(
    results: Results, found: Sequence[Table], drawn: Sequence[Picture], facts: Mapping[str, str], folder: Path
) -> str:
    """The report as HTML: styles and pictures are in it, and nothing in it leads out."""
    study = results.study
    title = html.escape(study.name)
    body = [f"<h1>{title}</h1>", f"<p>{html.escape(_summary(results))}</p>"]
    for number, table in enumerate(found):
        body += _table(table)
        body += [f'<p class="note">{html.escape(NOTE)}</p>'] if number == 0 else []
    body += ["<h2>Pictures</h2>"] if drawn else []
    for picture in drawn:
        data = base64.b64encode(picture.png).decode()
        caption = html.escape(picture.title)
        image = f'<img alt="{caption}" src="data:image/png;base64,{data}"/>'
        body.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    body += ["<h2>Commands</h2>", f"<pre>{html.escape(chr(10).join(_commands(results, folder)))}</pre>"]
    body += ["<h2>Versions and machine</h2>", "<dl>"]
    body += [f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items()]
    body.append("</dl>")
    head = f'<head><meta charset="utf-8"/><title>{title}</title><style>{_CSS}</style></head>'
    return f'<!DOCTYPE html>\n<html lang="en">\n{head}\n<body>\n{chr(10).join(body)}\n</body>\n</html>\n'


def _summary(results: Results) -> str:
    study = results.study
    runs = [run for by_seed in results.runs.values() for run in by_seed.values()]
    by_path = {run.path: run for run in runs}
    finished = [run for run in by_path.values() if run.state == "finished"]
    hours = sum(run.seconds for run in by_path.values()) / 3600
    budget = f"{study.budget.limit:,g} {study.budget.kind.replace('_', ' ')} a run, " if study.budget else ""
    time = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
    return (
        f"{len(study.arms)} arms, seeds {', '.join(map(str, study.seeds))}, {budget}"
        f"{len(finished)} of {len(by_path)} runs finished, {time} of all runs together."
    )


def _table(table: Table) -> Iterator[str]:
    yield f"<h2>{html.escape(table.title)}</h2>"
    yield '<div class="wide"><table>'
    yield f"<thead><tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in table.head)}</tr></thead><tbody>"
    for row in table.rows:
        yield f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>"
    yield "</tbody></table></div>"


def _commands(results: Results, folder: Path) -> Iterator[str]:
    by_path = {run.path: run for by_seed in results.runs.values() for run in by_seed.values() if run.command}
    for run in by_path.values():
        yield without_folders(run.command, folder)


def without_folders(text: str, folder: Path) -> str:
    """A text in which absolute paths are their last parts: a report tells what was done, not on whose disk.

    Args:
      text: a command or a message.
      folder: of the study, which becomes `OUT`.

    >>> without_folders("--run_dir=/home/me/out/arms/adam --gin.DATA_DIR=/data/multi30k", Path("/home/me/out"))
    '--run_dir=OUT/arms/adam --gin.DATA_DIR=.../multi30k'
    """
    for name in (str(folder.absolute()), str(folder)):
        text = re.sub(rf"(?<![\w/.]){re.escape(name)}(?![\w.])", "OUT", text)
    return _ABSOLUTE.sub(".../", text)


def _without_folders(table: Table, folder: Path) -> Table:
    return table._replace(rows=[[without_folders(cell, folder) for cell in row] for row in table.rows])


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _json(path: Path) -> dict[str, object]:
    import json

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_bytes(path: Path, content: bytes) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
