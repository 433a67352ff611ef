"""Layouts of a small run on eight virtual devices: every one is listed, those compiled are ranked."""

from __future__ import annotations

import dataclasses
import json

import pytest

from t5x_ext.cli.gin_config import build_run
from t5x_ext.contracts import UserError
from t5x_ext.parallel import AxisRules, MeshConfig, fsdp, fsdp_tensor
from t5x_ext.plan import search as search_module
from t5x_ext.plan.report import DeviceMemory
from t5x_ext.plan.search import Candidate, candidates, search
from t5x_ext.plan.topology import Target, find_target

VOCAB_SIZE = 512


def target(devices: int, num_slices: int = 1, hardware=True) -> Target:
    from t5x_ext.parallel import HARDWARE

    figures = HARDWARE["h100"] if hardware else None
    return Target("h100", [None] * devices, "h100", figures, (devices,), num_slices, 80 * 10**9, is_compiled_for=False)


def test_candidates_use_all_devices_and_divide_rows_and_heads(make_run):
    found = list(candidates(make_run(rows=24), target(8)))
    assert len(found) == len(set(found))
    for candidate in found:
        mesh = candidate.mesh
        assert mesh.data * mesh.fsdp * mesh.tensor == 8
        assert mesh.tensor in (1, 2, 4)  # of four heads
        assert 24 % (mesh.data * mesh.fsdp * candidate.num_microbatches) == 0
        assert (candidate.rules == "fsdp_tensor") == (mesh.tensor > 1)
    assert Candidate(MeshConfig(1, 8, 1, 1), "fsdp", "none", 1) in found
    assert Candidate(MeshConfig(8, 1, 1, 1), "data_parallel", "full", 1) in found
    assert Candidate(MeshConfig(1, 2, 4, 1), "fsdp_tensor", "dots_saveable", 4) in found


def test_candidates_keep_the_axis_of_slices(make_run):
    assert {candidate.mesh.slices for candidate in candidates(make_run(), target(8, num_slices=2))} == {2}


def test_the_gin_lines_lay_out_the_run(make_run, tmp_path):
    candidate = Candidate(MeshConfig(2, 2, 2, 1), "fsdp_tensor", "full", 4)
    (tmp_path / "layout.gin").write_text(
        "\n".join(candidate.gin(build_run(["runs/vega_mt_4b7_v5e_8x8.gin"])[0])) + "\n"
    )
    run, _ = build_run(["runs/vega_mt_4b7_v5e_8x8.gin", str(tmp_path / "layout.gin")])
    assert (run.mesh, run.axis_rules) == (candidate.mesh, fsdp_tensor())
    assert (run.task.model.remat, run.num_microbatches) == ("full", 4)
    assert dataclasses.replace(candidate.apply(make_run()), optimizer=None).mesh == run.mesh


def test_what_cannot_be_searched_is_refused(make_run):
    with pytest.raises(UserError, match="the speed of h100 is not in the table"):
        search(make_run(), VOCAB_SIZE, target(8, hardware=False))
    with pytest.raises(UserError, match="no mesh of 7 devices divides it"):
        search(make_run(), VOCAB_SIZE, target(7))


@pytest.mark.devices(8)
def test_only_what_fits_is_ranked_the_fastest_first(make_run):
    run, lines = make_run(), []
    found = search(run, VOCAB_SIZE, find_target("h100:2"), 32, most_compiles=2, progress=lines.append)
    assert found.refused == ()
    assert [line.split(":")[0] for line in lines] == [f"compiling {n} of 2" for n in (1, 2)]
    # What the run is already comes first.
    assert lines[0] == "compiling 1 of 2: fsdp 2 none 2"
    seconds = [report.roofline.overlapped for _, report in found.fitting]
    assert [float(f"{s:.3g}") for s in seconds] == sorted(float(f"{s:.3g}") for s in seconds)
    as_json = json.loads(json.dumps(found.to_json()))
    assert as_json["fits"]
    assert as_json["search"]["compiled"] == len(as_json["search"]["fitting"]) == 2
    assert as_json["roofline_step_seconds"] == as_json["search"]["fitting"][0]["roofline_step_seconds"]
    text = str(found)
    assert text.startswith(f"{found.considered} layouts, 2 of them compiled, 2 fit")
    assert "train.Run.mesh = @parallel.MeshConfig()" in text


@pytest.mark.devices(8)
def test_what_does_not_fit_is_not_ranked(make_run, monkeypatch):
    tiny = dataclasses.replace(find_target("h100:2"), hbm_bytes=1000)
    found = search(make_run(), VOCAB_SIZE, tiny)
    assert (found.fitting, found.refused) == ((), ())
    assert found.to_json()["fits"] is False
    assert "take more devices" in str(found)

    def check(run, vocab_size, target, mean_length):
        memory = DeviceMemory(0, 0, 0, target.hbm_bytes + (run.num_microbatches == 1), 0)
        return dataclasses.replace(report, memory=memory, fits=run.num_microbatches > 1, advice=("more microbatches",))

    report = search_module.check(make_run(), VOCAB_SIZE, find_target("h100:2"))
    monkeypatch.setattr(search_module, "check", check)
    found = search(make_run(axis_rules=AxisRules(mlp="fsdp")), VOCAB_SIZE, find_target("h100:2"), most_compiles=9)
    assert len(found.fitting) + len(found.refused) == 9
    assert all(candidate.num_microbatches > 1 for candidate, _ in found.fitting)
    assert all(candidate.num_microbatches == 1 for candidate, _ in found.refused)
    refused = dataclasses.replace(found, fitting=())
    assert "more microbatches" in str(refused)
    assert refused.to_json()["search"]["gin"] == []


def test_a_candidate_changes_the_layout_only(make_run):
    run = make_run()
    laid_out = Candidate(MeshConfig(1, 8, 1, 1), "fsdp", "full", 8).apply(run)
    assert laid_out.axis_rules == fsdp()
    assert dataclasses.replace(laid_out.task.model, remat="none") == run.task.model
    assert laid_out.task.data == run.task.data
