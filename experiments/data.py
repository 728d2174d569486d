"""Image data sets from local files, verified, as arrays in memory.

`load` finds a data set, checks that it is what it is called, and returns uint8 arrays.
`batch` says which rows the training sees at a step, as a pure function of (seed, step):
the position of a run in its data is the integer step, and nothing else is saved.
"""

import functools
import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments import formats
from experiments.runs import RunError


FourArrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
KEYS = ("x_train", "y_train", "x_test", "y_test")
DIRECTORY = "CERTJAX_DATA_DIR"


class DataError(RunError):
    """The data are missing, damaged, or not what they should be."""


class Dataset(NamedTuple):
    """A training and a test split, read-only.

    x_train, x_test: [N, H, W, C] uint8.  y_train, y_test: [N] int32 in [0, classes).
    classes: number of classes.  name: what it was asked for as.
    sha256: digest of the four arrays, the same for every file format: see `digest`.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: int
    name: str
    sha256: str


class File(NamedTuple):
    """A published file: its path, where it is published, "sha256:..." or "md5:..."."""

    path: str
    url: str
    hash: str | None


class Source(NamedTuple):
    """Files that together hold a data set, and how their bytes become arrays."""

    files: tuple[File, ...]
    read: Callable[[Mapping[str, bytes]], Mapping[str, np.ndarray]]


class Known(NamedTuple):
    """A published data set: sha256 is the digest of its arrays where that is known."""

    classes: int
    shape: tuple[int, int, int]
    sources: tuple[Source, ...] = ()
    folders: tuple[str, ...] = ()
    sha256: str | None = None


def load(
    name: str, dir: str | Path | None = None, *, sha256: str | None = None
) -> Dataset:
    """A data set of the given name, from the folder `dir`.

    `digits` is inside scikit-learn and needs no file. The others are read from
    `<name>.npz` (with x_train, y_train, x_test, y_test) or their official files, in
    `dir`, in `dir/<name>`, or where torchvision keeps them: mnist and fashion_mnist
    (IDX, also gzipped), cifar10 and cifar100 (the Python version, archived or not),
    svhn (MATLAB), tinyimagenet (its folder). Any other name is data of your own:
    `<name>.npz`, or pictures in `<name>/train/<class>/` and `<name>/test/<class>/`.

    Published data must have a known hash, of their files or of their content. Missing
    files are downloaded where pooch is installed (`pip install 'certjax[data]'`).

    Args:
      name: see above.
      dir: the folder; None: the environment's CERTJAX_DATA_DIR.
      sha256: the digest that the content must have (that of the npz file also counts).
        Where it is given it replaces the known hashes.

    Raises:
      DataError: what was found, what was expected, and how to mend it.
    """
    chosen = dir or os.environ.get(DIRECTORY) or None
    folder = Path(chosen).expanduser().resolve() if chosen else None
    if folder is not None and name != "digits" and not folder.is_dir():
        raise DataError(f"the data folder {folder} does not exist; set data.dir to one")
    return _load(name, folder, sha256.lower() if sha256 else None)


@functools.lru_cache(maxsize=4)
def _load(name: str, folder: Path | None, sha256: str | None) -> Dataset:
    if name == "digits":
        return _accepted(_digits(), name, "scikit-learn's digits", sha256, ())
    paths, source = _found(name, folder) or _downloaded(name, folder)
    where = ", ".join(str(path) for path in paths)
    content = {
        file.path: path.read_bytes()
        for file, path in zip(source.files, paths, strict=False)
        if path.is_file()
    }
    arrays = _decoded(source, content, where)
    if sha256 and len(content) == 1 and sha256 in map(_sha256, content.values()):
        sha256 = digest(_checked(name, arrays, where))  # the file's own hash was given
    return _accepted(arrays, name, where, sha256, _differences(source, content))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _decoded(
    source: Source, content: Mapping[str, bytes], where: str
) -> Mapping[str, np.ndarray]:
    try:
        return source.read(content)
    except formats.TORN as error:
        origin = " ".join(file.url for file in source.files if file.url)
        again = f"; fetch it again from {origin}" if origin else ""
        raise DataError(
            f"{where} cannot be read: {str(error) or type(error).__name__}; it is torn "
            f"or of another format{again}"
        ) from error


def _differences(source: Source, content: Mapping[str, bytes]) -> tuple[str, ...]:
    """For each file that is not the published one: what its hash is and should be."""
    found = []
    for file in source.files:
        if file.hash is None:
            found.append(f"{file.path}: no hash is known for this form of the data")
            continue
        kind, expected = file.hash.split(":")
        got = hashlib.new(kind, content[file.path], usedforsecurity=False).hexdigest()
        if got != expected:
            again = f", fetch it again from {file.url}" if file.url else ""
            found.append(f"{file.path}: got {kind} {got}, expected {expected}{again}")
    return tuple(found)


def _accepted(
    arrays: Mapping[str, np.ndarray],
    name: str,
    where: str,
    sha256: str | None,
    differences: tuple[str, ...],
) -> Dataset:
    """The data set, if its shapes, labels and hash are as they must be."""
    dataset = _checked(name, arrays, where)
    found, known = dataset.sha256, KNOWN.get(name)
    if sha256 is not None and sha256 != found:
        raise DataError(
            f"{where}: the content has sha256 {found}, data.sha256 asks for {sha256}; "
            "correct the one or the other"
        )
    published = known is not None and known.sha256 == found
    if sha256 is None and known is not None and differences and not published:
        raise DataError(
            f"{where} is not the published {name}. {'. '.join(differences)}. "
            f"To use it nevertheless: data.sha256={found}"
        )
    return dataset


def _checked(name: str, arrays: Mapping[str, np.ndarray], where: str) -> Dataset:
    """Bring the four arrays to their shapes and types, or say what is wrong."""
    known = KNOWN.get(name)
    x_test = _images(arrays, "x_test", where)
    y_test = _labels(arrays, "y_test", len(x_test), where)
    if "x_train" not in arrays:  # a test set alone can be certified
        arrays = dict(arrays) | {"x_train": x_test[:0], "y_train": y_test[:0]}
    x_train = _images(arrays, "x_train", where)
    y_train = _labels(arrays, "y_train", len(x_train), where)
    shape = known.shape if known else x_test.shape[1:]
    for key, images in (("x_train", x_train), ("x_test", x_test)):
        if images.shape[1:] != shape:
            raise DataError(
                f"{where}: {key} holds images of shape {images.shape[1:]}, expected "
                f"{shape} (height, width, channels)"
            )
    highest = int(max(y_train.max(initial=0), y_test.max(initial=0)))
    classes = known.classes if known else highest + 1
    if highest >= classes:
        raise DataError(f"{where}: label {highest}, expected 0 to {classes - 1}")
    for array in (x_train, y_train, x_test, y_test):
        array.setflags(write=False)  # the data set is shared by all who load it
    dataset = Dataset(x_train, y_train, x_test, y_test, classes, name, "")
    return dataset._replace(sha256=digest(dataset))


def _array(arrays: Mapping[str, np.ndarray], key: str, where: str) -> np.ndarray:
    if key not in arrays:
        raise DataError(
            f"{where}: no array {key}, found {', '.join(sorted(arrays)) or 'none'}; "
            f"expected {', '.join(KEYS)}"
        )
    return np.asarray(arrays[key])


def _images(arrays: Mapping[str, np.ndarray], key: str, where: str) -> np.ndarray:
    images = _array(arrays, key, where)
    if images.dtype != np.uint8:
        raise DataError(
            f"{where}: {key} has type {images.dtype}, expected uint8 (0 to 255); "
            "convert images in [0, 1] with (255 * x).round().astype('uint8')"
        )
    if images.ndim not in (3, 4) or 0 in images.shape[1:]:
        raise DataError(
            f"{where}: {key} has shape {images.shape}, expected [N, height, width] or "
            "[N, height, width, channels]"
        )
    images = images[..., None] if images.ndim == 3 else images
    return np.ascontiguousarray(images).view()  # a view: the flags of ours, not theirs


def _labels(
    arrays: Mapping[str, np.ndarray], key: str, count: int, where: str
) -> np.ndarray:
    labels = _array(arrays, key, where)
    if labels.dtype.kind not in "iu":
        raise DataError(f"{where}: {key} has type {labels.dtype}, expected integers")
    if labels.shape not in ((count,), (count, 1)):
        raise DataError(
            f"{where}: {key} has shape {labels.shape}, expected ({count},) for "
            f"{count} images"
        )
    if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) < 2**31:
        raise DataError(f"{where}: {key} holds the label {labels.min()}, expected >= 0")
    return labels.reshape(count).astype(np.int32)


def digest(dataset: Dataset) -> str:
    """Sha256 of the names, shapes and values of the four arrays."""
    total = hashlib.sha256()
    for key in KEYS:
        array = getattr(dataset, key)
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        total.update(f"{key} {little.dtype.str} {little.shape}\n".encode())
        total.update(np.ascontiguousarray(little).data)
    return total.hexdigest()


def _found(name: str, folder: Path | None) -> tuple[list[Path], Source] | None:
    """The first source whose files are all there, and where they are."""
    if folder is None:
        return None
    bases = [folder / inner for inner in ("", name, *_known(name).folders)]
    for source in (_npz(name), *_known(name).sources):
        for base in bases:
            paths = [base / file.path for file in source.files]
            if all(path.is_file() for path in paths):
                return paths, source
    pictures = [b for b in bases if b != folder and formats.is_picture_folder(b)]
    if not pictures:
        return None
    # where the data are published as pictures there is no other hash to ask for
    unpublished = (File(pictures[0].name, "", None),) if _known(name).sources else ()
    return pictures[:1], Source(unpublished, lambda _: formats.read_folder(pictures[0]))


def _known(name: str) -> Known:
    """What is known of the name; nothing for data of the user's own."""
    return KNOWN.get(name, Known(0, (0, 0, 0)))


def _downloaded(name: str, folder: Path | None) -> tuple[list[Path], Source]:
    """Download the first source with pooch, or say what is missing."""
    sources = [s for s in _known(name).sources if all(f.url for f in s.files)]
    if not sources:
        raise DataError(_missing(name, folder))
    if importlib.util.find_spec("pooch") is None:
        raise DataError(_missing(name, folder))
    import pooch

    source, target = sources[0], (folder or _cache()) / name
    try:
        for file in source.files:
            pooch.retrieve(file.url, file.hash, fname=file.path, path=target)
    except (OSError, ValueError) as error:
        raise DataError(
            f"the download of {name} failed: {error}\n{_missing(name, folder)}"
        ) from error
    return [target / file.path for file in source.files], source


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "certjax" / "data"


def _missing(name: str, folder: Path | None) -> str:
    """Which files are wanted, where they come from, and what their hashes are."""
    place = f"in {folder}" if folder else f"(no data.dir and no {DIRECTORY} is set)"
    lines = [
        f"no data set {name!r} {place}; expected {name}.npz with {', '.join(KEYS)}"
    ]
    known = KNOWN.get(name)
    if known is None:
        published = ", ".join(["digits", *KNOWN])
        lines.append(
            f"or pictures in {name}/train/<class>/; published sets: {published}"
        )
    elif known.sources:
        lines.append("or the official files:")
        lines += [f"  {f.path}  {f.hash}\n    {f.url}" for f in known.sources[0].files]
        lines.append("pip install 'certjax[data]' lets certjax download them")
    else:
        lines.append(f"or the official folder: {' or '.join(known.folders)}")
    return "\n".join(lines)


def _digits() -> dict[str, np.ndarray]:
    """scikit-learn's 1,797 digits of 8 x 8 pixels: 1,433 to train on, 364 to test on.

    The grey levels 0 to 16 become round(level * 255 / 16). Of each class every fifth
    digit, in the order of the file, is a test digit. The file is read directly: to
    import scikit-learn would take longer than all of JAX.
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("the digits are part of scikit-learn: pip install scikit-learn")
    home = Path(spec.submodule_search_locations[0])
    table = np.loadtxt(home / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    levels, labels = table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int32)
    images = np.round(levels * 255 / 16).astype(np.uint8)
    test = np.zeros(len(labels), bool)
    for label in range(10):
        test[np.flatnonzero(labels == label)[::5]] = True
    train = ~test
    return {
        "x_train": images[train],
        "y_train": labels[train],
        "x_test": images[test],
        "y_test": labels[test],
    }


def split(dataset: Dataset, *, validation: float | int, seed: int = 0) -> Dataset:
    """Hold out part of the training split, for choosing models without the test split.

    Args:
      dataset: its own test split is dropped.
      validation: how much of each class: a share in (0, 1), or about how many in all.
      seed: which rows.

    Returns:
      A data set whose test split is the held-out part.
    """
    count = len(dataset.y_train)
    share = validation / max(count, 1) if validation >= 1 else validation
    held_out = np.zeros(count, bool)
    rng = np.random.default_rng(seed)
    for label in range(dataset.classes):
        rows = rng.permutation(np.flatnonzero(dataset.y_train == label))
        held_out[rows[: max(0, round(share * len(rows)))]] = True
    if not 0 < held_out.sum() < count:
        raise DataError(
            f"validation={validation} holds out {held_out.sum()} of {count} training "
            "images; expected a share in (0, 1), or a number that is one for each class"
        )
    x, y, name = dataset.x_train, dataset.y_train, f"{dataset.name}-validation"
    arrays = (x[~held_out], y[~held_out], x[held_out], y[held_out])
    return _derived(dataset, arrays, name)


def subset(
    dataset: Dataset,
    *,
    train: int | None = None,
    test: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Randomly chosen rows, in their order; None or too large a number: all rows."""
    rng = np.random.default_rng(seed)
    chosen = [
        np.sort(rng.permutation(len(labels))[:wanted])
        for labels, wanted in ((dataset.y_train, train), (dataset.y_test, test))
    ]
    arrays = (
        dataset.x_train[chosen[0]],
        dataset.y_train[chosen[0]],
        dataset.x_test[chosen[1]],
        dataset.y_test[chosen[1]],
    )
    return _derived(dataset, arrays, f"{dataset.name}-subset")


def _derived(dataset: Dataset, arrays: FourArrays, name: str) -> Dataset:
    derived = Dataset(*arrays, classes=dataset.classes, name=name, sha256="")
    return derived._replace(sha256=digest(derived))


def batch(count: int, size: int, *, seed: int, step: int) -> np.ndarray:
    """[size] rows of the training split that the given step sees.

    Each epoch is a new permutation, cut into count // size batches of equal size; the
    remainder of an epoch is left out. A pure function of its arguments.

    Args:
      count: rows of the training split.
      size: rows of a batch.
      seed: the seed of the run.
      step: steps completed before this one.
    """
    if not 1 <= size <= count:
        raise DataError(
            f"a batch of {size} from {count} training images; expected 1 to {count}"
        )
    epoch, position = divmod(step, count // size)
    return _permutation(count, seed, epoch)[position * size : (position + 1) * size]


@functools.lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    rows = np.random.default_rng([seed, epoch]).permutation(count)
    rows.setflags(write=False)
    return rows


def _npz(name: str) -> Source:
    """`<name>.npz`, whose hash is known by its content only."""
    path = f"{name}.npz"
    return Source((File(path, "", None),), lambda files: formats.read_npz(files[path]))


def _published(home: str, path: str, hash: str) -> File:
    return File(path, home + path, hash)


def _idx(suffix: str, url: str, hashes: tuple[str, ...]) -> Source:
    """The four files of MNIST and of the data sets published in its form."""
    stems = {
        "x_train": "train-images-idx3-ubyte",
        "y_train": "train-labels-idx1-ubyte",
        "x_test": "t10k-images-idx3-ubyte",
        "y_test": "t10k-labels-idx1-ubyte",
    }
    paths = {key: stem + suffix for key, stem in stems.items()}
    files = tuple(
        File(path, url and url + path, hash)
        for path, hash in zip(paths.values(), hashes, strict=True)
    )
    return Source(
        files,
        lambda files: {key: formats.read_idx(files[p]) for key, p in paths.items()},
    )


def _cifar(
    archive: File, folder: str, train: Mapping[str, str], test: Mapping[str, str]
) -> tuple[Source, Source]:
    """CIFAR's Python version: the archive, and the same unpacked (known by md5)."""

    def read(files: Mapping[str, bytes]) -> dict[str, np.ndarray]:
        parts = {
            which: list(_batches(files, folder, names))
            for which, names in (("train", train), ("test", test))
        }
        return {
            f"{letter}_{which}": np.concatenate([part[place] for part in parts[which]])
            for which in parts
            for place, letter in enumerate("xy")
        }

    def read_archive(files: Mapping[str, bytes]) -> dict[str, np.ndarray]:
        return read(formats.read_tar(files[archive.path]))

    unpacked = tuple(
        File(f"{folder}/{name}", "", f"md5:{md5}")
        for name, md5 in {**train, **test}.items()
    )
    return Source((archive,), read_archive), Source(unpacked, read)


def _batches(
    files: Mapping[str, bytes], folder: str, names: Mapping[str, str]
) -> Iterator[formats.Arrays]:
    for name in names:
        yield formats.read_cifar(files[f"{folder}/{name}"])


def _svhn(files: Mapping[str, bytes]) -> dict[str, np.ndarray]:
    x_train, y_train = formats.read_svhn(files["train_32x32.mat"])
    x_test, y_test = formats.read_svhn(files["test_32x32.mat"])
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}


# The hashes of the files are those that others verify: TensorFlow Datasets (sha256 of
# MNIST, Fashion-MNIST, SVHN), Keras (CIFAR's archives), torchvision (CIFAR's batches).
MNIST_GZ = (
    "sha256:440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "sha256:3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "sha256:8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "sha256:f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
)
MNIST = (
    "md5:6bbc9ace898e44ae57da46a324031adb",
    "md5:a25bea736e30d166cdddb491f175f624",
    "md5:2646ac647ad5339dbf082846283269ea",
    "md5:27ae3e4e09519cfbb04c329615203637",
)
FASHION_GZ = (
    "sha256:3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "sha256:a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "sha256:346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "sha256:67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
)
FASHION = (
    "md5:f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "md5:9018921c3c673c538a1fc5bad174d6f9",
    "md5:8181f5470baa50b63fa0f6fddb340f0a",
    "md5:15d484375f8d13e6eb1aabb0c3f46965",
)
CIFAR10 = "sha256:6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
CIFAR100 = "sha256:85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7"
SVHN_TRAIN = "sha256:435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8"
SVHN_TEST = "sha256:cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b"

GOOGLE = "https://storage.googleapis.com/cvdf-datasets/mnist/"
ZALANDO = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
TORONTO = "https://www.cs.toronto.edu/~kriz/"
STANFORD = "http://ufldl.stanford.edu/housenumbers/"

KNOWN: dict[str, Known] = {
    "mnist": Known(
        classes=10,
        shape=(28, 28, 1),
        sources=(_idx(".gz", GOOGLE, MNIST_GZ), _idx("", "", MNIST)),
        folders=("MNIST/raw",),
        sha256="c53c9e1d8f0ff6b53c9110fdd439e0995f1da0bb819e02b05a51b2a9409cb86b",
    ),
    "fashion_mnist": Known(
        classes=10,
        shape=(28, 28, 1),
        sources=(_idx(".gz", ZALANDO, FASHION_GZ), _idx("", "", FASHION)),
        folders=("FashionMNIST/raw",),
    ),
    "cifar10": Known(
        classes=10,
        shape=(32, 32, 3),
        sources=_cifar(
            _published(TORONTO, "cifar-10-python.tar.gz", CIFAR10),
            "cifar-10-batches-py",
            train={
                "data_batch_1": "c99cafc152244af753f735de768cd75f",
                "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
                "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
                "data_batch_4": "634d18415352ddfa80567beed471001a",
                "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            },
            test={"test_batch": "40351d587109b95175f43aff81a1287e"},
        ),
    ),
    "cifar100": Known(
        classes=100,
        shape=(32, 32, 3),
        sources=_cifar(
            _published(TORONTO, "cifar-100-python.tar.gz", CIFAR100),
            "cifar-100-python",
            train={"train": "16019d7e3df5f24257cddd939b257f8d"},
            test={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        ),
    ),
    "svhn": Known(
        classes=10,
        shape=(32, 32, 3),
        sources=(
            Source(
                (
                    _published(STANFORD, "train_32x32.mat", SVHN_TRAIN),
                    _published(STANFORD, "test_32x32.mat", SVHN_TEST),
                ),
                _svhn,
            ),
        ),
    ),
    "tinyimagenet": Known(
        classes=200, shape=(64, 64, 3), folders=("tiny-imagenet-200",)
    ),
}
