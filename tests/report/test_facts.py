"""The facts of a report: what is taken from a job or a result, and what follows from it."""

import json
import math
import random
import statistics

import pytest
import sheets
import torch

import secateur as sc
from secateur import report
from secateur.errors import FormatError, InputError
from secateur.figures import plain
from secateur.report.facts import SECTIONS


@pytest.fixture(scope="module")
def result():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.ReLU(), torch.nn.Linear(12, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    return sc.prune(model, (torch.randn(2, 6),), sc.MACs(at_most="60%"))


def test_a_result_gives_its_costs_groups_frozen_axes_and_proof(result):
    sheet = report.facts(result)
    cost = {row["figure"]: row for row in sheet["cost"]}
    assert cost["macs"]["dense"] == result.before.macs and cost["macs"]["pruned"] == result.after.macs
    assert cost["macs"]["share"] == result.after.macs / result.before.macs
    assert {row["name"]: (row["before"], row["after"]) for row in sheet["groups"]} == {
        name: (len(mask), int(mask.sum())) for name, mask in result.plan.keep.items()
    }
    assert sheet["cut_groups"] == {"all": len(result.plan.keep), "cut": len(result.plan.removed)}
    assert sum(row["axes"] for row in sheet["frozen"]) == len(result.graph.frozen) > 0
    assert sheet["proof"]["passed"] is True and sheet["proof"]["max_error"] == result.proof.max_error
    assert sheet["settings"]["score"] == result.plan.why["score"]
    (target,) = sheet["targets"]
    assert target["asked"] == "MACs at most 60%" and target["met"] is True
    assert target["used"] == pytest.approx(result.after.macs / target["limit"])
    assert sheet["hardware"]["torch"] == torch.__version__ and sheet["hardware"]["cores"] >= 1


def test_the_json_of_a_job_gives_the_same(result):
    sheet = report.facts(sheets.JOB)
    stages = {row["stage"]: row for row in sheet["accuracy"]["stages"]}
    assert stages["repaired"]["points"] == pytest.approx(-0.75) and stages["dense"]["points"] is None
    assert [row["used"] for row in sheet["targets"]] == [62_703_104 / 62_742_848, 401_233 / 450_000]
    assert "groups" not in sheet and "latency" not in sheet, "what is not known has no section"


def test_what_a_job_calls_repaired_is_batch_norm_until_a_layer_was_repaired():
    job = {**sheets.JOB, "accuracy": {"dense": 0.9, "cut": 0.3, "repaired": 0.7}}
    assert [s["stage"] for s in report.facts(job)["accuracy"]["stages"]] == ["dense", "cut", "batch_norm"]
    job["repairs"] = sheets.repairs(2, random.Random(0))
    assert [s["stage"] for s in report.facts(job)["accuracy"]["stages"]] == ["dense", "cut", "repaired"]


def test_rows_of_repair_are_understood():
    row = {"layer": "a", "rows": 64, "plain": 0.5, "bias": 0.4, "repaired": 0.6, "used": "bias", "why": "worse on held-out rows"}
    (found,) = report.facts(None, repairs=[row])["repairs"]
    assert (found["error_cut"], found["error_repaired"], found["held_out"]) == (0.5, 0.6, True)
    page = report.render(report.facts(None, repairs=[row]))
    assert "bias used; worse on held-out rows" in page


@pytest.mark.parametrize("used, met", [(0.99, True), (1.0, True), (1.04, "within 5 %"), (1.06, False)])
def test_a_measured_target_counts_as_reached_within_its_noise(used, met):
    row = {"target": "Latency(at_most='60%', runtime='onnxruntime')", "figure": "latency", "asked": "60%", "limit": 0.006, "dense": 0.01,
           "achieved": 0.006 * used, "ratio": 0.6 * used, "ratio_spread": 0.01, "share": used, "settings": {"runtime": "onnxruntime"}}  # fmt: skip
    job = {**sheets.JOB, "why": {**sheets.JOB["why"], "achieved": [row]}}
    (found,) = report.facts(job)["targets"]
    assert found["met"] == met and found["asked"] == "Latency at most 60% on onnxruntime" and found["used"] == used


def test_latency_samples_get_their_quartiles():
    samples = [0.5, 0.1, 0.4, 0.2, 0.3, math.nan]
    (row,) = report.facts(None, latency=[{"runtime": "torch", "dense": samples, "pruned": [0.1]}])["latency"]
    low, middle, high = statistics.quantiles([0.1, 0.2, 0.3, 0.4, 0.5], n=4, method="inclusive")
    assert (row["dense"]["low"], row["dense"]["median"], row["dense"]["high"], row["dense"]["rounds"]) == (low, middle, high, 5)
    assert row["pruned"]["median"] == 0.1
    assert row["ratio"] == pytest.approx(1 / 3) and row["speedup"] == pytest.approx(3)
    (paired,) = report.facts(None, latency=[{"runtime": "torch", "dense": samples, "pruned": [0.1], "ratio": 0.25}])["latency"]
    assert paired["ratio"] == 0.25 and paired["speedup"] == 4


def test_facts_are_plain_json_and_come_back():
    for sheet in (sheets.full(), sheets.unmeasured(), report.facts()):
        sheet = plain(sheet)
        assert json.loads(json.dumps(sheet, allow_nan=False)) == sheet
        assert set(sheet) <= set(SECTIONS)


def test_completing_facts_again_changes_nothing():
    sheet = sheets.full()
    assert report.facts(None, **sheet) == sheet


def test_what_is_not_finite_is_null_and_tensors_become_lists():
    sheet = report.facts(None, accuracy={"dense": math.nan, "cut": 0.5}, sensitivity=[{"group": "a", "points": torch.tensor([1.0, math.inf])}])
    assert sheet["accuracy"]["stages"][0]["value"] is None and sheet["accuracy"]["stages"][1]["points"] is None
    assert sheet["sensitivity"][0]["points"] == [1.0, None]


def test_an_unknown_section_and_a_strange_object_are_refused():
    with pytest.raises(InputError, match=r"no section 'acuracy'.\n  Its sections: format, model"):
        report.facts(None, acuracy={})
    with pytest.raises(InputError, match=r"facts\(\) got a int.\n  Pass a Job"):
        report.facts(3)


# ---------------------------------------------------------------- files
def test_written_read_and_rewritten(tmp_path):
    sheet = sheets.full()
    page = report.write(tmp_path / "out", sheet)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.html", "report.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "no temporary files are left"
    assert report.read(tmp_path / "out") == sheet == report.read(tmp_path / "out" / "report.json")
    text = page.read_text(encoding="utf-8")
    page.unlink()
    assert report.rewrite(tmp_path / "out") == page and page.read_text(encoding="utf-8") == text


def test_a_full_disk_leaves_the_old_report(tmp_path, monkeypatch):
    page = report.write(tmp_path / "out", sheets.full(3))
    before = {p.name: p.read_bytes() for p in page.parent.iterdir()}

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.files, "sync", full)
    with pytest.raises(FormatError, match=r"report could not be written into .*out: No space left"):
        report.write(tmp_path / "out", sheets.full(4))
    assert {p.name: p.read_bytes() for p in page.parent.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("text, said", [("", "cut short"), ("[1]", "holds a list"), ("[" * 100_000, "cannot be read"), ("{}", "format None"),
                                        ('{"format": "secateur-report/9"}', "format 'secateur-report/9'"),
                                        ('{"format": "secateur-report/1", "cost": 3}', "section 'cost'"),
                                        ('{"format": "secateur-report/1", "groups": [{"before": "x"}, 4]}', "section 'layers'"),
                                        ('{"format": "secateur-report/1", "proof": [1]}', "section 'proof'")])  # fmt: skip
def test_a_damaged_report_is_refused(text, said, tmp_path):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(FormatError, match=said):
        report.rewrite(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_no_report_there(tmp_path):
    with pytest.raises(FormatError, match=r"report.json cannot be read: No such file.*\n  `secateur prune -o"):
        report.read(tmp_path)


def test_a_model_folder_with_a_report_loads_and_is_replaced(result, tmp_path):
    out = sc.save(result, tmp_path / "out")
    report.write(out, report.facts(result))
    x = torch.randn(2, 6)
    assert torch.equal(sc.load(out)(x), result.model(x))
    sc.save(result, out)
    assert not (out / "report.html").exists(), "a report of an older result does not stay beside a new one"
