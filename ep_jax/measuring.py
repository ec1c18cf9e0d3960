"""Time and memory of compiled programs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np


class Timing(NamedTuple):
    """Seconds of a call: median, and the quartiles of the calls."""

    seconds: float
    low: float
    high: float


def timings(
    calls: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 2
) -> dict[str, Timing]:
    """Time of each call, results awaited.

    The calls take turns, so that a machine that slows down slows all of them down: ratios hold.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(warmup + repeats):
        for name, call in calls.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            if i >= warmup:
                times[name].append(time.perf_counter() - began)
    return {
        name: Timing(statistics.median(t), *map(float, np.quantile(t, (0.25, 0.75))))
        for name, t in times.items()
    }


def compiled(function: Any, *args: Any) -> tuple[Any, float]:
    """A jitted function compiled for its arguments, and the seconds that took."""
    began = time.perf_counter()
    made = function.lower(*args).compile()
    return made, time.perf_counter() - began


def memory(executable: Any) -> dict[str, int | None]:
    """Bytes of temporaries, arguments and results that the compiler reserved."""
    analysis = executable.memory_analysis()
    fields = {"temporary": "temp", "arguments": "argument", "results": "output"}
    return {
        name: None if analysis is None else int(getattr(analysis, f"{field}_size_in_bytes"))
        for name, field in fields.items()
    }


def device_peak() -> int | None:
    """Most bytes the device has held so far in this process, where it tells."""
    told = jax.local_devices()[0].memory_stats()
    return None if told is None else told.get("peak_bytes_in_use")
