from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import sys
import warnings
import zlib
from collections.abc import Callable
from hashlib import md5
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from ep_jax import sources
from ep_jax.data import DATASETS, Dataset, from_arrays, load, to_float

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
REAL_DATA = os.environ.get("TFDS_DATA_DIR")

# CRC-32 of the bytes after the headers of the four published IDX files, in the order above.
OFFICIAL = {
    "mnist": (4083391318, 3121080559, 3838467927, 4001760473),
    "fashion_mnist": (2925911245, 785835114, 309494841, 606848831),
}


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the data or the cache of the machine, unless it asks for it."""
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EP_JAX_CACHE", str(tmp_path / "cache"))


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes((0, 0, 8, array.ndim)) + sizes + array.astype(np.uint8).tobytes()


def write(folder: Path, *, train: int = 60, test: int = 20, first: int = 0) -> Path:
    """Writes a small dataset in which each image tells its own number in its first two pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    for images, labels, count in (
        (TRAIN_IMAGES, TRAIN_LABELS, train),
        (TEST_IMAGES, TEST_LABELS, test),
    ):
        number = np.arange(first, first + count)
        pixels = np.zeros((count, 2, 3))
        pixels[:, 0, 0], pixels[:, 0, 1] = number // 256, number % 256
        (folder / images).write_bytes(idx(pixels))
        (folder / labels).write_bytes(idx(number % 7))
    return folder


def numbers(images: np.ndarray) -> np.ndarray:
    return images[:, 0, :2, 0] @ np.array([256, 1])


def assert_same(a: Dataset, b: Dataset) -> None:
    for field, left, right in zip(a._fields, a, b, strict=True):
        np.testing.assert_array_equal(left, right, err_msg=field, strict=True)


def refuse(*_: object) -> None:
    raise AssertionError("the files were decoded again")


# Reading


def test_reads_idx_files_byte_by_byte(tmp_path: Path) -> None:
    # Height and width differ, and a size above 255 tells the byte order.
    pixels = bytes(range(256)) * 6
    image_bytes = b"\0\0\x08\x03" + b"\0\0\x01\0" + b"\0\0\0\x02" + b"\0\0\0\x03" + pixels
    label_bytes = b"\0\0\x08\x01" + b"\0\0\x01\0" + bytes(i % 10 for i in range(256))
    for file, content in (
        (TRAIN_IMAGES, image_bytes),
        (TRAIN_LABELS, label_bytes),
        (TEST_IMAGES, image_bytes),
        (TEST_LABELS, label_bytes),
    ):
        (tmp_path / file).write_bytes(content)
    dataset = load("mnist", data_dir=tmp_path, validation=0)
    assert dataset.name == "mnist"
    assert dataset.classes == 10
    assert dataset.train_images.shape == (256, 2, 3, 1)
    assert dataset.validation_images.shape == (0, 2, 3, 1)
    assert dataset.test_images[1].tolist() == [[[6], [7], [8]], [[9], [10], [11]]]
    assert dataset.train_images.tobytes() == pixels
    assert dataset.test_labels.tolist() == [i % 10 for i in range(256)]
    assert dataset.train_images.dtype == dataset.test_images.dtype == np.uint8
    assert dataset.train_labels.dtype == dataset.test_labels.dtype == np.int32


def test_every_form_and_place_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = write(tmp_path / "plain")
    write(tmp_path / "parent" / "mnist")
    zipped = write(tmp_path / "zipped")
    for file in list(zipped.iterdir()):
        (zipped / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    # Mixed up with another dataset's files, the subfolder's name decides.
    write(tmp_path / "parent", first=1)

    expected = load("mnist", data_dir=plain, validation=10)
    assert_same(load("mnist", data_dir=str(zipped), validation=10), expected)
    assert_same(load("mnist", data_dir=tmp_path / "parent", validation=10), expected)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "parent"))
    assert_same(load("mnist", validation=10), expected)
    # A folder that the caller names is never silently replaced by another one.
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError):
        load("mnist", data_dir=tmp_path / "empty", validation=10)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "empty"))
    (tmp_path / "home").mkdir()
    (tmp_path / "parent").rename(tmp_path / "home" / "tensorflow_datasets")
    assert_same(load("mnist", validation=10), expected)


IMAGES = idx(np.zeros((60, 2, 3)))
ZIPPED = gzip.compress(idx(np.zeros(60)), mtime=0)
DAMAGE = {
    "empty": (TRAIN_IMAGES, b"", "0 bytes", "00 00 08 03"),
    "half a header": (TRAIN_IMAGES, IMAGES[:12], "12 bytes", "header of 16 bytes"),
    "magic": (TRAIN_IMAGES, b"\1" + IMAGES[1:], "01 00 08 03", "00 00 08 03"),
    "type": (TRAIN_IMAGES, b"\0\0\x0d" + IMAGES[3:], "00 00 0d 03", "unsigned bytes"),
    "dimensions": (TRAIN_IMAGES, idx(np.zeros((60, 6))), "00 00 08 02", "00 00 08 03"),
    "too short": (TRAIN_IMAGES, IMAGES[:-1], "359 bytes", "360 .*60, 2, 3"),
    "too long": (TRAIN_IMAGES, IMAGES + b"\0", "361 bytes", "360 .*60, 2, 3"),
    "count": (TEST_LABELS, idx(np.zeros(19)), "19 labels", f"20, .*{TEST_IMAGES}"),
    "label": (TRAIN_LABELS, idx(np.full(60, 10)), "label 10", r"0 \.\. 9"),
    "gzip cut off": (f"{TRAIN_LABELS}.gz", ZIPPED[:-9], "damage", "gzip"),
    "gzip body": (f"{TRAIN_LABELS}.gz", ZIPPED[:10] + b"\xff" * 20, "damage", "gzip"),
    "no gzip": (f"{TRAIN_LABELS}.gz", b"something else", "damage", "gzip"),
}


@pytest.mark.parametrize(("file", "content", "found", "expected"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_named(
    tmp_path: Path, file: str, content: bytes, found: str, expected: str
) -> None:
    write(tmp_path)
    (tmp_path / file.removesuffix(".gz")).unlink()
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"{file}: found .*{found}.*; expected .*{expected}"):
        load("mnist", data_dir=tmp_path, validation=10)


def test_missing_data_tells_both_ways_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "elsewhere"))
    (write(tmp_path / "elsewhere") / TEST_LABELS).unlink()  # three of four are not enough
    with pytest.raises(FileNotFoundError) as error:
        load("fashion_mnist")
    message = str(error.value)
    for part in (
        str(tmp_path / "elsewhere"),
        str(tmp_path / "home" / "tensorflow_datasets"),
        "pip install 'ep_jax[prepare]'",
        "tfds.builder('fashion_mnist', file_format='array_record').download_and_prepare()",
        "TFDS_DATA_DIR",
        "data_dir",
        *(TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS),
        "'digits' needs no download",
    ):
        assert part in message


@pytest.mark.parametrize("validation", [-1, 60, 10.0, "10", True])
def test_a_wrong_validation_size_is_named(tmp_path: Path, validation: Any) -> None:
    with pytest.raises(ValueError, match=f"validation is {validation!r}; expected .*less than 60"):
        load("mnist", data_dir=write(tmp_path), validation=validation)


def test_an_unknown_name_is_named() -> None:
    with pytest.raises(ValueError, match="name is 'cifar'; expected one of") as error:
        load("cifar")
    assert all(name in str(error.value) for name in DATASETS)


# Splits


def test_validation_is_disjoint_stratified_and_fixed(tmp_path: Path) -> None:
    write(tmp_path, train=1000, test=300)
    dataset = load("mnist", data_dir=tmp_path, validation=200)
    train, held = numbers(dataset.train_images), numbers(dataset.validation_images)
    assert len(held) == 200
    assert sorted([*train, *held]) == list(range(1000))
    assert np.all(np.diff(train) > 0)
    assert numbers(dataset.test_images).tolist() == list(range(300))
    # Labels go with their images, and each class has its share: 1000/7 of 1000, so 200/7 of 200.
    assert np.array_equal(dataset.train_labels, train % 7)
    assert np.array_equal(dataset.validation_labels, held % 7)
    assert set(np.bincount(dataset.validation_labels)) == {28, 29}
    # It is random: not each class's first images.
    assert 400 < held.mean() < 600
    assert_same(load("mnist", data_dir=tmp_path, validation=200), dataset)
    smaller = load("mnist", data_dir=tmp_path, validation=100)
    assert set(numbers(smaller.validation_images)) < set(held)


def test_digits() -> None:
    digits = load("digits")
    assert digits.train_images.shape == (998, 8, 8, 1)
    assert digits.validation_images.shape == (200, 8, 8, 1)
    assert digits.test_images.shape == (599, 8, 8, 1)
    # 17 grey levels from 0 to 255; no image is lost, and the test set keeps for every validation.
    assert np.unique(digits.train_images).tolist() == [round(i * 255 / 16) for i in range(17)]
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.concatenate(digits[2::2]).reshape(1797, 64)
    loaded = np.column_stack([np.round(images / 255 * 16), np.concatenate(digits[3::2])])
    assert sorted(loaded.tolist()) == sorted(np.column_stack([pixels, labels]).tolist())
    assert np.abs(np.bincount(digits.test_labels) - np.bincount(labels) / 3).max() < 1
    assert np.array_equal(load("digits", validation=0).test_images, digits.test_images)
    # Published results depend on this very split.
    assert zlib.crc32(digits.validation_images.tobytes()) == 638276072
    assert zlib.crc32(digits.test_images.tobytes()) == 3014385578


def test_a_missing_one_of_several_files_is_named(tmp_path: Path) -> None:
    """Three of four files, and a message that says how to get all of them."""
    folder = write(tmp_path / "data")
    gone = sorted(folder.iterdir())[0]
    gone.unlink()
    said = rf"{folder} holds others of its files, but not {gone.name.removesuffix('.gz')}\."
    with pytest.raises(FileNotFoundError, match=said):
        load("mnist", data_dir=folder)


def test_a_copy_beside_a_version_is_no_version(tmp_path: Path) -> None:
    """``3.0.1 copy``, or 3.0.9 taken for newer than 3.0.10."""
    for version in ("3.0.9", "3.0.10", "3.0.10 copy", "3.0.11.bak", "4.0.0"):
        (tmp_path / "mnist" / version).mkdir(parents=True)
        (tmp_path / "mnist" / version / "dataset_info.json").touch()
    found = sources.find("mnist", sources.LAYOUTS["mnist"], tmp_path)
    assert found.folder == tmp_path / "mnist" / "3.0.10"


# Cache


def test_the_second_load_comes_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "data")
    first = load("mnist", data_dir=folder, cache_dir=tmp_path / "here", validation=10)
    assert [file.suffix for file in (tmp_path / "here").iterdir()] == [".npz"]
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(sources, "_read_idx", refuse)
    assert_same(load("mnist", data_dir=folder, cache_dir=tmp_path / "here", validation=10), first)


def test_changed_data_is_read_again(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    before = load("mnist", data_dir=folder, validation=0)
    times = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    write(folder, first=100)  # of the same size
    for file, time in times.items():
        os.utime(file, ns=(time, time))  # and age
    after = load("mnist", data_dir=folder, validation=0)
    assert numbers(after.train_images).tolist() == list(range(100, 160))
    # Another folder with files of the same size and age is other data too.
    other = write(tmp_path / "other", first=200)
    for file, time in times.items():
        os.utime(other / file.name, ns=(time, time))
    assert numbers(load("mnist", data_dir=other, validation=0).train_images)[0] == 200
    assert numbers(before.train_images)[0] == 0


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "incomplete", "pickled"])
def test_a_damaged_cache_is_rebuilt_silently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    folder = write(tmp_path / "data")
    first = load("mnist", data_dir=folder, validation=10)
    [cache] = (tmp_path / "cache").iterdir()
    content = bytearray(cache.read_bytes())
    if damage == "incomplete":
        np.savez(cache, train_images=first.train_images)
    elif damage == "pickled":
        objects: dict[str, Any] = dict.fromkeys(sources.Given._fields, np.array([None]))
        np.savez(cache, **objects)
    else:
        content[200] ^= 1
        cache.write_bytes({"empty": b"", "truncated": content[:-40], "flipped": content}[damage])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(load("mnist", data_dir=folder, validation=10), first)
        monkeypatch.setattr(sources, "_read_idx", refuse)
        assert_same(load("mnist", data_dir=folder, validation=10), first)


def test_loads_where_the_cache_cannot_be_written(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    expected = load("mnist", data_dir=folder, validation=10)
    (tmp_path / "file").write_text("no folder can be here")
    with pytest.warns(UserWarning, match="cannot cache") as caught:
        dataset = load("mnist", data_dir=folder, cache_dir=tmp_path / "file", validation=10)
    assert_same(dataset, expected)
    assert [warning.filename for warning in caught] == [__file__]


# Prepared data


def nested(number: int, content: bytes) -> bytes:
    """A field of a protocol buffer message that holds bytes, up to 16 KiB of them."""
    size = len(content)
    return bytes([number << 3 | 2, size % 128 | 128, size // 128]) + content


def example(image: bytes, label: int) -> bytes:
    """A `tf.train.Example`, as TFDS writes one."""
    features = {"image": nested(1, nested(1, image)), "label": nested(3, nested(1, bytes([label])))}
    entries = [nested(1, nested(1, k.encode()) + nested(2, v)) for k, v in features.items()]
    return nested(1, b"".join(entries))


def png(number: int) -> bytes:
    """An image that tells its own number, as `write` makes it."""
    pixels = np.zeros((2, 3), np.uint8)
    pixels[0, :2] = divmod(number, 256)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def prepare(folder: Path, spoil: Callable[[bytes], bytes] = bytes, label: int = 6) -> Path:
    """The data of `write` as TFDS prepares them; training image 3 is spoiled and has a label."""
    version = folder / "mnist" / "3.0.1"
    version.mkdir(parents=True)
    counts = {"train": 60, "test": 20}
    for split, count in counts.items():
        # TFDS sorts what it writes by a hash of its number.
        by_hash = sorted(range(count), key=lambda i: md5(f"{split}{i}".encode()).digest())
        file = version / f"mnist-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(file), "group_size:1")
        for i in by_hash:
            chosen = split == "train" and i == 3
            image = spoil(png(i)) if chosen else png(i)
            writer.write(example(image, label if chosen else i % 7))
        writer.close()
    splits = [
        {
            "name": split,
            "shardLengths": [str(count)],
            "numBytes": "1",
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        }
        for split, count in counts.items()
    ]
    info = {"name": "mnist", "version": "3.0.1", "fileFormat": "array_record", "splits": splits}
    (version / "dataset_info.json").write_text(json.dumps(info))
    features = {
        "image": {
            "pythonClassName": "tensorflow_datasets.core.features.image_feature.Image",
            "image": {"dtype": "uint8", "shape": {"dimensions": ["2", "3", "1"]}},
        },
        "label": {
            "pythonClassName": ("tensorflow_datasets.core.features.class_label_feature.ClassLabel"),
            "classLabel": {"numClasses": "10"},
        },
    }
    dictionary = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
    (version / "features.json").write_text(
        json.dumps({"pythonClassName": dictionary, "featuresDict": {"features": features}})
    )
    return folder


def test_prepared_data_is_what_the_idx_files_hold(tmp_path: Path) -> None:
    expected = load("mnist", data_dir=write(tmp_path / "idx"), validation=10)
    # In the IDX files image 3 has the label 3.
    assert_same(
        load("mnist", data_dir=prepare(tmp_path / "tfds", label=3), validation=10), expected
    )


SPOILT = {
    "PNG cut off": ({"spoil": lambda image: image[:45]}, "3.0.1: found .*; expected"),
    "no PNG": ({"spoil": lambda image: b"something else"}, "3.0.1: found .*; expected"),
    "label": ({"label": 10}, r"3.0.1: found the label 10; expected labels in 0 \.\. 9"),
}


@pytest.mark.parametrize(("damage", "message"), SPOILT.values(), ids=SPOILT)
def test_damaged_prepared_data_are_named(
    tmp_path: Path, damage: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load("mnist", data_dir=prepare(tmp_path, **damage))
    assert not list((tmp_path / "cache").glob("*"))


@pytest.mark.parametrize("keep", [0, 100, -1000])
@pytest.mark.parametrize("kind", ["dataset_info.json", "features.json", "mnist-train*"])
def test_prepared_files_cut_off_are_named(tmp_path: Path, kind: str, keep: int) -> None:
    [file] = prepare(tmp_path).glob(f"mnist/3.0.1/{kind}")
    content = file.read_bytes()
    file.write_bytes(content[:keep])
    with pytest.raises(ValueError, match=r"3.0.1: found .*; expected"):
        load("mnist", data_dir=tmp_path)


# CIFAR-10


BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def planes(batch: int) -> tuple[np.ndarray, list[int]]:
    """Four images of random bytes, with labels; each batch has its own."""
    rng = np.random.default_rng(batch)
    return rng.integers(0, 256, (4, 3072), dtype=np.uint8), [(batch + i) % 10 for i in range(4)]


def write_cifar(folder: Path, form: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(BATCHES):
        pixels, labels = planes(number)
        if form == "bin":
            records = np.concatenate([np.array(labels, np.uint8)[:, None], pixels], axis=1)
            (folder / f"{name}.bin").write_bytes(records.tobytes())
        else:
            batch = {b"batch_label": b"of", b"labels": labels, b"data": pixels}
            # As NumPy was called when CIFAR-10 was published.
            written = pickle.dumps(batch, protocol=2).replace(b"numpy._core", b"numpy.core")
            (folder / name).write_bytes(written)
    return folder


def test_cifar_is_the_same_in_every_form_and_place(tmp_path: Path) -> None:
    """Planes taken for rows, batches out of order, or images of another set that validate."""
    expected = load(
        "cifar10", data_dir=write_cifar(tmp_path / "a/cifar-10-batches-bin", "bin"), validation=3
    )
    assert expected.train_images.shape == (17, 32, 32, 3)
    pixels, labels = planes(1)
    red, green, blue = pixels[2].reshape(3, 32, 32)
    image = expected.train_images[6]
    assert (image == np.stack([red, green, blue], axis=-1)).all()
    assert expected.train_labels[6] == labels[2]
    assert expected.validation_labels.tolist() == planes(4)[1][1:]
    assert expected.test_labels.tolist() == planes(5)[1]
    write_cifar(tmp_path / "b/cifar10/cifar-10-batches-py", "py")
    write_cifar(tmp_path / "c", "py")
    for place in ("a", "b", "b/cifar10", "c"):
        assert_same(load("cifar10", data_dir=tmp_path / place, validation=3), expected)


class Harmful:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data_batch_2.bin", bytes(3073 * 2 - 1), "found 6145 bytes; expected a multiple of 3073"),
        ("data_batch_2.bin", b"", "found 0 bytes; expected a multiple of 3073"),
        ("test_batch.bin", bytes([10]) + bytes(3072), "found the label 10; expected labels in 0"),
        ("test_batch", pickle.dumps({b"data": Harmful(), b"labels": []}), "asks for .*system"),
        ("test_batch", pickle.dumps({b"labels": []}), "found damage"),
        ("data_batch_4", pickle.dumps({b"data": np.zeros((4, 3072)), b"labels": [0] * 4}), "float"),
    ],
)
def test_damaged_cifar_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """A stranger's pickle that runs a program, or half a batch that passes for a whole one."""
    folder = write_cifar(tmp_path / "damaged", "bin" if name.endswith(".bin") else "py")
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        load("cifar10", data_dir=folder, validation=3)


# Scaling


def test_to_float() -> None:
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    scaled = to_float(images)
    assert isinstance(scaled, np.ndarray)
    assert scaled.dtype == np.float32
    assert scaled.shape == images.shape
    assert scaled.ravel().tolist() == [np.float32(i) / np.float32(255) for i in range(256)]
    inside = jax.jit(to_float)(jnp.asarray(images))
    assert inside.dtype == jnp.float32
    assert inside.max() == 1
    np.testing.assert_array_max_ulp(np.asarray(inside), scaled, maxulp=1)
    assert to_float(scaled) is scaled
    with pytest.raises(TypeError, match="images has dtype int32; expected uint8 or floating point"):
        to_float(images.astype(np.int32))


# Real data


@pytest.mark.parametrize("name", OFFICIAL)
def test_prepared_data_is_the_official_data_in_the_official_order(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (REAL_DATA and (Path(REAL_DATA) / name).is_dir()):
        pytest.skip(f"TFDS_DATA_DIR names no folder with {name}")
    monkeypatch.setenv("TFDS_DATA_DIR", REAL_DATA)
    whole = load(name, validation=0)
    parts = (whole.train_images, whole.train_labels, whole.test_images, whole.test_labels)
    published = [array.astype(np.uint8).tobytes() for array in parts]
    assert tuple(map(zlib.crc32, published)) == OFFICIAL[name]
    assert "tensorflow" not in sys.modules
    # From here on only the cache can help.
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    default = load(name)
    assert len(default.train_images) == 55_000
    shares = np.bincount(whole.train_labels) * (5_000 / 60_000)
    assert np.abs(np.bincount(default.validation_labels) - shares).max() < 1


# Own arrays


def letters(**changed: Any) -> Any:
    """26 classes, images that are not square, colours."""
    rng = np.random.default_rng(0)
    labels = np.arange(104) % 26
    images = rng.integers(0, 256, (104, 5, 7, 3), np.uint8)
    given = {"train": (images, labels), "test": (images[:52], labels[:52]), "validation": 26}
    return from_arrays("letters", **given | changed)


def test_own_arrays_are_held_out_by_class() -> None:
    """A built-in ten; images that lose their labels."""
    data = letters()
    assert (data.name, data.classes, data.train_images.shape) == ("letters", 26, (78, 5, 7, 3))
    assert sorted(data.validation_labels) == list(range(26))
    kept = {image.tobytes() for image in (*data.train_images, *data.validation_images)}
    assert kept == {image.tobytes() for image in letters(validation=0).train_images}
    vectors = from_arrays(
        "rows", (np.eye(4), np.arange(4)), (np.eye(4), np.arange(4)), validation=0, classes=9
    )
    assert (vectors.classes, vectors.train_images.shape) == (9, (4, 4))


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"validation": 104}, ValueError, "validation is 104; expected an integer"),
        ({"classes": 20}, ValueError, "label 2[0-5]; expected labels in 0 .. 19"),
        ({"train": (np.zeros((4, 2)), np.zeros(3, int))}, ValueError, "4 images and 3 labels"),
        ({"test": (np.zeros((4, 5, 7, 1)), np.zeros(4, int))}, ValueError, "test_images has shape"),
        ({"test": (np.full((4, 5, 7, 3), np.nan), np.zeros(4, int))}, ValueError, "NaN"),
        ({"test": (np.zeros((4, 5, 7, 3), int), np.zeros(4, int))}, TypeError, "dtype int64"),
        ({"test": (np.zeros((4, 5, 7, 3)), np.zeros(4))}, ValueError, "test's labels .* integers"),
        ({"test": (np.zeros((0, 5, 7, 3)), np.zeros(0, int))}, ValueError, "N of at least 1"),
    ],
)
def test_own_arrays_that_do_not_fit_are_named(changed: Any, error: Any, said: str) -> None:
    """An error of XLA's own, or a training on labels that no output has."""
    with pytest.raises(error, match=said):
        letters(**changed)
