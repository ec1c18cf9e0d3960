"""Published image data: where their files are looked for, and how they are read.

Nothing is ever downloaded, and TensorFlow is not imported. In whatever form a data set is there,
its arrays come out the same, in the published order.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import math
import os
import pickle
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ep_jax.files import own_path


class Given(NamedTuple):
    """A data set as published: no validation images are held out yet."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


class Source(NamedTuple):
    """Where a data set was found.

    Attributes:
        folder: the folder.
        files: its files; when one of them changes, the data are read again.
        read: reads them.
    """

    folder: Path
    files: tuple[Path, ...]
    read: Callable[[], Given]


Candidate: TypeAlias = tuple[list[tuple[Path, ...]], Callable[[Sequence[Path], int], Given]]


class Layout(NamedTuple):
    """The files in which a data set was published.

    Attributes:
        classes: number of classes.
        candidates: how they may lie in a folder: for each file its possible places, and what reads
            ``(files, classes)``.
        wanted: what a user is told to put there.
    """

    classes: int
    candidates: Callable[[Path], Iterator[Candidate]]
    wanted: str


_Pair: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Images and their labels."""


def find(name: str, layout: Layout, data_dir: str | os.PathLike[str] | None) -> Source:
    """The files of the data set `name`, in whatever form.

    Args:
        name: the data set.
        layout: how it was published.
        data_dir: where to look, and nowhere else; by default in the usual places.

    Raises:
        FileNotFoundError: it is not there; the message says how to get it.
    """
    roots = _roots(data_dir)
    for root in roots:
        # The subfolders come first: their name tells which dataset they have.
        folder = root / name
        for found in (
            _published(layout, folder),
            _prepared_source(folder, layout.classes),
            _published(layout, root),
        ):
            if found:
                return found
    raise FileNotFoundError(_how_to_get(name, layout, roots))


def _roots(data_dir: str | os.PathLike[str] | None) -> list[Path]:
    # A folder that the caller names must not silently be replaced by another one.
    if data_dir is not None:
        return [own_path("data_dir", data_dir)]
    named = os.environ.get("TFDS_DATA_DIR")
    roots = [own_path("TFDS_DATA_DIR", named)] if named else []
    with contextlib.suppress(ValueError):  # there is no home folder
        roots.append(own_path("data_dir", "~/tensorflow_datasets"))
    return roots


def _published(layout: Layout, folder: Path) -> Source | None:
    """The published files in a folder, where all of them are there."""
    for needed, read in layout.candidates(folder):
        files = [file for choices in needed if (file := _first_file(choices))]
        if len(files) == len(needed):
            read = functools.partial(read, files, layout.classes)
            return Source(files[0].parent, tuple(files), read)
    return None


def _first_file(choices: Iterable[Path]) -> Path | None:
    return next((path for path in choices if path.is_file()), None)


def _lacking(layout: Layout, folder: Path) -> str:
    """What a folder lacks that holds some of the published files."""
    for needed, _ in layout.candidates(folder):
        lacking = [choices[0] for choices in needed if _first_file(choices) is None]
        if 0 < len(lacking) < len(needed):
            names = ", ".join(file.name for file in lacking)
            return f" {lacking[0].parent} holds others of its files, but not {names}."
    return ""


def _how_to_get(name: str, layout: Layout, roots: Sequence[Path]) -> str:
    prepare = (
        "import tensorflow_datasets as tfds; "
        f"tfds.builder('{name}', file_format='array_record').download_and_prepare()"
    )
    lacking = "".join(_lacking(layout, place) for root in roots for place in (root / name, root))
    places = " or ".join(repr(str(root)) for root in roots)
    return f"""no data of {name!r} in {places}.{lacking} There are two ways to get it:
(1) TensorFlow Datasets downloads and prepares it (version 3), once, with
    pip install 'ep_jax[prepare]'
    python -c "{prepare}"
    in the folder that the environment variable TFDS_DATA_DIR names, or ~/tensorflow_datasets.
(2) Put {layout.wanted}
    into a folder, or its subfolder {name}, and pass that folder as data_dir.
The dataset 'digits' needs no download."""


def _check_labels(source: Path, labels: np.ndarray, classes: int) -> None:
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise ValueError(
            f"{source}: found the label {wrong[0]}; expected labels in 0 .. {classes - 1}"
        )


# IDX files: MNIST, FashionMNIST

_IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def _idx_candidates(folder: Path) -> Iterator[Candidate]:
    yield [(folder / file, folder / f"{file}.gz") for file in _IDX_FILES], _read_idx_files


def _read_idx_files(files: Sequence[Path], classes: int) -> Given:
    train_images, train_labels, test_images, test_labels = files
    train = _read_pair(train_images, train_labels, classes)
    return Given(*train, *_read_pair(test_images, test_labels, classes))


def _read_pair(images_file: Path, labels_file: Path, classes: int) -> _Pair:
    images, labels = _read_idx(images_file, 3), _read_idx(labels_file, 1)
    if len(labels) != len(images):
        raise ValueError(
            f"{labels_file}: found {len(labels)} labels; expected {len(images)}, one for each "
            f"image in {images_file}"
        )
    _check_labels(labels_file, labels, classes)
    return images[..., np.newaxis], labels.astype(np.int32)


def _read_idx(file: Path, dims: int) -> np.ndarray:
    """The uint8 array of `dims` dimensions in an IDX file, gzipped if its name ends in .gz."""
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file}: found damage ({error}); expected a whole gzip file") from error

    # Two zeros, the type (8: unsigned bytes), the number of dimensions; then each one's size.
    magic = bytes((0, 0, 8, dims))
    header = 4 + 4 * dims
    if data[:4] != magic or len(data) < header:
        raise ValueError(
            f"{file}: found {len(data)} bytes, the first of them {data[:4].hex(' ') or 'missing'}; "
            f"expected an IDX header of {header} bytes, the first of them {magic.hex(' ')} "
            f"(unsigned bytes in {dims} dimensions)"
        )
    shape = np.frombuffer(data, ">u4", count=dims, offset=4).tolist()
    if len(data) != header + math.prod(shape):
        raise ValueError(
            f"{file}: found {len(data) - header} bytes after the header; expected "
            f"{math.prod(shape)} for the shape {shape}"
        )
    # A copy, because what shares memory with bytes cannot be written.
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy()


# CIFAR-10: batches of red, green and blue planes, as bytes or as pickled dictionaries

_CIFAR_SIDE = 32
_CIFAR_NAMES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")


def _cifar_candidates(folder: Path) -> Iterator[Candidate]:
    for ending, inner, read in (
        (".bin", "cifar-10-batches-bin", _read_binary_batch),
        ("", "cifar-10-batches-py", _read_python_batch),
    ):
        for place in (folder / inner, folder):
            needed = [(place / f"{name}{ending}",) for name in _CIFAR_NAMES]
            yield needed, functools.partial(_read_batches, read=read)


def _read_batches(
    files: Sequence[Path], classes: int, *, read: Callable[[Path], tuple[Any, Any]]
) -> Given:
    def arrays(files: Sequence[Path]) -> _Pair:
        pairs = []
        for file in files:
            planes, labels = map(np.asarray, read(file))
            if len(planes) != len(labels):
                raise ValueError(f"{file}: found {len(planes)} images and {len(labels)} labels; "
                                 "expected as many of one as of the other")  # fmt: skip
            _check_labels(file, labels, classes)
            pairs.append((planes.reshape(-1, 3, _CIFAR_SIDE, _CIFAR_SIDE), labels))
        images, labels = map(np.concatenate, zip(*pairs, strict=True))
        return np.ascontiguousarray(images.transpose(0, 2, 3, 1)), labels.astype(np.int32)

    return Given(*arrays(files[:-1]), *arrays(files[-1:]))


def _read_binary_batch(file: Path) -> tuple[Any, Any]:
    data, record = np.frombuffer(file.read_bytes(), np.uint8), 1 + 3 * _CIFAR_SIDE**2
    if not len(data) or len(data) % record:
        raise ValueError(f"{file}: found {len(data)} bytes; expected a multiple of {record}: a "
                         "label and 3 planes of 32x32 pixels for each image")  # fmt: skip
    records = data.reshape(-1, record)
    return records[:, 1:], records[:, 0]


class _ArraysAlone(pickle.Unpickler):
    """Reads the arrays, numbers and texts of a pickled batch, and runs nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """NumPy's arrays, under the names that they had at any time."""
        if module.startswith("numpy") and name in ("_reconstruct", "ndarray", "dtype"):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _read_python_batch(file: Path) -> tuple[Any, Any]:
    try:
        with file.open("rb") as stream:
            found = _ArraysAlone(stream, encoding="bytes").load()
        planes, labels = found[b"data"], found[b"labels"]
        if planes.dtype != np.uint8 or planes.shape != (len(labels), 3 * _CIFAR_SIDE**2):
            raise ValueError(f"data of dtype {planes.dtype} and shape {planes.shape}")
    # Which exception it is depends on the damage.
    except Exception as error:
        raise ValueError(f"{file}: found damage ({error}); expected a pickled batch of CIFAR-10, "
                         "with uint8 data [N, 3072] and labels") from error  # fmt: skip
    return planes, labels


# TensorFlow Datasets

# TFDS shuffles what it prepares, and promises the same order within a major version only.
_TFDS_VERSION = re.compile(r"3\.\d+\.\d+")


def _prepared_source(folder: Path, classes: int) -> Source | None:
    versions = [
        info.parent
        for info in folder.glob("*/dataset_info.json")
        if _TFDS_VERSION.fullmatch(info.parent.name)  # and no copy beside it
    ]
    if not versions:
        folders = sorted(f.name for f in folder.glob("*") if f.is_dir())
        for version in filter(_TFDS_VERSION.fullmatch, folders):
            raise ValueError(f"{folder / version} lacks dataset_info.json; expected what "
                             "TensorFlow Datasets prepares")  # fmt: skip
        return None
    newest = max(versions, key=lambda version: [int(n) for n in version.name.split(".")])
    read = functools.partial(_read_prepared, newest, classes)
    return Source(newest, tuple(sorted(newest.iterdir())), read)


def _read_prepared(folder: Path, classes: int) -> Given:
    import tensorflow_datasets as tfds  # slow, and not needed where the cache has the data

    try:
        builder = tfds.builder_from_directory(folder)
        given = Given(*_read_split(builder, "train"), *_read_split(builder, "test"))
    # Which exception it is depends on the file, the format and the library that reads it.
    except Exception as error:
        raise ValueError(
            f"{folder}: found data that TensorFlow Datasets cannot read ({error}); expected a "
            "dataset that it prepared in the format array_record"
        ) from error
    for labels in (given.train_labels, given.test_labels):
        _check_labels(folder, labels, classes)
    return given


def _read_split(builder: Any, split: str) -> _Pair:
    source = builder.as_data_source(split=split)
    # All at once takes a third of the time that one by one does.
    examples = source.__getitems__(range(len(source)))
    official = np.argsort(_prepared_order(split, len(source)))
    images = np.stack([example["image"] for example in examples])
    labels = np.array([example["label"] for example in examples], np.int32)
    return images[official], labels[official]


def _prepared_order(split: str, count: int) -> list[int]:
    """The official indices of a prepared split's examples: TFDS sorts them by a hash of these."""

    def digest(index: int) -> bytes:
        return hashlib.md5(f"{split}{index}".encode(), usedforsecurity=False).digest()

    return sorted(range(count), key=digest)


_IDX = Layout(
    classes=10,
    candidates=_idx_candidates,
    wanted="its four IDX files, each gzipped (with .gz at the end of its name) or not,\n    "
    + ", ".join(_IDX_FILES),
)
LAYOUTS = {
    "mnist": _IDX,
    "fashion_mnist": _IDX,
    "cifar10": Layout(
        classes=10,
        candidates=_cifar_candidates,
        wanted="the folder cifar-10-batches-bin or cifar-10-batches-py of the published archives",
    ),
}
"""The data sets that are read from files."""
