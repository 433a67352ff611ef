"""Tables, pictures and the page of results that are known."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib.image import imread
from study_stand_ins import Share

from t5x_ext.study import Arm, Budget, Results, Study
from t5x_ext.study.figures import pictures, styles
from t5x_ext.study.report import without_folders, write_report
from t5x_ext.study.statistics import Moments, Paired, Resampled
from t5x_ext.study.table import Cell, Choice, RunResult, show, to_json

ARMS = (
    Arm("adam", label="Adam <b>", family="adam"),
    Arm("flora_4", label="Flora, rank 4", family="flora", position=4),
    Arm("flora_16", label="Flora, rank 16 | x", family="flora", position=16),
    Arm("flora_64", family="flora", position=64),
)


@pytest.fixture
def results(tmp_path):
    """Losses and courses of four arms with three seeds, one of which has failed."""
    random = np.random.default_rng(0)
    study = Study(
        "Ranks & <tags>",
        ARMS,
        (0, 1, 2),
        budget=Budget(target_tokens=1e4),
        measurements=("valid/loss", "loss", Share()),
        baseline="adam",
        labels={"valid/loss": "held-out loss"},
        axis="rank",
    )
    runs = {}
    for number, arm in enumerate(ARMS):
        runs[arm.name] = {}
        for seed in study.seeds:
            path = f"arms/{arm.name}/seed_{seed}"
            if (arm.name, seed) == ("flora_64", 2):
                runs[arm.name][seed] = RunResult(path, "failed", f"{tmp_path}/deep/down/texts.gz: no such file")
                continue
            loss = 3 - 0.3 * number + random.normal(0, 0.1)
            (tmp_path / path).mkdir(parents=True)
            lines = [
                {"step": step, "loss": loss + 5 / step, "target_tokens": 100.0, "seconds": 1.0, "time/step": 1.0}
                for step in range(1, 20 + seed)
            ]
            (tmp_path / path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            command = f"t5x_ext train --run_dir={tmp_path}/{path} --gin.DATA_DIR=/srv/data/multi30k"
            right = np.stack([random.random(30) < 0.5 + 0.1 * number, np.ones(30)], axis=-1).astype(float)
            values = {"valid/loss": loss, "share": float(right[:, 0].mean())}
            lines = {"share": right}
            runs[arm.name][seed] = RunResult(path, "finished", "", command, 60.0, values, lines)
    choice = Choice((({"rate": 0.1}, 2.5), ({"rate": 0.2}, float("nan"))), higher_is_better=False, has_run=True)
    return Results(study, runs, {"adam": choice})


def test_the_page_is_whole_and_leads_nowhere(results, tmp_path):
    write_report(results, tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = ElementTree.fromstring(text.split("\n", 1)[1])
    assert text.startswith("<!DOCTYPE html>\n")
    assert page.find("head/title").text == "Ranks & <tags>"
    assert "http" not in text
    assert "file:" not in text
    assert str(tmp_path) not in text
    for name in ("src", "href"):
        assert all(one.get(name).startswith("data:image/png;base64,") for one in page.iter() if one.get(name))
    titles = [one.text for one in page.iter("h2")]
    assert titles == ["Arms", "Tuning", "Not finished", "Pictures", "Commands", "Versions and machine"]
    rows = [["".join(cell.itertext()) for cell in row] for row in page.find(".//table").iter("tr")]
    assert rows[0] == ["arm", "against", "seeds", "held-out loss", "share"]
    assert [row[:3] for row in rows[1:]] == [
        ["Adam <b>", "", "3"],
        ["Flora, rank 4", "Adam <b>", "3"],
        ["Flora, rank 16 | x", "Adam <b>", "3"],
        ["flora_64", "Adam <b>", "2 of 3"],
    ]
    commands = page.find(".//pre").text.splitlines()
    assert commands[0] == "t5x_ext train --run_dir=OUT/arms/adam/seed_0 --gin.DATA_DIR=.../multi30k"
    assert len(commands) == 11
    assert len(list(page.iter("img"))) == len(list((tmp_path / "figures").iterdir()))
    assert "Flora, rank 16 \\| x" in (tmp_path / "table.md").read_text()


def test_every_picture_shows_something(results, tmp_path):
    found = {picture.name: picture for picture in pictures(results, tmp_path)}
    assert list(found) == ["arms_valid_loss", "sweep_valid_loss", "arms_share", "sweep_share", "curve_loss"]
    assert found["curve_loss"].title == "loss over target tokens"
    for picture in found.values():
        pixels = imread(io.BytesIO(picture.png))[..., :3]
        assert (pixels.min(axis=2) < 0.9).mean() > 0.005
        # Colours that are not grey.
        assert (np.ptp(pixels, axis=2) > 0.3).any()


def test_a_family_has_one_colour_and_each_arm_its_own_look(results):
    look = styles(results.study)
    assert len({look[arm.name].colour for arm in ARMS[1:]}) == 1
    assert look["adam"].colour != look["flora_4"].colour
    many = Study("s", tuple(Arm(f"arm_{number}") for number in range(25)), (0,))
    assert len(set(styles(many).values())) == 25


def test_pictures_of_an_earlier_report_go(results, tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/arms_old.png").touch()
    write_report(results, tmp_path)
    assert not (tmp_path / "figures/arms_old.png").exists()


def test_numbers_of_the_table(results):
    found = to_json(results)
    arm = found["arms"][1]["values"]
    ours, theirs = (list(results.values(one, "valid/loss").values()) for one in (ARMS[1], ARMS[0]))
    assert arm["valid/loss"]["mean"] == pytest.approx(np.mean(ours))
    assert arm["valid/loss"]["difference"]["difference"] == pytest.approx(np.mean(np.subtract(ours, theirs)))
    assert arm["valid/loss"]["resampled"] is None
    share = arm["share"]
    assert share["resampled"]["low"] <= share["resampled"]["difference"] <= share["resampled"]["high"]
    assert share["difference"]["difference"] == pytest.approx(share["resampled"]["difference"])
    assert found["arms"][3]["values"]["valid/loss"]["difference"]["size"] == 2  # seeds that both have
    assert found["tuning"]["adam"] == {
        "tried": [{"settings": {"rate": 0.1}, "value": 2.5}, {"settings": {"rate": 0.2}, "value": None}],
        "chosen": {"rate": 0.1},
    }
    json.dumps(found, allow_nan=False)


def test_directions_that_only_one_of_two_has_are_in_no_difference():
    """An arm of two directions and one of one: their means differ by a half, their common direction by nothing."""
    right = lambda share: np.stack([np.arange(10) < 10 * share, np.ones(10)], axis=-1).astype(float)
    arms = (Arm("both"), Arm("one"))
    study = Study("s", arms, (0,), measurements=(Share(),), baseline="both")
    lines = {"both": {"share/a": right(0.2), "share/b": right(0.8)}, "one": {"share/a": right(0.2)}}
    values = {"both": {"share": 0.5, "share/a": 0.2, "share/b": 0.8}, "one": {"share": 0.2, "share/a": 0.2}}
    runs = {name: {0: RunResult("p", "finished", values=values[name], lines=lines[name])} for name in lines}
    cell = Results(study, runs).cell(arms[1], "share")
    assert (cell.moments.mean, cell.resampled.difference, cell.resampled.p_value) == (0.2, 0.0, 1.0)


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (Cell(None), ""),
        (Cell(Moments(3.14159, None, 1)), "3.142"),
        (Cell(Moments(31234.5, 120.0, 3)), "31,234 ± 120"),
        (Cell(Moments(3.14159, 0.01234, 3)), "3.142 ± 0.012"),
        (
            Cell(Moments(3.1, 0.1, 3), "a", Paired(-0.0312, 0.0081, 3, 0.0213, 0.25)),
            "3.10 ± 0.10 (-0.0312 ± 0.0081, p = 0.021)",
        ),
        (Cell(Moments(3.1, None, 1), "a", Paired(0.5, None, 1, None, None)), "3.100 (+0.500)"),
        (
            Cell(Moments(21.34, None, 1), "a", None, Resampled(1.25, 0.81, 1.62, 0.0001)),
            "21.34 (+1.25, +0.81 to +1.62, p < 0.001)",
        ),
        (Cell(Moments(0.0, 0.0, 2), "a", Paired(0.0, 0.0, 2, 1.0, 1.0)), "0.0 ± 0.0 (+0.0 ± 0.0, p = 1)"),
        (Cell(Moments(float("nan"), float("nan"), 2)), "nan ± nan"),
    ],
)
def test_cells_show_two_digits_of_the_error(cell, text):
    assert show(cell) == text


def test_paths_are_their_last_parts(tmp_path):
    text = without_folders(f"{tmp_path}/arms/a: '/etc/x/y.en' and a/b/c, rel/{tmp_path.name}, 1/2", tmp_path)
    assert text == f"OUT/arms/a: '.../y.en' and a/b/c, rel/{tmp_path.name}, 1/2"
    assert not re.search(r"(?<![.\w])/", text.replace("OUT/", ""))
