"""What the whole suite shares: double precision where a module asks for it, steady hypotheses."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator

import hypothesis
import jax
import pytest

from ep_jax.devices import divide_cpu

# The cores of a CPU as two devices, for what divides a batch.
divide_cpu(int(os.environ.get("EP_JAX_TEST_DEVICES", "2")))

# Most of the tests' time is compilation, and many of them compile the same programs: what one
# process compiles is there for all of a session, or of as many as share a folder.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="ep_jax-compiled-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

# Tracing makes many objects and little garbage, and where a program's lines come from interests
# nobody here: a tenth of the time each.
gc.set_threshold(100_000, 50, 100)
jax.config.update("jax_traceback_in_locations_limit", 0)

# The same examples on every run and machine; nothing is written to disk.
hypothesis.settings.register_profile(
    "ep_jax",
    max_examples=int(os.environ.get("EP_JAX_TEST_EXAMPLES", "40")),
    deadline=None,
    derandomize=True,
    database=None,
)
hypothesis.settings.load_profile("ep_jax")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that look at one run go to one worker: another would make the run again."""
    for item in items:
        for run in ("alone", "finished", "shown"):
            if run in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.xdist_group(run))


@pytest.fixture(scope="module")
def x64() -> Iterator[None]:
    """Double precision for a module: ``pytestmark = pytest.mark.usefixtures("x64")``.

    Not for the whole suite: users train in JAX's default single precision, and so do its tests.
    """
    with jax.enable_x64(True):
        yield


@pytest.fixture
def nans_allowed() -> Iterator[None]:
    """For tests that make NaNs on purpose, where the suite runs with every NaN an error."""
    with jax.debug_nans(False):
        yield


@pytest.fixture(autouse=True, scope="module")
def compiled_programs() -> Iterator[None]:
    """Programs that no other module runs: kept, they take gigabytes by the end of the suite."""
    yield
    jax.clear_caches()
