"""Data sets: every format, every damage, and batches as a function of (seed, step)."""

import gzip
import hashlib
import os
import pickle
import re
import struct
import sys
import tarfile
import types

import numpy as np
import pytest
import scipy.io
from PIL import Image

from experiments import data, formats


RNG = np.random.default_rng(0)
DIGITS = "2a683752f5f5800dec89195284976b48ba01901d2957dec72101424268ef18dd"
MNIST_MEAN = 33.318421  # of the 47 million training pixels


def images(count, *shape):
    return RNG.integers(0, 256, (count, *shape), dtype=np.uint8)


def labels(count, classes=10):
    return (np.arange(count) % classes).astype(np.uint8)


def arrays(*shape, classes=10):
    return {
        "x_train": images(20, *shape),
        "y_train": labels(20, classes),
        "x_test": images(10, *shape),
        "y_test": labels(10, classes),
    }


def refused(name, folder, **options):
    with pytest.raises(data.DataError) as caught:
        data.load(name, folder, **options)
    return str(caught.value)


def accept(name, folder):
    """Load data of unknown content as its error message says: with data.sha256."""
    message = refused(name, folder)
    return data.load(
        name, folder, sha256=re.search(r"data\.sha256=(\w{64})", message)[1]
    )


def check_same(found, expected, shape):
    for key in data.KEYS:
        wanted = expected[key].reshape(-1, *shape) if key[0] == "x" else expected[key]
        np.testing.assert_array_equal(getattr(found, key), wanted)
    assert found.x_train.dtype == np.uint8
    assert found.y_train.dtype == np.int32


# --- the real data


def test_digits_are_the_documented_ones():
    found = data.load("digits")
    assert found.sha256 == DIGITS
    assert found.x_train.shape == (1433, 8, 8, 1)
    assert found.x_test.shape == (364, 8, 8, 1)
    assert np.bincount(found.y_test).min() >= 35
    assert {0, 128, 255} <= set(found.x_train.ravel())
    assert len(np.unique(found.x_train)) == 17


def test_digits_hold_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    bunch, found = load_digits(), data.load("digits")
    whole = np.concatenate([found.x_train, found.x_test])[..., 0] * (16 / 255)
    both = (np.round(whole).reshape(-1, 64), bunch.data)
    ours, theirs = (rows[np.lexsort(rows.T)] for rows in both)
    np.testing.assert_array_equal(ours, theirs)


def test_mnist_is_the_real_one(mnist_dir):
    found = data.load("mnist", mnist_dir)
    assert found.x_train.shape == (60000, 28, 28, 1)
    assert found.x_test.shape == (10000, 28, 28, 1)
    assert found.x_train.mean(dtype=np.float64) == pytest.approx(MNIST_MEAN)
    np.testing.assert_array_equal(found.y_train[:5], [5, 0, 4, 1, 9])


def test_mnist_from_idx_files_has_the_published_hashes(mnist_dir, tmp_path):
    real = data.load("mnist", mnist_dir)
    write_idx(tmp_path / "MNIST" / "raw", real._asdict())
    assert data.load("mnist", tmp_path).sha256 == real.sha256


def test_the_folder_is_taken_from_the_environment(tmp_path, monkeypatch):
    np.savez(tmp_path / "own.npz", **arrays(4, 4))
    monkeypatch.setenv("CERTJAX_DATA_DIR", str(tmp_path))
    assert data.load("own").name == "own"


# --- formats: what is written is read


def write_idx(folder, found, pack=lambda content: content, suffix=""):
    folder.mkdir(parents=True, exist_ok=True)
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3")
    for key, name in zip(data.KEYS, (*names, "t10k-labels-idx1"), strict=True):
        array = found[key].astype(np.uint8)
        array = array.reshape(array.shape[:3])  # no channel axis in MNIST
        header = struct.pack(">4B", 0, 0, 8, array.ndim)
        header += struct.pack(f">{array.ndim}i", *array.shape)
        content = pack(header + array.tobytes())
        (folder / f"{name}-ubyte{suffix}").write_bytes(content)


@pytest.mark.parametrize("inner", ["", "fashion_mnist", "FashionMNIST/raw"])
def test_idx_in_every_folder(tmp_path, inner):
    expected = arrays(28, 28)
    write_idx(tmp_path / inner, expected)
    check_same(accept("fashion_mnist", tmp_path), expected, (28, 28, 1))


def test_gzipped_idx(tmp_path):
    expected = arrays(28, 28)
    write_idx(tmp_path, expected, gzip.compress, ".gz")
    check_same(accept("mnist", tmp_path), expected, (28, 28, 1))


CIFAR10 = {f"data_batch_{i}": slice(4 * i - 4, 4 * i) for i in range(1, 6)}
CIFAR100 = {"train": slice(None)}


def pickled(x, y, key):
    """A batch of CIFAR: protocol 2, one row for each picture, channels first."""
    pixels = x.transpose(0, 3, 1, 2).reshape(-1, 3072)
    return pickle.dumps({b"data": pixels, key: y.tolist()}, protocol=2)


@pytest.mark.parametrize(
    ("name", "archive", "folder", "train", "test", "key"),
    [
        (
            "cifar10",
            "cifar-10",
            "cifar-10-batches-py",
            CIFAR10,
            "test_batch",
            b"labels",
        ),
        ("cifar100", "cifar-100", "cifar-100-python", CIFAR100, "test", b"fine_labels"),
    ],
)
def test_cifar_unpacked_and_in_its_archive(
    tmp_path, name, archive, folder, train, test, key
):
    expected = arrays(32, 32, 3)
    x, y = expected["x_train"], expected["y_train"]
    files = {inner: pickled(x[rows], y[rows], key) for inner, rows in train.items()}
    files[test] = pickled(expected["x_test"], expected["y_test"], key)
    plain = tmp_path / "plain" / folder
    plain.mkdir(parents=True)
    for inner, content in files.items():
        (plain / inner).write_bytes(content)
    with tarfile.open(tmp_path / f"{archive}-python.tar.gz", "w:gz") as packed:
        packed.add(plain, arcname=folder)
    check_same(accept(name, tmp_path / "plain"), expected, (32, 32, 3))
    check_same(accept(name, tmp_path), expected, (32, 32, 3))


def test_svhn_counts_ten_as_zero(tmp_path):
    expected = arrays(32, 32, 3)
    for which in ("train", "test"):
        y = expected[f"y_{which}"]
        columns = np.where(y == 0, 10, y)[:, None]
        x = expected[f"x_{which}"].transpose(1, 2, 3, 0)
        scipy.io.savemat(tmp_path / f"{which}_32x32.mat", {"X": x, "y": columns})
    check_same(accept("svhn", tmp_path), expected, (32, 32, 3))


def test_npz_of_the_user(tmp_path):
    expected = arrays(5, 4, 3, classes=3)
    np.savez(tmp_path / "own.npz", **expected)
    found = data.load("own", tmp_path)
    check_same(found, expected, (5, 4, 3))
    assert found.classes == 3
    assert data.load("own", tmp_path, sha256=found.sha256).sha256 == found.sha256


def test_npz_with_the_labels_of_keras_and_no_training_split(tmp_path):
    np.savez(tmp_path / "own.npz", x_test=images(6, 4, 4), y_test=labels(6)[:, None])
    found = data.load("own", tmp_path)
    assert found.x_train.shape == (0, 4, 4, 1)
    assert found.y_test.shape == (6,)


def test_the_hash_of_the_npz_file_is_accepted_too(tmp_path):
    path = tmp_path / "mnist.npz"
    np.savez(path, **arrays(28, 28))
    file_hash = hashlib.sha256(path.read_bytes()).hexdigest().upper()
    assert data.load("mnist", tmp_path, sha256=file_hash).classes == 10


def write_pictures(folder, found, classes, mode="RGB"):
    for which in ("train", "test"):
        x, y = found[f"x_{which}"], found[f"y_{which}"]
        for i, (pixels, label) in enumerate(zip(x, y, strict=True)):
            path = folder / which / classes[label] / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.squeeze()).convert(mode).save(path)


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_of_pictures(tmp_path, channels):
    found = arrays(6, 5, channels, classes=2)
    order = {k: np.argsort(found[f"y_{k}"], kind="stable") for k in ("train", "test")}
    expected = {key: found[key][order[key[2:]]] for key in data.KEYS}
    mode = "L" if channels == 1 else "RGB"
    write_pictures(tmp_path / "pets", found, ["cat", "dog"], mode)
    check_same(data.load("pets", tmp_path), expected, (6, 5, channels))


def test_folder_in_the_layout_of_tinyimagenet(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    (root / "val" / "images").mkdir(parents=True)
    (root / "test" / "images").mkdir(parents=True)  # unlabelled: not used
    for name in ("n01", "n02"):
        (root / "train" / name / "images").mkdir(parents=True)
        pixels = images(1, 64, 64, 3)[0]
        Image.fromarray(pixels).save(root / "train" / name / "images" / "0.png")
    Image.fromarray(images(1, 64, 64, 3)[0]).save(root / "val" / "images" / "v.png")
    (root / "val" / "val_annotations.txt").write_text("v.png\tn02\t0\t0\t9\t9\n")
    found = data.load("tinyimagenet", tmp_path)
    assert found.classes == 200
    np.testing.assert_array_equal(found.y_train, [0, 1])
    np.testing.assert_array_equal(found.y_test, [1])


# --- damage


def test_a_flipped_byte_is_noticed(tmp_path):
    write_idx(tmp_path, arrays(28, 28))
    path = tmp_path / "t10k-images-idx3-ubyte"
    digest = accept("mnist", tmp_path).sha256
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    data._load.cache_clear()
    message = refused("mnist", tmp_path, sha256=digest)
    assert digest in message
    assert "t10k-images-idx3-ubyte: got md5" in refused("mnist", tmp_path)


@pytest.mark.parametrize("kept", [0, 3, 100, 5000])
def test_torn_files(tmp_path, kept):
    write_idx(tmp_path / "idx", arrays(28, 28))
    write_idx(tmp_path / "gz", arrays(28, 28), gzip.compress, ".gz")
    (tmp_path / "npz").mkdir()
    np.savez(tmp_path / "npz" / "mnist.npz", **arrays(28, 28))
    for folder in ("idx", "gz", "npz"):
        torn = sorted((tmp_path / folder).iterdir())[0]
        torn.write_bytes(torn.read_bytes()[:kept])
        assert "torn" in refused("mnist", tmp_path / folder)


def test_torn_archive_and_torn_matlab_file(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(gzip.compress(b"torn")[:-4])
    for which in ("train", "test"):
        x, y = images(3, 32, 32, 3).transpose(1, 2, 3, 0), labels(3)[:, None]
        path = tmp_path / f"{which}_32x32.mat"
        scipy.io.savemat(path, {"X": x, "y": y})
        path.write_bytes(path.read_bytes()[:700])
    assert "torn" in refused("cifar10", tmp_path)
    assert "torn" in refused("svhn", tmp_path)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_pickle_that_wants_to_execute_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test"):
        (folder / name).write_bytes(pickle.dumps({b"data": Malicious()}))
    assert "no part of an array" in refused("cifar100", tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_broken_picture_names_its_file(tmp_path):
    write_pictures(tmp_path / "pets", arrays(6, 5, 3, classes=2), ["cat", "dog"])
    path = tmp_path / "pets" / "test" / "dog" / "001.png"
    path.write_bytes(path.read_bytes()[:40])
    assert str(path) in refused("pets", tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x_train": images(20, 4, 4) / 255.0}, ("float64", "uint8", "astype")),
        ({"x_train": images(20, 4, 5)}, ("(4, 5, 1)", "(4, 4, 1)")),
        ({"x_test": images(10, 16)}, ("(10, 16)", "height")),
        ({"y_train": labels(19)}, ("(19,)", "(20,)")),
        ({"y_train": labels(20) / 2}, ("float64", "integers")),
        ({"y_train": labels(20).astype(int) - 1}, ("-1",)),
    ],
)
def test_wrong_arrays_are_explained(tmp_path, change, words):
    np.savez(tmp_path / "own.npz", **(arrays(4, 4) | change))
    message = refused("own", tmp_path)
    assert all(word in message for word in words), message


def test_published_data_have_a_fixed_shape_and_number_of_classes(tmp_path):
    np.savez(tmp_path / "mnist.npz", **arrays(27, 28))
    assert "(27, 28, 1)" in refused("mnist", tmp_path)
    np.savez(tmp_path / "cifar10.npz", **arrays(32, 32, 3, classes=11))
    assert "label 10, expected 0 to 9" in refused("cifar10", tmp_path)


def test_missing_arrays_are_named(tmp_path):
    np.savez(tmp_path / "own.npz", x_train=images(3, 4, 4), labels=labels(3))
    assert "no array x_test, found labels, x_train" in refused("own", tmp_path)


def test_objects_in_an_npz_are_refused(tmp_path):
    np.savez(tmp_path / "own.npz", x_test=np.array([Malicious()], object))
    assert "allow_pickle=False" in refused("own", tmp_path)


def test_a_missing_folder_and_missing_files_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)  # as without the extra
    monkeypatch.delenv("CERTJAX_DATA_DIR", raising=False)
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    assert "no-such" in refused("mnist", tmp_path / "no-such")
    message = refused("mnist", tmp_path)
    for word in (
        "train-images-idx3-ubyte.gz",
        "sha256:440fca",
        "https://",
        "mnist.npz",
    ):
        assert word in message
    assert "CERTJAX_DATA_DIR" in refused("cifar10", None)
    assert "published sets: digits, mnist" in refused("mnits", tmp_path)


# --- downloads


def stub_pooch(monkeypatch, retrieve):
    stub = types.ModuleType("pooch")
    stub.__spec__ = types.SimpleNamespace()  # what find_spec looks at
    stub.retrieve = retrieve
    monkeypatch.setitem(sys.modules, "pooch", stub)


def test_pooch_gets_the_url_and_the_hash(tmp_path, monkeypatch):
    expected, asked = arrays(28, 28), []

    def retrieve(url, known_hash, fname, path):
        asked.append((url, known_hash))
        write_idx(path, expected, gzip.compress, ".gz")

    stub_pooch(monkeypatch, retrieve)
    with pytest.raises(data.DataError, match="not the published"):
        data.load("fashion_mnist", tmp_path)  # our files are not the real ones
    assert [url.split("/")[-1][:5] for url, _ in asked] == ["train"] * 2 + ["t10k-"] * 2
    assert all(known_hash.startswith("sha256:") for _, known_hash in asked)
    assert (tmp_path / "fashion_mnist" / "train-images-idx3-ubyte.gz").is_file()


def test_a_failed_download_says_what_to_fetch_by_hand(tmp_path, monkeypatch):
    def retrieve(*args, **options):
        raise OSError("no route to host")

    stub_pooch(monkeypatch, retrieve)
    message = refused("cifar10", tmp_path)
    assert "no route to host" in message
    assert "cifar-10-python.tar.gz" in message


# --- splits and batches


def test_validation_is_a_stratified_partition_of_the_training_split():
    whole = data.load("digits")
    held = data.split(whole, validation=0.2, seed=3)
    parts = np.concatenate([held.x_train, held.x_test]).reshape(-1, 64)
    everything = whole.x_train.reshape(-1, 64)
    for rows in (parts, everything):
        assert rows.shape == (1433, 64)
    np.testing.assert_array_equal(
        parts[np.lexsort(parts.T)], everything[np.lexsort(everything.T)]
    )
    share = np.bincount(held.y_test) / np.bincount(whole.y_train)
    assert np.abs(share - 0.2).max() < 0.01
    assert data.split(whole, validation=0.2, seed=3).sha256 == held.sha256
    assert data.split(whole, validation=0.2, seed=4).sha256 != held.sha256
    assert abs(len(data.split(whole, validation=300).y_test) - 300) <= 5


@pytest.mark.parametrize("validation", [0, 1.0, -1, 1433, 2000])
def test_impossible_validation_splits(validation):
    whole = data.load("digits")
    with pytest.raises(data.DataError, match="validation"):
        data.split(whole, validation=validation)


def test_subset_keeps_the_order():
    whole = data.load("digits")
    part = data.subset(whole, train=100, seed=1)
    assert part.x_train.shape == (100, 8, 8, 1)
    assert part.x_test.shape == whole.x_test.shape
    assert part.sha256 != whole.sha256
    assert data.subset(whole, train=10**6).sha256 == whole.sha256


def test_an_epoch_sees_every_row_once_and_the_next_in_another_order():
    epochs = [
        np.concatenate(
            [data.batch(100, 10, seed=0, step=e * 10 + i) for i in range(10)]
        )
        for e in range(2)
    ]
    for rows in epochs:
        np.testing.assert_array_equal(np.sort(rows), np.arange(100))
    assert (epochs[0] != epochs[1]).any()


def test_a_batch_depends_on_seed_and_step_only():
    direct = data.batch(103, 10, seed=5, step=37)
    data._permutation.cache_clear()
    for step in range(37):
        data.batch(103, 10, seed=5, step=step)
    np.testing.assert_array_equal(data.batch(103, 10, seed=5, step=37), direct)
    assert (data.batch(103, 10, seed=6, step=37) != direct).any()


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(data.DataError, match="512 from 100"):
        data.batch(100, 512, seed=0, step=0)


def test_loaded_arrays_cannot_be_changed_by_accident():
    found = data.load("digits")
    with pytest.raises(ValueError, match="read-only"):
        found.x_train[0] = 0


def test_what_a_reader_cannot_read_is_named():
    with pytest.raises(ValueError, match="no IDX file"):
        formats.read_idx(b"\0\0\x0d\x01\0\0\0\1abcd")
    with pytest.raises(ValueError, match="promises 4 bytes, it has 3"):
        formats.read_idx(b"\0\0\x08\x01\0\0\0\4abc")
