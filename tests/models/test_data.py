"""Data sets by name: what comes in, how it is split, and what is refused."""

import nets
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from secateur.errors import DataError
from secateur.models import Data, load_data
from secateur.models.data import Batches
from secateur.models.quality import accuracy
from secateur.shell import given_data
from tests.models.given import everything, refused


def images(n=10, h=8, w=8, channels=None):
    shape = (n, h, w) if channels is None else (n, h, w, channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


# ---------------------------------------------------------------- what comes in
def test_digits_are_real_split_and_the_same_every_time():
    data = load_data("digits")
    x, y = everything(data.train)
    test_x, _ = everything(data.test)
    assert len(x) + len(test_x) == 1797 and len(test_x) == 359
    assert x.shape[1:] == (1, 8, 8) and x.min() == 0 and x.max() == 1
    assert sorted(set(y.tolist())) == list(range(10))
    assert torch.equal(x, everything(load_data("digits").train)[0])
    assert not torch.equal(x, everything(load_data("digits", seed=1).train)[0])
    assert next(iter(data.train))[0].shape == (128, 1, 8, 8)


def test_no_row_is_in_both_parts(tmp_path):
    x = np.arange(50, dtype=np.float32).reshape(50, 1)
    np.savez(tmp_path / "d.npz", images=x, labels=np.arange(50))
    data = load_data(f"npz:{tmp_path / 'd.npz'}")
    train, test = everything(data.train)[1].tolist(), everything(data.test)[1].tolist()
    assert sorted(train + test) == list(range(50)) and len(test) == 10


@pytest.mark.parametrize(("channels", "expected"), [(None, (1, 8, 6)), (3, (3, 8, 6)), (1, (1, 8, 6))])
@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_bytes_become_channels_first_numbers_in_0_to_1(kind, channels, expected, tmp_path):
    path = tmp_path / f"d.{kind}"
    x = images(10, 8, 6, channels)
    if kind == "npz":
        np.savez(path, images=x, labels=np.arange(10, dtype=np.uint8))
    else:
        save_file({"images": torch.from_numpy(x), "labels": torch.arange(10)}, path)
    data = load_data(f"{kind}:{path}", seed=3)
    got, labels = everything(data.train)
    assert got.shape == (8, *expected) and got.dtype == torch.float32 and labels.dtype == torch.int64
    row = x[int(labels[0])].astype(np.float32) / 255
    want = row[None] if channels is None else row.transpose(2, 0, 1)
    assert torch.equal(got[0], torch.from_numpy(want))


def test_names_as_fashion_mnist_has_them(tmp_path):
    np.savez(tmp_path / "f.npz", image=images(10, 28, 28), label=np.arange(10, dtype=np.uint8))
    data = load_data(f"npz:{tmp_path / 'f.npz'}")
    assert data.labelled and next(iter(data.train))[0].shape == (8, 1, 28, 28)


def test_data_without_labels(tmp_path):
    np.savez(tmp_path / "d.npz", images=images())
    data = load_data(f"npz:{tmp_path / 'd.npz'}")
    assert not data.labelled and next(iter(data.train)).shape == (8, 1, 8, 8)


def test_tokens_stay_whole_numbers(tmp_path):
    np.savez(tmp_path / "d.npz", inputs=np.ones((10, 5), dtype=np.int64))
    assert next(iter(load_data(f"npz:{tmp_path / 'd.npz'}").train)).dtype == torch.int64


def picture(path, size=(8, 8), shade=0):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 0, 255)).save(path)


def test_a_folder_of_images_one_folder_per_class(tmp_path):
    for label, name in enumerate(["cat", "dog"]):
        for i in range(5):
            picture(tmp_path / name / f"{i}.png", shade=label * 255)
    data = load_data(f"imagefolder:{tmp_path}")
    x, y = everything(data.train)
    assert x.shape == (8, 3, 8, 8)
    assert torch.equal(x[:, 0, 0, 0], y.float()), "red is 0 for cats, 1 for dogs"


def test_a_folder_with_train_and_test(tmp_path):
    for part, n in (("train", 3), ("test", 2)):
        for i in range(n):
            picture(tmp_path / part / "cat" / f"{i}.png")
    data = load_data(f"imagefolder:{tmp_path}")
    assert len(everything(data.train)[0]) == 3 and len(everything(data.test)[0]) == 2


def test_one_list_of_batches_is_split_and_a_loader_says_that_it_is_not(tmp_path, monkeypatch, capsys):
    (tmp_path / "one.py").write_text("import torch\nfrom torch.utils.data import DataLoader, TensorDataset\n"
                                     "X, Y = torch.arange(22.0)[:, None], torch.arange(22) % 2\n"
                                     "def many(): return [(x, y) for x, y in zip(X.split(2), Y.split(2))]\n"
                                     "def loader(): return DataLoader(TensorDataset(X, Y), 4)\n"
                                     "def pair(): return DataLoader(TensorDataset(X, Y), 4), DataLoader(TensorDataset(-X, Y), 4)\n")  # fmt: skip
    data = load_data(f"{tmp_path}/one.py:many")
    assert everything(data.train)[0].flatten().tolist() == list(range(18)) and everything(data.test)[0].flatten().tolist() == [18, 19, 20, 21]
    for name, alike in (("loader", True), ("pair", False), ("many", False)):
        held, _ = given_data(f"{tmp_path}/one.py:{name}", None, 0, "")
        assert (held.train is held.test) == alike == ("returned one set of batches" in capsys.readouterr().err)


@pytest.mark.parametrize("half", ["test", "val", "valid", "validation"])
def test_classes_have_the_numbers_of_train_in_both_halves(tmp_path, half):
    for name in ("ant", "bee", "cat"):
        picture(tmp_path / "train" / name / "0.png")
    for name in ("ant", "cat"):
        picture(tmp_path / half / name / "0.png")
    for part in ("train", half):
        (tmp_path / part / "__MACOSX").mkdir()
        picture(tmp_path / part / ".thumbnails" / "0.png")
    data = load_data(f"imagefolder:{tmp_path}")
    assert everything(data.train)[1].tolist() == [0, 1, 2] and everything(data.test)[1].tolist() == [0, 2]
    picture(tmp_path / half / "dog" / "0.png")
    refused(f"imagefolder:{tmp_path}", rf"{half} has the class 'dog', and .*train has not")


def test_the_example_is_the_first_rows():
    x, y = nets.rows()
    data = Data("d", Batches(x, y, 16), Batches(x, y, 16), True)
    assert torch.equal(data.example(3)[0][0], x[:3])
    assert data.example(3)[0][0].untyped_storage().nbytes() == 3 * x[0].nbytes, "a view would count as the whole data set in memory"
    words = Data("w", [{"input_ids": x, "n": 3}], [], False)
    assert words.example(2)[1]["input_ids"].shape[0] == 2


# ---------------------------------------------------------------- what is refused
def test_a_path_that_is_not_there():
    for kind in ("npz", "safetensors", "imagefolder"):
        refused(f"{kind}:nowhere/x", r"nowhere/x does not exist \(looked from ", r"Check the path")


def test_an_unknown_name():
    refused("cifar", r"'cifar' is no data set", r"digits, imagefolder:DIR, npz:FILE")


BROKEN = """
import torch
class Broken:
    def __init__(self, whole, times):
        self.whole, self.times = whole, times
    def __len__(self):
        return 3
    def __iter__(self):
        self.times -= 1
        for _ in range(3 if self.times >= 0 else self.whole):
            yield torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64)
        if self.times < 0:
            raise OSError("image 7 is gone")
def at_once(): return Broken(0, 0)
def later(): return Broken(1, 2)
"""


def test_data_that_stops_is_an_error_of_the_data(tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    refused(f"{tmp_path}/broken.py:at_once", r"stopped after 0 batches with OSError: image 7 is gone", r"read to their end")
    data = load_data(f"{tmp_path}/broken.py:later")
    assert len(data.train) == 3 and len(list(data.train)) == 3
    with pytest.raises(DataError, match=r"broken.py:later stopped after 1 batches with OSError: image 7 is gone"):
        list(data.train)


def test_wrong_names_in_a_file(tmp_path):
    np.savez(tmp_path / "d.npz", pictures=images())
    refused(f"npz:{tmp_path / 'd.npz'}", r"holds pictures, and no images", r"Name the inputs one of images")


def test_empty_data(tmp_path):
    np.savez(tmp_path / "d.npz", images=images(0))
    refused(f"npz:{tmp_path / 'd.npz'}", r"is empty: its inputs have shape \(0, 1, 8, 8\)")
    refused("nets:no_rows", r"nets:no_rows is empty")
    refused("nets:no_batches", r"returned no batches: the data set is empty")
    (tmp_path / "cat").mkdir()
    refused(f"imagefolder:{tmp_path}", r"1 class folders in .*, and no image")


def test_one_row_cannot_be_split(tmp_path):
    np.savez(tmp_path / "d.npz", images=images(1))
    refused(f"npz:{tmp_path / 'd.npz'}", r"has one row")


def test_labels_of_another_length(tmp_path):
    np.savez(tmp_path / "d.npz", images=images(10), labels=np.arange(9))
    refused(f"npz:{tmp_path / 'd.npz'}", r"10 inputs and 9 labels")


def test_numbers_that_are_not_finite(tmp_path):
    x = images().astype(np.float32)
    x[4, 2, 2] = np.nan
    x[7, 0, 0] = np.inf
    np.savez(tmp_path / "d.npz", images=x)
    refused(f"npz:{tmp_path / 'd.npz'}", r"2 of 10 rows hold NaN or infinity, row 4 is the first")


def test_an_array_of_objects_is_not_unpickled(tmp_path):
    np.savez(tmp_path / "d.npz", images=np.array([{}], dtype=object))
    refused(f"npz:{tmp_path / 'd.npz'}", r"cannot be read as .npz", r"no objects")


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_a_damaged_file(kind, tmp_path):
    (tmp_path / "d").write_bytes(b"\x50\x4b\x03\x04 not really")
    refused(f"{kind}:{tmp_path / 'd'}", r"cannot be read as ")


def test_images_of_two_sizes(tmp_path):
    picture(tmp_path / "cat" / "a.png", (8, 8))
    picture(tmp_path / "cat" / "b.png", (9, 8))
    refused(f"imagefolder:{tmp_path}", r"b.png is \(8, 9, 3\).*a.png is \(8, 8, 3\)", r"one size")


def test_a_file_that_is_no_image(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").write_text("hello")
    refused(f"imagefolder:{tmp_path}", r"a.png cannot be read as an image")


def test_functions_that_are_not_there_or_fail():
    refused("nets:cifar", r"nets has no function 'cifar'; it has .*net, other")
    refused("no_such_module:rows", r"there is no module 'no_such_module'", r"pip install no_such_module")
    refused("nets:not_data", r"returned a int")
    with pytest.raises(DataError, match=r"nets:broken.*OSError: the disk with the weights is gone"):
        load_data("nets:broken")


def test_optional_libraries_are_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    refused("digits", r"pip install scikit-learn")


# ---------------------------------------------------------------- accuracy
def test_accuracy_counts_rows_and_leaves_the_model_alone():
    x, _ = nets.rows()
    model = nets.net().train()
    with torch.no_grad():
        labels = nets.net()(x).argmax(1)
    labels[:16] = (labels[:16] + 1) % 10
    assert accuracy(model, Batches(x, labels, 10)) == 48 / 64
    assert model.training


def test_accuracy_refuses_what_has_none():
    x, y = nets.rows()
    with pytest.raises(DataError, match="needs labels"):
        accuracy(nets.net(), Batches(x))
    with pytest.raises(DataError, match=r"gives \(64, 10\) for 64 labels up to 19"):
        accuracy(nets.net(), Batches(x, y + 10))
    with pytest.raises(DataError, match="no rows"):
        accuracy(nets.net(), [])
