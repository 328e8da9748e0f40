"""Saving and loading: the same model comes back, anything damaged is refused, nothing is lost on the way."""

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nets
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import FormatError, InputError
from secateur.models import atomic, folder

HERE = Path(__file__).parent


def tree(path):
    """Every file below `path` with its hash: what must not change."""
    files = [p for p in path.rglob("*") if p.is_file()]
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture
def saved(result, tmp_path):
    return sc.save(result, tmp_path / "out")


@pytest.fixture
def x():
    return torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- the same model comes back
def test_a_folder_holds_three_files_and_no_pickle(saved):
    assert sorted(p.name for p in saved.iterdir()) == ["graph.json", "model.safetensors", "plan.json"]
    document = json.loads((saved / "plan.json").read_text())
    json.loads((saved / "graph.json").read_text())
    assert document["format"] == "secateur/1"
    assert document["after"]["macs"] < document["before"]["macs"]
    assert document["proof"]["passed"] is True
    assert len({p.stat().st_mode for p in saved.iterdir()}) == 1, "whoever may read one file may read all"


def test_loaded_with_a_factory_it_is_the_same_class_and_the_same_bits(result, saved, x):
    model = sc.load(saved, nets.net)
    assert type(model) is nets.Net
    assert model.a.out_channels == result.model.a.out_channels < 8
    assert torch.equal(model(x), result.model(x))
    assert model.two.weight is model.one.weight, "tied weights stay tied"
    assert list(model.state_dict()) == list(result.model.state_dict())
    assert not model.training


def test_loaded_without_a_factory_it_gives_the_same_bits_for_any_batch(result, saved, x):
    model = sc.load(saved)
    for rows in (1, 2, 5):
        assert torch.equal(model(x[:rows]), result.model(x[:rows]))
    assert model.two.weight is model.one.weight


def test_the_loaded_graph_trains_and_exports(saved, x):
    model = sc.load(saved)
    model(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert torch.export.export(model, (x,), strict=False) is not None


def test_the_loaded_model_can_be_pruned_again_and_saved_again(saved, x, tmp_path):
    again = sc.prune(sc.load(saved), (x,), sc.MACs(at_most="70%"))
    assert again.proof.passed
    assert torch.equal(sc.load(sc.save(again, tmp_path / "again"))(x), again.model(x))


def test_the_same_bits_in_a_new_process(result, saved, x, tmp_path):
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[3]); import nets, secateur as sc\n"
        "x = torch.load(sys.argv[2], weights_only=True)\n"
        "torch.save([sc.load(sys.argv[1])(x), sc.load(sys.argv[1], nets.net)(x)], sys.argv[2] + '.out')\n"
    )
    subprocess.run([sys.executable, "-c", code, saved, tmp_path / "x.pt", HERE], check=True)
    for found in torch.load(tmp_path / "x.pt.out", weights_only=True):
        assert torch.equal(found, result.model(x))


def test_a_rewritten_graph_is_saved_and_loaded(rewritten, tmp_path):
    assert rewritten.cut.how == "graph"
    out = sc.save(rewritten, tmp_path / "out")
    x = torch.randn(4, 6)
    assert torch.equal(sc.load(out)(x), rewritten.model(x))
    with pytest.raises(FormatError, match=r"rewriting its graph.*\n  Load it without a factory"):
        sc.load(out, nets.hard)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_come_back_bit_for_bit(dtype, tmp_path):
    x = torch.randn(2, 1, 8, 8).to(dtype)
    result = sc.prune(nets.net().to(dtype), (x,), sc.MACs(at_most="60%"))
    out = sc.save(result, tmp_path / "out")
    for model in (sc.load(out), sc.load(out, lambda: nets.net().to(dtype))):
        assert model(x).dtype == dtype
        assert torch.equal(model(x), result.model(x))


def test_example_inputs_are_described_and_not_kept(saved):
    (x,), kwargs = folder.read(saved).example_inputs()
    assert x.shape == (2, 1, 8, 8) and not kwargs
    assert torch.equal(x, folder.read(saved).example_inputs()[0][0])


def test_without_a_graph_the_folder_says_why_and_the_factory_still_works(result, tmp_path, monkeypatch, x):
    monkeypatch.setattr(folder.recipe, "exported", lambda *_: (None, "torch.export could not follow it: line 7"))
    out = sc.save(result, tmp_path / "out")
    assert not (out / "graph.json").exists()
    with pytest.raises(FormatError, match=r"carries no graph: torch.export could not follow it: line 7"):
        sc.load(out)
    assert torch.equal(sc.load(out, nets.net)(x), result.model(x))


# ---------------------------------------------------------------- what is damaged is refused
def damage_cut_short(out):
    path = out / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    return r"model.safetensors has \d+ bytes, plan.json says \d+"


def damage_one_bit(out):
    path = out / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    return r"model.safetensors was altered: its sha256 is \w+"


def damage_missing(out):
    (out / "model.safetensors").unlink()
    return r"model.safetensors is missing; plan.json lists it with \d+ bytes"


def damage_graph(out):
    path = out / "graph.json"
    path.write_text(path.read_text().replace("aten::relu", "aten::tanh"))
    return r"graph.json was altered"


def damage_plan_cut_short(out):
    path = out / "plan.json"
    path.write_text(path.read_text()[: len(path.read_text()) // 2])
    return r"plan.json cannot be read.*\n.*cut short"


def damage_plan_altered(out):
    path = out / "plan.json"
    path.write_text(re.sub(r'("macs": )(\d)', r"\g<1>9\2", path.read_text(), count=1))
    return r"plan.json was altered after it was written"


def damage_plan_missing(out):
    (out / "plan.json").unlink()
    return r"has no plan.json"


def damage_version(out):
    document = json.loads((out / "plan.json").read_text())
    document.pop("sha256")
    (out / "plan.json").write_text(folder._sealed({**document, "format": "secateur/9"}))
    return r"format 'secateur/9', this version of secateur reads 'secateur/1'"


def damage_two_models(out):
    """A whole, valid safetensors file of another model, with plan.json resealed around it."""
    from safetensors.torch import load_file, save_file

    path = out / "model.safetensors"
    tensors = load_file(path)
    tensors["a.weight"] = tensors["a.weight"][:-1].contiguous()
    save_file(tensors, path)
    document = json.loads((out / "plan.json").read_text())
    document.pop("sha256")
    document["files"]["model.safetensors"] = {"bytes": path.stat().st_size, "sha256": atomic.sha256(path)}
    (out / "plan.json").write_text(folder._sealed(document))
    return r"disagree in 1 tensors: a.weight is float32 \[\d, 1, 3, 3\], plan.json says float32 \[\d, 1, 3, 3\]"


def damage_unlisted(out):
    """A file that plan.json says nothing of could be any other."""
    document = json.loads((out / "plan.json").read_text())
    document.pop("sha256")
    del document["files"]["model.safetensors"]
    (out / "plan.json").write_text(folder._sealed(document))
    return r"plan.json has no hash of model.safetensors"


def damage_elsewhere(out):
    (out.parent / "secret").write_text("hello")
    document = json.loads((out / "plan.json").read_text())
    document.pop("sha256")
    document["files"]["../secret"] = {"bytes": 5, "sha256": atomic.sha256(out.parent / "secret")}
    (out / "plan.json").write_text(folder._sealed(document))
    return r"plan.json lists '../secret', which is not in the folder itself"


DAMAGES = [value for name, value in sorted(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("factory", [None, nets.net], ids=["graph", "factory"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__.removeprefix("damage_"))
def test_a_damaged_folder_is_refused_and_left_as_it_is(damage, factory, saved):
    said = damage(saved)
    before = tree(saved)
    with pytest.raises(FormatError, match=said) as refused:
        sc.load(saved, factory)
    assert str(saved) in str(refused.value)
    assert len(str(refused.value).splitlines()) >= 2, "the message ends with a way out"
    assert tree(saved) == before


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FormatError, match=r"nowhere does not exist"):
        sc.load(tmp_path / "nowhere")


CALLS = ["aten::from_file.default", "aten::no_such_op.default", "os::system.default", "exec", "builtins.eval"]


@pytest.mark.parametrize("target", CALLS)
def test_a_graph_can_only_call_tensor_operators(saved, target):
    form = json.loads((saved / "graph.json").read_text())
    call = next(n for n in form["nodes"] if n["op"] == "call_function")
    call["target"] = target
    with pytest.raises(FormatError, match=re.escape(repr(target))):
        folder.graph_file.from_json(form, folder.recipe.as_module_tensors(*_held(saved)))


def _argument(form, code):
    next(n for n in form["nodes"] if n["op"] == "call_function")["kwargs"] = {f"**({code} or {{}}), bias": None}


def _placeholder(form, code):
    form.pop("call")
    next(n for n in form["nodes"] if n["op"] == "placeholder")["target"] = f"input={code}"


def _signature(form, code):
    form["call"]["arguments"] = [f"x={code}"]


def _attribute(form, code):
    row = next(n for n in form["nodes"] if n["op"] == "get_attr")
    row["target"] = f'a", {code}) or getattr(self, "b'
    return row["target"]


@pytest.mark.parametrize("put", [_argument, _placeholder, _signature, _attribute])
def test_names_in_a_graph_are_not_run(saved, put, tmp_path):
    """torch.fx writes them into Python source as they are."""
    form, tensors = json.loads((saved / "graph.json").read_text()), folder.recipe.as_module_tensors(*_held(saved))
    if name := put(form, f"__import__('os').mkdir({str(tmp_path / 'harm')!r})"):
        tensors = {**tensors, name: torch.zeros(2)}
    with pytest.raises(FormatError, match="would run as code"):
        folder.graph_file.from_json(form, tensors)
    assert not (tmp_path / "harm").exists()


def test_operators_of_other_libraries_that_take_text_are_refused(saved):
    library = torch.library.Library("secateur_tests", "DEF")
    library.define("write(str path, Tensor x) -> Tensor")
    library.define("double(Tensor x) -> Tensor")
    form, tensors = json.loads((saved / "graph.json").read_text()), folder.recipe.as_module_tensors(*_held(saved))
    call = next(n for n in form["nodes"] if n["op"] == "call_function")
    call["target"] = "secateur_tests::double.default"
    folder.graph_file.from_json(form, tensors)
    call["target"] = "secateur_tests::write.default"
    with pytest.raises(FormatError, match="may open files"):
        folder.graph_file.from_json(form, tensors)


@pytest.mark.parametrize("kind", ["builtins.object", "collections.defaultdict", "os.path.x"])
def test_a_graph_can_only_take_and_return_plain_containers(saved, kind):
    form = json.loads((saved / "graph.json").read_text())
    form["call"]["in"] = form["call"]["in"].replace("builtins.tuple", kind)
    with pytest.raises(FormatError, match="no plain container"):
        folder.graph_file.from_json(form, folder.recipe.as_module_tensors(*_held(saved)))


def _held(saved):
    read = folder.read(saved)
    return read.document, read.tensors


# ---------------------------------------------------------------- the wrong factory
def test_a_factory_of_another_width_is_refused(saved):
    with pytest.raises(FormatError, match=r"builds another model than the one saved"):
        sc.load(saved, lambda: nets.Net(width=12))


def test_a_factory_of_another_model_is_refused(saved):
    with pytest.raises(FormatError, match=r"builds another model .*Linear.*it has no a.weight"):
        sc.load(saved, lambda: nn.Linear(3, 3))


def test_a_factory_of_no_model_is_refused(saved):
    with pytest.raises(FormatError, match=r"returned a str, not an nn.Module"):
        sc.load(saved, nets.not_a_model)


# ---------------------------------------------------------------- nothing is lost
def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", ["_save_tensors", "sha256", "sync"])
def test_a_full_disk_leaves_the_old_folder(step, result, saved, monkeypatch):
    before = tree(saved.parent)
    monkeypatch.setattr(atomic if step == "sync" else folder, step, full)
    with pytest.raises(FormatError, match=r"No space left on device .*MiB free.*\n  The old .* is unchanged\.\n  Make"):
        sc.save(result, saved)
    monkeypatch.undo()
    assert tree(saved.parent) == before
    sc.load(saved)


def test_a_full_disk_leaves_nothing_of_a_first_save(result, tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "_save_tensors", full)
    with pytest.raises(FormatError, match=r"Nothing was left behind"):
        sc.save(result, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_real_limit_on_file_size_is_reported_the_same_way(saved, tmp_path):
    """The tensors are written by native code, whose errors look different from Python's."""
    before = tree(saved)
    code = (
        "import resource, signal, sys, torch; sys.path.insert(0, sys.argv[2]); import nets, secateur as sc\n"
        "result = sc.prune(nets.net(), (torch.randn(2, 1, 8, 8),), sc.MACs(at_most='60%'))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: sc.save(result, sys.argv[1])\n"
        "except sc.errors.FormatError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, saved, HERE], check=True, capture_output=True, text=True)
    assert "could not be written: File too large" in done.stdout
    assert tree(saved) == before


@pytest.mark.parametrize("which", [1, 2])
def test_an_interruption_between_the_renames_leaves_the_old_folder(which, result, saved, monkeypatch):
    rename, calls = Path.rename, []

    def interrupted(self, target):
        calls.append(target)
        if len(calls) == which:
            raise KeyboardInterrupt
        return rename(self, target)

    old = tree(saved)
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sc.save(result, saved)
    assert tree(saved) == old and [p.name for p in saved.parent.iterdir()] == ["out"]


def test_a_kill_between_the_renames_loses_nothing(saved):
    old = tree(saved)
    saved.rename(atomic.backup(saved))  # as a kill leaves it
    with pytest.raises(FormatError, match=r"interrupted save left the previous version in .*\.out\.old; rename it"):
        sc.load(saved)
    atomic.backup(saved).rename(saved)
    assert tree(saved) == old


def test_saving_again_replaces_the_folder_and_leaves_no_scraps(result, saved, x):
    sc.save(result, saved)
    assert [p.name for p in saved.parent.iterdir()] == ["out"]
    assert torch.equal(sc.load(saved)(x), result.model(x))


def test_a_foreign_folder_is_never_replaced(result, tmp_path):
    (tmp_path / "thesis.txt").write_text("ten years of work")
    (tmp_path / "plan.json").write_text("and how")
    with pytest.raises(InputError, match=r"2 files that secateur did not write \(plan.json, thesis.txt\).*\n  Choose another"):
        sc.save(result, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json", "thesis.txt"]


def test_a_file_in_the_place_of_the_folder(result, tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(InputError, match=r"out is a file"):
        sc.save(result, tmp_path / "out")
