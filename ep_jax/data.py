"""Image data as NumPy arrays: scikit-learn's digits, MNIST, Fashion-MNIST, CIFAR-10, or your own.

`load` returns a `Dataset` of uint8 images and int32 labels in three fixed parts: training,
validation and test; `from_arrays` makes one of your own arrays. Nothing is ever downloaded.
`ep_jax.sources` reads what TensorFlow Datasets has prepared, or the files that were published.

    >>> from ep_jax.data import load, to_float
    >>> digits = load("digits")
    >>> digits.train_images.shape, digits.train_images.dtype
    ((998, 8, 8, 1), dtype('uint8'))
    >>> to_float(digits.test_images).max()
    np.float32(1.0)
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from ep_jax.checks import check_choice, check_integer, check_native, known
from ep_jax.extras import extra
from ep_jax.files import own_path
from ep_jax.sources import LAYOUTS, Given, Source, find

DATASETS = ("digits", *LAYOUTS)
"""The names that `load` knows."""

_DIGITS_CLASSES = 10
_DIGITS_TEST = 599  # a third of the 1,797

# Part of every cache key: a change of what is cached must change it.
_CACHE_LAYOUT = 1

# Fixed, and not the seed of a training run: all runs must share their validation and test images.
_SPLIT_SEED = 0

_Images = TypeVar("_Images", np.ndarray, jax.Array)


class Dataset(NamedTuple):
    """Labelled examples in three disjoint parts. N differs between the parts; H, W and C do not.

    Your own arrays are one of these, by `from_arrays` or as it stands: images of any shape, vectors
    ``[N, features]`` as well, uint8 (which a network sees in [0, 1]) or floating point (as it is).

    Attributes:
        name: the name it was loaded by, one of `DATASETS`, or one of your own.
        classes: number of classes; every label is in ``0 .. classes - 1``.
        train_images: ``[N, H, W, C]``, without the validation images, in their given order.
        train_labels: integers ``[N]``.
        validation_images: ``[N, H, W, C]``, held out of the given training images; may be empty.
        validation_labels: integers ``[N]``.
        test_images: ``[N, H, W, C]``, in their given order.
        test_labels: integers ``[N]``.
    """

    name: str
    classes: int
    train_images: np.ndarray
    train_labels: np.ndarray
    validation_images: np.ndarray
    validation_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load(
    name: str,
    *,
    validation: int | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Loads a dataset by name.

    The split depends on the data and on `validation` alone, so all runs share it; each part has the
    classes in the proportions of the whole (of ``"cifar10"``, whose last training images validate,
    nearly so). A smaller validation set is a subset of a larger one.

    ``"digits"`` (8 x 8 pixels) comes with scikit-learn: 599 of the 1,797 images are the test set,
    and `data_dir` and `cache_dir` are not used. ``"mnist"`` and ``"fashion_mnist"`` (28 x 28) and
    ``"cifar10"`` (32 x 32 x 3) have the official test set, in the official order. They are looked
    for in `data_dir` if that is given, and nowhere else then; otherwise in the folder that the
    environment variable ``TFDS_DATA_DIR`` names, then in ``~/tensorflow_datasets``. Any of these
    may be

    - a data folder of TensorFlow Datasets, with version 3 of the dataset in it, prepared in
      the format array_record,
    - a folder with the published files: four IDX files, each gzipped or not (which do not say which
      dataset they are), or for ``"cifar10"`` its binary or Python batches, in the folder of the
      archive or by themselves,
    - a folder with a subfolder ``<name>`` that has these files.

    Decoded arrays (55 MB, CIFAR-10 184 MB) are cached, so that only the first load is slow. Files
    that changed are read again.

    Args:
        name: one of `DATASETS`.
        validation: number of training images to hold out, from 0 to one less than there are. By
            default 200 of the digits and 5,000 of the others.
        data_dir: where the data is, see above.
        cache_dir: where decoded arrays are cached; by default the folder that the environment
            variable ``EP_JAX_CACHE`` names, or else ``~/.cache/ep_jax``. Where it cannot be
            written, a warning says so and the data is loaded all the same.

    Returns:
        The images and labels as NumPy arrays.

    Raises:
        FileNotFoundError: the data is not there; the message says how to get it.
        ValueError: `name` or `validation` is none of the above, or a file is damaged.

    Example:
        >>> digits = load("digits", validation=100)
        >>> len(digits.train_labels), len(digits.validation_labels), len(digits.test_labels)
        (1098, 100, 599)
    """
    check_choice("name", name, DATASETS)
    if name == "digits":
        given, classes, default = _digits(), _DIGITS_CLASSES, 200
    else:
        given, classes, default = _stored(name, data_dir, cache_dir), LAYOUTS[name].classes, 5_000
    held_out = default if validation is None else validation
    _check_validation(held_out, len(given.train_labels))
    hold_out = _hold_out_last if name == "cifar10" else _hold_out
    return _divided(name, classes, given, *hold_out(given.train_labels, held_out))


def _divided(name: str, classes: int, given: Given, rest: np.ndarray, held: np.ndarray) -> Dataset:
    """A data set whose training images are those at `rest`, and its validation images at `held`."""
    return Dataset(
        name=name,
        classes=classes,
        train_images=given.train_images[rest],
        train_labels=given.train_labels[rest],
        validation_images=given.train_images[held],
        validation_labels=given.train_labels[held],
        test_images=given.test_images,
        test_labels=given.test_labels,
    )


def from_arrays(
    name: str,
    train: tuple[Any, Any],
    test: tuple[Any, Any],
    *,
    validation: int,
    classes: int | None = None,
) -> Dataset:
    """A dataset of your own arrays, with a validation set held out of the training images.

    Args:
        name: what results call it.
        train: images ``[N, ...]``, uint8 or floating point, and integer labels ``[N]``.
        test: images of the same shape, and their labels.
        validation: number of training images to hold out, in the proportions of the classes.
        classes: number of classes; by default one more than the largest label.

    Raises:
        ValueError, TypeError: an array does not fit the others.

    Example:
        >>> images, labels = np.zeros((30, 5, 7, 3), np.uint8), np.arange(30) % 26
        >>> own = from_arrays("letters", (images, labels), (images, labels), validation=4)
        >>> own.classes, own.train_images.shape
        (26, (26, 5, 7, 3))
    """
    given = Given(*_pair("train", train), *_pair("test", test))
    if classes is None:
        classes = 1 + int(max(given.train_labels.max(), given.test_labels.max()))
    _check_validation(validation, len(given.train_labels))
    data = _divided(name, classes, given, *_hold_out(given.train_labels, validation))
    check_dataset(data)
    return data


def _pair(name: str, pair: Any) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of an argument, in the byte order of the machine."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(f"{name} is {type(pair).__name__}; expected a pair of images and labels")
    images, labels = (a.astype(a.dtype.newbyteorder("=")) for a in map(np.asarray, pair))
    if not images.ndim or not len(images):
        raise ValueError(f"{name} holds images of shape {images.shape}; expected (N, ...) with N "
                         "of at least 1")  # fmt: skip
    if labels.ndim == 1 and len(images) != len(labels):
        raise ValueError(f"{name} holds {len(images)} images and {len(labels)} labels; expected as "
                         "many of one as of the other")  # fmt: skip
    _check_classes(f"{name}'s labels", labels, len(images))
    return images, labels


def _check_classes(name: str, labels: Any, count: int) -> None:
    """Raise where `labels` are no integers, one for each image."""
    if np.shape(labels) != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{name} has shape {np.shape(labels)} and dtype {labels.dtype}; "
                         f"expected integers of shape ({count},)")  # fmt: skip
    check_native(name, labels.dtype)


def check_dataset(data: Any) -> None:
    """Raise where `data` is no `Dataset` that can be learned."""
    if not isinstance(data, Dataset):
        raise TypeError(f"data is {type(data).__name__}; expected an ep_jax.data.Dataset, as from "
                        "ep_jax.data.from_arrays")  # fmt: skip
    check_integer("data.classes", data.classes, at_least=2)
    shape = np.shape(data.train_images)[1:]
    for part, least in (("train", 1), ("validation", 0), ("test", 1)):
        images, labels = (getattr(data, f"{part}_{kind}") for kind in ("images", "labels"))
        name = f"data.{part}_images"
        if np.ndim(images) < 2 or np.shape(images)[1:] != shape or len(images) < least:
            wanted = "(N, H, W, C) or (N, features)" if part == "train" else f"(N, *{shape})"
            raise ValueError(f"{name} has shape {np.shape(images)}; expected {wanted} with N of at "
                             f"least {least}")  # fmt: skip
        check_pixels(name, images)
        name = f"data.{part}_labels"
        _check_classes(name, labels, len(images))
        wrong = labels[(labels < 0) | (labels >= data.classes)]
        if len(wrong):
            raise ValueError(f"{name} holds the label {wrong[0]}; expected labels in 0 .. "
                             f"{data.classes - 1}")  # fmt: skip


def check_pixels(name: str, images: Any) -> None:
    """Raise where `images` are neither uint8 nor finite floating-point numbers.

    Args:
        name: what the message calls them.
        images: an array.
    """
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise TypeError(f"{name} has dtype {images.dtype}; expected uint8 or floating point")
    check_native(name, images.dtype)
    if images.dtype != np.uint8 and known(images) and not np.isfinite(np.asarray(images)).all():
        raise ValueError(f"{name} holds values that are NaN or infinite; expected finite numbers")


def to_float(images: _Images) -> _Images:
    """Scales uint8 images to float32 in [0, 1], by division by 255; others stay as they are.

    NumPy arrays give NumPy arrays and JAX arrays give JAX arrays, also inside ``jit``. XLA
    multiplies by the reciprocal, so the two may differ in the last bit.

    Args:
        images: array of any shape, uint8 or floating point.

    Returns:
        An array of the same shape.

    Raises:
        TypeError: `images` is of another type.
    """
    check_pixels("images", images)
    return images.astype(np.float32) / 255 if images.dtype == np.uint8 else images


# Splits


def _check_validation(validation: Any, available: int) -> None:
    integer = isinstance(validation, (int, np.integer)) and not isinstance(validation, bool)
    if not integer or not 0 <= validation < available:
        raise ValueError(
            f"validation is {validation!r}; expected an integer of at least 0 and less than "
            f"{available}, the number of training images"
        )


def _hold_out(labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits the indices of `labels` into the rest and `count` held out, stratified; both sorted.

    Each class spreads its shuffled members evenly over [0, 1]; the first `count` of all are held.
    """
    # NumPy keeps the raw stream of a bit generator for ever; what is drawn from it may change.
    order = np.argsort(np.random.PCG64(_SPLIT_SEED).random_raw(len(labels)), kind="stable")
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    ranked = order[np.argsort(place[order], kind="stable")]
    return np.sort(ranked[count:]), np.sort(ranked[:count])


def _hold_out_last(labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits the indices of `labels` into the rest and the last `count`, as others have done it."""
    return np.arange(len(labels) - count), np.arange(len(labels) - count, len(labels))


def _digits() -> Given:
    with extra("digits"):
        from sklearn.datasets import load_digits  # slow, and only needed here

    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = labels.astype(np.int32)
    train, test = _hold_out(labels, _DIGITS_TEST)
    return Given(images[train], labels[train], images[test], labels[test])


def _stored(
    name: str,
    data_dir: str | os.PathLike[str] | None,
    cache_dir: str | os.PathLike[str] | None,
) -> Given:
    source = find(name, LAYOUTS[name], data_dir)
    cache = _cache_path(name, source, cache_dir)
    given = None if cache is None else _read_cache(cache)
    if given is None:
        given = source.read()
        if cache is not None:
            _write_cache(cache, given)
    return given


# Cache


def _cache_path(name: str, source: Source, cache_dir: str | os.PathLike[str] | None) -> Path | None:
    """The cached arrays of files with this content; ``None`` where there is no home for them."""
    named = cache_dir or os.environ.get("EP_JAX_CACHE")
    try:
        folder = own_path("cache_dir", named or "~/.cache/ep_jax")
    except ValueError:
        if named:
            raise
        return None
    key = hashlib.sha256(repr((_CACHE_LAYOUT, [f.name for f in source.files])).encode())
    for file in source.files:
        with file.open("rb") as stream:
            key.update(hashlib.file_digest(stream, "sha256").digest())
    return folder / f"{name}-{key.hexdigest()[:16]}.npz"


def _read_cache(file: Path) -> Given | None:
    try:
        # Opened here, because np.load leaves a damaged file open.
        with file.open("rb") as stream, np.load(stream) as arrays:
            return Given(**arrays)
    # Absent, unreadable or damaged in whatever way: the answer is to read the source again.
    except Exception:
        return None


def _write_cache(file: Path, given: Given) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            whole = Path(scratch) / file.name
            np.savez(whole, **given._asdict())
            os.replace(whole, file)  # so that nobody ever reads half a file
    except OSError as error:
        warnings.warn(
            f"cannot cache decoded data ({error}); every load will decode it again. cache_dir or "
            "the environment variable EP_JAX_CACHE names a folder that can be written",
            stacklevel=4,  # the call of load
        )
