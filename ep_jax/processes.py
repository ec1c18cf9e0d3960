"""Several processes of one job: they join through JAX, and agree on what only one of them knows.

Every process runs the same program on its own devices, a batch is divided among the devices of all,
and the first process alone writes files. With one process all of this does nothing.
"""

from __future__ import annotations

import os

import jax
import numpy as np
from jax.experimental import multihost_utils

STARTERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
"""How the programs that start several processes tell them how many they are."""
HOSTS = "TPU_WORKER_HOSTNAMES"
"""How the hosts of a TPU slice tell who they are, with commas between."""
SILENCE = 30
"""Seconds without a sign of life after which a process is given up, and all others end."""


def join(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Join the other processes of this job. It comes before JAX's first use.

    A cluster's environment tells who they are (Slurm's ``srun``, Open MPI's ``mpirun``, a TPU slice
    of several hosts), or the caller does. Alone, nothing happens.

    Args:
        coordinator: ``"HOST:PORT"`` of the first process, the same for all.
        processes: how many there are.
        process: which one this is, from 0.

    Raises:
        ValueError: some of the arguments are given, and not all.

    Example:
        >>> join()  # where nothing says that there are others
        >>> is_first()
        True
    """
    given = (coordinator, processes, process)
    named = [value is not None for value in given]
    if any(named) != all(named):
        raise ValueError(f"coordinator, processes and process are {given}; expected all three, or "
                         "none where a cluster's environment tells them")  # fmt: skip
    if processes is not None and process is not None and not 0 <= process < processes:
        raise ValueError(f"process is {process}; expected one of 0 ... {processes - 1}")
    started = any(int(os.environ.get(name) or 1) > 1 for name in STARTERS)
    if not any(named) and not started and "," not in os.environ.get(HOSTS, ""):
        return
    jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=SILENCE)


def is_first() -> bool:
    """Whether this process writes the files of its job."""
    return jax.process_index() == 0


def largest(*values: float) -> tuple[float, ...]:
    """Of each value the largest that any process has: what all of them then go by.

    Args:
        values: this process's.
    """
    if jax.process_count() == 1:
        return values
    everyone = multihost_utils.process_allgather(np.asarray(values, np.float32))
    return tuple(float(v) for v in np.max(everyone, axis=0))


def after_first(error: Exception | None) -> None:
    """Go on together once the first process has done something alone, or end together.

    Args:
        error: what went wrong with it; of the other processes it is not looked at.

    Raises:
        Exception: in the first process its own error, in all others that it had one.
    """
    (failed,) = largest(float(is_first() and error is not None))
    if failed and is_first() and error is not None:
        raise error
    if failed:
        raise OSError("the first process of this job could not begin; its message says why")
