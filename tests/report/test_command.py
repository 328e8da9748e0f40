"""`secateur prune -o` writes the report, `secateur report` writes its page again."""

import json
from pathlib import Path

import secateur as sc

NET = f"{Path(__file__).parent.parent / 'models' / 'nets.py'}:net"


def test_prune_writes_the_report_beside_the_model(run, tmp_path):
    out = tmp_path / "an out"
    arguments = ["prune", NET, "--at-most", "macs=60%", "--input", "2x1x8x8", "-o", out]
    run(*arguments)
    names = ["graph.json", "model.safetensors", "plan.json", "report.html", "report.json"]
    assert sorted(p.name for p in out.iterdir()) == names
    facts = json.loads((out / "report.json").read_text())
    assert facts["settings"]["command"] == f"secateur prune {NET} --at-most macs=60% --input 2x1x8x8 -o '{out}'"
    assert facts["proof"]["passed"] and facts["groups"] and facts["frozen"] and facts["targets"][0]["met"]
    assert sc.load(out) is not None
    run(*arguments)
    assert sorted(p.name for p in out.iterdir()) == names, "a folder with a report is one that may be replaced"


def test_report_writes_the_page_again(run, tmp_path):
    run("prune", NET, "--at-most", "macs=60%", "--input", "2x1x8x8", "-o", tmp_path / "out")
    page = tmp_path / "out" / "report.html"
    before = page.read_text()
    page.unlink()
    assert str(page) in run("report", tmp_path / "out").replace("\n", "")
    assert page.read_text() == before


def test_without_out_nothing_is_written(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("prune", NET, "--at-most", "macs=60%", "--input", "2x1x8x8")
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_report_is_refused(run, tmp_path):
    assert "report.json cannot be read: No such file" in run("report", tmp_path, code=1)
