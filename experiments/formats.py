"""Readers of the formats in which image data sets are published.

Each takes the bytes of a file and returns numpy arrays; none executes anything that a
file contains. A file that cannot be what it should be raises `ValueError`, or one of
the errors in `TORN`.
"""

import gzip
import io
import math
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np


UBYTE = 8  # the type code of IDX for uint8
NOTES = "val_annotations.txt"  # TinyImageNet: file and class of each picture
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp")
TORN = (
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    AttributeError,
    EOFError,
    OSError,
    pickle.UnpicklingError,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)

Arrays = tuple[np.ndarray, np.ndarray]


def read_npz(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of a numpy archive; pickled objects are refused."""
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def read_idx(content: bytes) -> np.ndarray:
    """A uint8 array in the format of MNIST, plain or gzipped.

    Source: Y. LeCun, http://yann.lecun.com/exdb/mnist/: two zero bytes, the type, the
    number of dimensions, then the dimensions as big-endian int32.
    """
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != UBYTE:
        raise ValueError(f"no IDX file of unsigned bytes, it begins {content[:4]!r}")
    start = 4 + 4 * content[3]
    shape = struct.unpack(f">{content[3]}i", content[4:start])
    found, promised = len(content) - start, math.prod(shape)
    if found != promised:
        raise ValueError(f"its header promises {promised} bytes, it has {found}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that can build numpy arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """The three names that a pickled array mentions; anything else is refused."""
        if module.endswith("core.multiarray") and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]  # its module moved in numpy 2
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        raise pickle.UnpicklingError(
            f"it wants {module}.{name}, which is no part of an array"
        )


def _latin1(text: str, encoding: str) -> bytes:
    """How protocol 2 spells bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"unexpected encoding {encoding!r}")
    return text.encode("latin1")


def read_cifar(content: bytes) -> Arrays:
    """One batch of CIFAR in its Python format: [N, 32, 32, 3] images and [N] labels.

    CIFAR-100's labels are the fine ones.
    """
    batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
    batch = {k if isinstance(k, bytes) else str(k).encode(): batch[k] for k in batch}
    labels = batch[b"labels"] if b"labels" in batch else batch[b"fine_labels"]
    images = np.asarray(batch[b"data"]).reshape(-1, 3, 32, 32)
    return images.transpose(0, 2, 3, 1), np.asarray(labels)


def read_tar(content: bytes) -> dict[str, bytes]:
    """The regular files of a tar archive, by name; nothing is written to disk."""
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members = [member for member in archive if member.isfile()]
        files = {m.name: archive.extractfile(m) for m in members}
        return {name: file.read() for name, file in files.items() if file}


def read_svhn(content: bytes) -> Arrays:
    """One split of SVHN in its MATLAB format; its label 10 is the digit 0."""
    import scipy.io

    found = scipy.io.loadmat(io.BytesIO(content), variable_names=("X", "y"))
    labels = found["y"].ravel()
    return found["X"].transpose(3, 0, 1, 2), np.where(labels == 10, 0, labels)


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    """Pictures of one size in `train/<class>/` and `test/<class>/` (or `val/`).

    Classes are numbered in the order of their names in `train/`. The layout of
    TinyImageNet is understood too: pictures in a subfolder of the class, and a `val/`
    without classes beside a `val_annotations.txt`.
    """
    names = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    classes = {name: number for number, name in enumerate(names)}
    held_out = folder / "test"
    if (folder / "val" / NOTES).is_file() or not held_out.is_dir():
        held_out = folder / "val"
    x_train, y_train = _pictures(_labelled(folder / "train", classes))
    x_test, y_test = _pictures(_labelled(held_out, classes))
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}


def is_picture_folder(folder: Path) -> bool:
    """Does the folder hold a `train/` with classes?"""
    return (folder / "train").is_dir()


def _labelled(folder: Path, classes: dict[str, int]) -> list[tuple[Path, int]]:
    """Every picture with the number of its class, in the order of the names."""
    notes = folder / NOTES
    if notes.is_file():
        rows = [line.split("\t")[:2] for line in notes.read_text().splitlines()]
        return [(folder / "images" / file, classes[name]) for file, name in rows]
    found = []
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        if inner.name not in classes:
            raise ValueError(f"{inner} is a class that train/ does not have")
        paths = sorted(p for p in inner.rglob("*") if p.suffix.lower() in PICTURES)
        found += [(path, classes[inner.name]) for path in paths]
    return found


def _pictures(labelled: Iterable[tuple[Path, int]]) -> Arrays:
    """Decode; grey pictures become [H, W, 1], all others [H, W, 3]."""
    from PIL import Image

    images, labels, mode = [], [], None
    for path, label in labelled:
        try:
            with Image.open(path) as picture:
                mode = mode or ("L" if picture.mode in ("1", "L") else "RGB")
                pixels = np.asarray(picture.convert(mode))
        except OSError as error:
            raise ValueError(f"{path} is no readable picture: {error}") from error
        if images and pixels.shape != images[0].shape:
            raise ValueError(
                f"{path} has shape {pixels.shape}, the ones before {images[0].shape}; "
                "bring all pictures to one size first"
            )
        images.append(pixels)
        labels.append(label)
    if not images:
        raise ValueError("it holds no picture in train/<class>/ or in test/<class>/")
    return np.stack(images), np.asarray(labels)
