"""Devices: how a batch is divided among them."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def divide_cpu(devices: int, processes: int = 1) -> None:
    """Make the cores of a CPU so many devices; GPUs and TPUs are what they are.

    It comes before JAX's first use, and does nothing after it.

    Args:
        devices: of all processes together.
        processes: how many there are.
    """
    with contextlib.suppress(RuntimeError):  # `placements` tells what is missing
        jax.config.update("jax_num_cpu_devices", max(1, devices // processes))


class Placements(NamedTuple):
    """Where arrays lie when a batch is divided among devices.

    Attributes:
        everywhere: the same on all devices.
        examples: ``[B, ...]``, divided.
        batches: ``[steps, B]``, each step divided.
    """

    everywhere: NamedSharding
    examples: NamedSharding
    batches: NamedSharding


def placements(devices: int) -> Placements:
    """How to divide batches among so many devices, of each process as many.

    Raises:
        ValueError: there are fewer, or the processes cannot have as many each.

    Example:
        >>> x = jax.device_put(jnp.ones((4, 2)), placements(1).examples)
    """
    processes = jax.process_count()
    each, rest = divmod(devices, processes)
    if rest or not each:
        raise ValueError(f"devices is {devices}; expected a multiple of the {processes} processes")
    here = len(jax.local_devices())
    if each > here:
        raise ValueError(
            f"devices is {devices}; expected at most the {here * processes} that JAX has here. "
            "The cores of a CPU are one device, unless "
            f"ep_jax.devices.divide_cpu({devices}) comes before JAX's first use"
        )
    of_process = [[d for d in jax.devices() if d.process_index == p] for p in range(processes)]
    mesh = Mesh([device for own in of_process for device in own[:each]], ("batch",))
    axes = ((), ("batch",), (None, "batch"))
    return Placements(*(NamedSharding(mesh, PartitionSpec(*names)) for names in axes))
