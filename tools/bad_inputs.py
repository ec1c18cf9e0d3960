"""Every bad input that the tests know, with the message it gets, as Markdown.

python tools/bad_inputs.py > docs/bad_inputs.md
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import jax
import tyro

import ep_jax as ep
from ep_jax.data import load
from ep_jax.tables import markdown

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("tests", "experiments")]

import test_checkpoint  # noqa: E402
import test_data  # noqa: E402
import test_input_checks  # noqa: E402
import test_run  # noqa: E402


def said(call: Callable[[], object]) -> str:
    """What a call complains of."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            call()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, str) else printed.getvalue()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("a bad input was accepted")


def told(folder: str, call: Callable[[], object]) -> str:
    """`said`, whatever folder it was this time."""
    return said(call).replace(folder, "DIR")


def in_a_line(message: str) -> str:
    """A message without usage, rules around it, and addresses in memory."""
    message = re.sub(r"^usage:.*(?=train.py: error)|-{4,}", "", message, flags=re.DOTALL)
    message = re.sub(r"\b0x[0-9a-f]+", "0x...", message)  # addresses in memory differ each time
    return " ".join(message.split())


def library() -> Iterator[tuple[str, str]]:
    """Arguments of the library."""
    for name, (call, *_) in test_input_checks.CASES.items():
        yield name, said(call)


def data_files() -> Iterator[tuple[str, str]]:
    """Damaged IDX files."""
    for name, (file, content, *_) in test_data.DAMAGE.items():
        with tempfile.TemporaryDirectory() as folder:
            test_data.write(Path(folder))
            (Path(folder) / file.removesuffix(".gz")).unlink()
            (Path(folder) / file).write_bytes(content)
            yield f"{file}: {name}", told(folder, lambda at=folder: load("mnist", data_dir=at))


def prepared_data() -> Iterator[tuple[str, str]]:
    """Damaged data of TensorFlow Datasets."""
    for name, (damage, _) in test_data.SPOILT.items():
        with tempfile.TemporaryDirectory() as folder:
            test_data.prepare(Path(folder), **damage)
            yield name, told(folder, lambda at=folder: load("mnist", data_dir=at))


def weights() -> Iterator[tuple[str, str]]:
    """Damaged weights folders."""
    spec = test_checkpoint.SPECS[0]
    for damage in test_checkpoint.DAMAGES:
        with tempfile.TemporaryDirectory() as folder:
            params = ep.init_params(jax.random.key(0), spec)
            ep.save_weights(folder, params, spec, ep.Phases())
            damage(Path(folder))
            name = damage.__name__.removeprefix("damage_").replace("_", " ")
            yield name, told(folder, lambda at=folder: ep.load_weights(at))


def command_lines() -> Iterator[tuple[str, str]]:
    """Arguments of experiments/train.py."""
    import train

    for words, _ in test_run.BAD_WORDS:
        with mock.patch.object(sys, "argv", ["train.py", "--out", "new", *words]):
            yield f"`{' '.join(words)}`", said(train.main)


PARTS = {
    "Arguments of the library": library,
    "Data files (IDX)": data_files,
    "Data prepared by TensorFlow Datasets": prepared_data,
    "Weights folders": weights,
    "Command line of experiments/train.py": command_lines,
}


def main() -> None:
    """Print the table."""
    tyro.cli(lambda: None, description=__doc__)
    print("# Bad input, and what it is told\n\nMade by `python tools/bad_inputs.py`.")
    for part, cases in PARTS.items():
        rows = [(name, in_a_line(message)) for name, message in cases()]
        print(f"\n## {part}\n\n{markdown(('input', 'message'), rows)}", end="")


if __name__ == "__main__":
    main()
