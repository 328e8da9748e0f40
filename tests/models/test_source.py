"""Models by name or path, weights from files, and what is refused before it can do harm."""

import importlib.util
import io
import json
import os
import pickle
import re
import shutil
import warnings
import zipfile

import nets
import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.errors import InputError, ModelError
from secateur.models import load_model, weights
from secateur.models.example import describe, parse_input, rebuild


def refused(spec, *patterns, weights_file=None):
    with pytest.raises(ModelError) as error:
        load_model(spec, weights_file)
    message = str(error.value)
    for pattern in patterns:
        assert re.search(pattern, message), f"{pattern!r} not in {message!r}"
    assert "\n" in message, "the message ends with a way out"
    return message


def needs(library):
    """Skip without `library`. It is looked for, not imported: importing torchvision may need the loader's help."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A folder that appears if code in a file was run."""
    monkeypatch.setenv("EVIL", str(tmp_path / "harm"))
    yield tmp_path / "harm"
    assert not (tmp_path / "harm").exists(), "code in the file was run"


# ---------------------------------------------------------------- factories
def test_a_factory_of_a_module():
    loaded = load_model("nets:net")
    assert type(loaded.model).__name__ == "Net" and loaded.example_inputs is None and not loaded.model.training


def test_a_factory_of_a_file_and_one_that_brings_inputs():
    loaded = load_model(f"{nets.__file__}:net_with_inputs")
    assert loaded.example_inputs[0].shape == (2, 1, 8, 8)


def test_random_weights_come_from_the_seed():
    first, again, other = (load_model("nets:other", seed=s).model.a.weight for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert first.shape == other.shape


@pytest.mark.parametrize(("spec", "pattern"), [
    ("resnet", r"'resnet' is no model that secateur knows"),
    ("nowhere.py:net", r"nowhere.py does not exist"),
    (nets.__file__, r"names a file and no function in it.\n  Write .*nets.py:FUNCTION"),
    ("nets:MADE", r"nets:MADE is a Linear, not a function that builds one.\n  Write one"),
    ("nets:nett", r"it has net, "),
    ("nets:missing", r"nets has no function 'missing'; it has .*net"),
    ("no_such_module:net", r"there is no module 'no_such_module'"),
    ("nets:broken", r"OSError: the disk with the weights is gone"),
    ("nets:not_a_model", r"returned a str"),
    ("nowhere.pt2", r"nowhere.pt2 does not exist"),
    ("torchvision/resnet19", r"no 'resnet19' among \d+ models.\n  Near it: .*resnet18"),
    ("hf/some-user/some-model", r"no some-user/some-model/config.json.*\n.*nothing is downloaded"),
])  # fmt: skip
def test_models_that_are_not_there(spec, pattern):
    if spec.startswith("torchvision"):
        needs("torchvision")
    if spec.startswith("hf"):
        needs("transformers")
    refused(spec, pattern)


def test_weights_that_are_not_numbers_are_named():
    refused("nets:diverged", r"1 of 576 values of the parameter b.weight are not finite")


@pytest.mark.parametrize("module", ["torchvision", "timm", "transformers"])
def test_optional_libraries_are_named(module, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, module, None)
    spec = {"torchvision": "torchvision/resnet18", "timm": "timm/resnet18", "transformers": "hf/llama"}[module]
    refused(spec, rf"pip install .*{module}")


# ---------------------------------------------------------------- libraries
def test_torchvision_by_name():
    needs("torchvision")
    loaded = load_model("torchvision/mobilenet_v3_small")
    assert loaded.example_inputs[0].shape == (1, 3, 224, 224)


def test_timm_by_name_takes_the_size_from_its_configuration():
    needs("timm")
    loaded = load_model("timm/vit_tiny_patch16_224")
    assert loaded.model(*loaded.example_inputs).shape == (1, 1000)


@pytest.mark.parametrize("kind", ["llama", "bert", "t5", "vit", "clip"])
def test_hugging_face_types_are_built_small_and_run(kind):
    needs("transformers")
    loaded = load_model(f"hf/{kind}")
    assert sum(p.numel() for p in loaded.model.parameters()) < 1_000_000
    with torch.no_grad():
        assert loaded.model(*loaded.example_inputs, **loaded.kwargs) is not None


def test_a_local_hugging_face_folder_with_its_weights(tmp_path):
    needs("transformers")
    built = load_model("hf/llama", seed=5)
    built.model.save_pretrained(tmp_path)
    loaded = load_model(f"hf/{tmp_path}")
    assert type(loaded.model) is type(built.model)
    state = built.model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in loaded.model.state_dict().items())


def test_a_folder_whose_weights_are_not_read_is_refused_and_never_random(tmp_path):
    needs("transformers")
    built = load_model("hf/llama", seed=5).model
    built.save_pretrained(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "bin", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(built.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    refused(f"hf/{tmp_path / 'bin'}", r"holds its weights in pytorch_model.bin, which is not read")
    held = load_file(tmp_path / "whole" / "model.safetensors")
    gone = held.pop(next(n for n in held if n.endswith("down_proj.weight")))
    save_file(held, tmp_path / "whole" / "model.safetensors", {"format": "pt"})
    assert gone.numel()
    refused(f"hf/{tmp_path / 'whole'}", r"lack 1 tensors of LlamaForCausalLM, such as '.*down_proj.weight', which would be random")


def test_code_of_a_folder_is_not_run_and_nobody_is_asked(tmp_path, monkeypatch):
    needs("transformers")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "conf.Conf"}}))
    (tmp_path / "conf.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'harm')!r})\n")
    refused(f"hf/{tmp_path}", r"config.json is no configuration transformers knows")
    assert not (tmp_path / "harm").exists()


def test_random_numbers_of_the_process_go_on_as_if_nothing_was_drawn():
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    load_model("nets:net", seed=11)
    assert torch.equal(torch.rand(4), wanted)


# ---------------------------------------------------------------- weights
def trained():
    torch.manual_seed(9)
    return nets.Net()


def test_weights_from_safetensors_and_from_a_state_dict(tmp_path):
    state = trained().state_dict()
    save_file({k: v.clone() for k, v in state.items()}, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pth")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, tmp_path / "checkpoint.pth")
    for name in ("w.safetensors", "w.pth", "checkpoint.pth"):
        loaded = load_model("nets:net", tmp_path / name)
        assert torch.equal(loaded.model.a.weight, state["a.weight"]), name


def test_weights_that_do_not_fit_change_nothing(tmp_path):
    save_file({k: v.clone() for k, v in nets.other().state_dict().items()}, tmp_path / "w.safetensors")
    model = nets.net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ModelError, match=r"a.weight is \[6, 1, 3, 3\] in the file and \[8, 1, 3, 3\] in the model"):
        weights.load_into(model, tmp_path / "w.safetensors")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    save_file({"nothing": torch.ones(1)}, tmp_path / "w.safetensors")
    refused("nets:net", r"the file has no a.weight", r"\d+ more differences", weights_file=tmp_path / "w.safetensors")


def test_weights_with_code_in_them_are_refused_and_not_run(tmp_path, evil):
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"a.weight": Evil()}))
    said = refused("nets:net", r"could run code", r"safetensors.torch.save_file", weights_file=tmp_path / "w.pth")
    assert str(tmp_path / "w.pth") in said
    torch.save({"a.weight": Evil()}, tmp_path / "zip.pth")
    refused("nets:net", r"holds more than tensors, and loading it could run code", weights_file=tmp_path / "zip.pth")


def test_a_whole_pickled_module_is_refused(tmp_path):
    torch.save(nets.net(), tmp_path / "w.pt")
    refused("nets:net", r"could run code: .*nets.Net", weights_file=tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_weights_that_are_cut_short(name, tmp_path):
    state = {k: v.clone() for k, v in trained().state_dict().items()}
    save_file(state, tmp_path / name) if name.endswith("tensors") else torch.save(state, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    refused("nets:net", rf"{name} cannot be read|holds more than tensors", weights_file=tmp_path / name)


def test_weights_that_are_not_there():
    refused("nets:net", r"--weights nowhere.pth does not exist", weights_file="nowhere.pth")


def test_a_file_of_something_else(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    refused("nets:net", r"holds epoch, not a state dict", weights_file=tmp_path / "w.pth")


# ---------------------------------------------------------------- exported programs
@pytest.fixture
def pt2(tmp_path):
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(nets.net(), (torch.randn(2, 1, 8, 8),), strict=False), path)
    return path


def rewrite(path, change):
    """Replace the archive's members by what `change(name, content)` returns."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, change(name, content))


def test_an_exported_program_brings_its_inputs(pt2):
    loaded = load_model(str(pt2))
    (x,) = loaded.example_inputs
    assert x.shape == (2, 1, 8, 8)
    assert torch.equal(loaded.model(x), nets.net()(x))


def test_sample_inputs_with_code_are_refused_and_not_run(pt2, evil):
    content = io.BytesIO()
    torch.save(((Evil(),), {}), content)
    rewrite(pt2, lambda name, old: content.getvalue() if "sample_inputs" in name else old)
    refused(str(pt2), r"sample inputs hold more than tensors")


def test_pickled_weights_in_a_program_are_refused(pt2, evil):
    rewrite(pt2, lambda name, old: old.replace(b'"use_pickle": false', b'"use_pickle": true'))
    refused(str(pt2), r"keeps a tensor of a class of its own, pickled")


def test_objects_in_a_program_are_refused(pt2, evil):
    rewrite(pt2, lambda name, old: old)
    with zipfile.ZipFile(pt2, "a") as archive:
        archive.writestr("net/data/constants/opaque_obj_0", pickle.dumps(Evil()))
    refused(str(pt2), r"opaque_obj_0 is an object of some class")


HIDDEN = ["data/weights/model.pt", "data/constants/model.pt", "models/other.JSON", "models/weight_0", "data/aotinductor/a.so"]


@pytest.mark.parametrize("name", HIDDEN)
def test_members_that_torch_export_does_not_write_are_refused(pt2, evil, name):
    rewrite(pt2, lambda name, old: old)
    with zipfile.ZipFile(pt2, "a") as archive:
        archive.writestr(f"net/{name}", pickle.dumps(Evil()))
    refused(str(pt2), rf"{re.escape(name)} is an object of some class, or nothing that torch.export writes")


def test_a_second_member_of_the_same_name_is_refused(pt2, evil):
    """zipfile reads the last of them, torch the first."""
    with zipfile.ZipFile(pt2, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = next(n for n in archive.namelist() if "models/" in n)
        archive.writestr(model, archive.read(model))
    refused(str(pt2), r"two of its members have the same name")


def test_operators_that_may_open_files_are_refused(pt2):
    library = torch.library.Library("secateur_tests_of_programs", "DEF")
    library.define("write(str path, Tensor x) -> Tensor")
    rewrite(pt2, lambda name, old: old.replace(b"torch.ops.aten.relu.default", b"torch.ops.secateur_tests_of_programs.write.default"))
    refused(str(pt2), r"secateur_tests_of_programs.write", r"no tensor operator")
    del library


@pytest.mark.parametrize("target", ["torch.hub.load", "torch.ops.load_library.__call__", "torch.ops.aten.from_file.default", "torch.utils.os.system"])
def test_calls_that_are_no_operators_are_refused(pt2, target):
    rewrite(pt2, lambda name, old: old.replace(b"torch.ops.aten.relu.default", target.encode()))
    refused(str(pt2), re.escape(target), r"no tensor operator")


SIZES = ["__import__('os').mkdir('harm')", "s0.__class__", "exec(s0)", "open('x')", "s0 if s1 else 2", "Symbol('exec')"]


@pytest.mark.parametrize("text", SIZES)
def test_sizes_that_are_no_arithmetic_are_refused(pt2, text):
    hidden = json.dumps({"as_expr": {"expr_str": text, "hint": None}}).encode()
    rewrite(pt2, lambda name, old: old.replace(b'{"as_int": 8}', hidden, 1) if "models/" in name else old)
    refused(str(pt2), r"no arithmetic on sizes")


def test_programs_with_free_sizes_are_let_through(tmp_path):
    program = torch.export.export(nets.net(), (torch.randn(4, 1, 8, 8),), dynamic_shapes=({0: torch.export.Dim.AUTO},),
                                  strict=False)  # fmt: skip
    torch.export.save(program, tmp_path / "free.pt2")
    model = load_model(str(tmp_path / "free.pt2")).model
    assert model(torch.randn(7, 1, 8, 8)).shape == (7, 10)


def test_an_archive_of_another_kind(tmp_path):
    (tmp_path / "a.pt2").write_text("hello")
    refused(str(tmp_path / "a.pt2"), r"is no exported program", r"torch.export.save")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "b.pt2")
    refused(str(tmp_path / "b.pt2"), r"archive of another kind|could run code")


# ---------------------------------------------------------------- inputs
def test_inputs_from_their_shape():
    assert parse_input("1x3x8x8").shape == (1, 3, 8, 8)
    tokens = parse_input("2x16:int64<100")
    assert tokens.dtype == torch.int64 and tokens.shape == (2, 16) and 2 < tokens.max() < 100
    assert parse_input("4:float16").dtype == torch.float16


@pytest.mark.parametrize("text", ["", "axb", "1x0x3", "1x3:complex", "1,3,8", "-1x3", "3x"])
def test_shapes_that_are_none(text):
    with pytest.raises(InputError, match=r"is not a shape"):
        parse_input(text)


def test_inputs_are_described_in_json_and_rebuilt():
    args = (torch.randn(2, 3), [torch.tensor([5, 1])], None, 2.5)
    form = json.loads(json.dumps(describe(args, {"mask": torch.ones(2, dtype=torch.bool)})))
    (x, (tokens,), none, number), kwargs = rebuild(form)
    assert x.shape == (2, 3) and tokens.dtype == torch.int64 and tokens.max() < 6 and none is None and number == 2.5
    assert kwargs["mask"].dtype == torch.bool
