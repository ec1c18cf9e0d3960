"""Devices: how a batch is divided among them."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def divide_cpu(devices: int) -> None:
    """Make the cores of a CPU so many devices; GPUs and TPUs are what they are.

    It comes before JAX's first use, and does nothing after it.
    """
    with contextlib.suppress(RuntimeError):  # `placements` tells what is missing
        jax.config.update("jax_num_cpu_devices", devices)


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
    """How to divide batches among so many devices; ``ValueError`` where there are fewer.

    Example:
        >>> x = jax.device_put(jnp.ones((4, 2)), placements(1).examples)
    """
    here = jax.local_devices()
    if devices > len(here):
        raise ValueError(
            f"devices is {devices}; expected at most the {len(here)} that JAX has here. "
            "The cores of a CPU are one device, unless "
            f"ep_jax.devices.divide_cpu({devices}) comes before JAX's first use"
        )
    mesh = Mesh(here[:devices], ("batch",))
    axes = ((), ("batch",), (None, "batch"))
    return Placements(*(NamedSharding(mesh, PartitionSpec(*names)) for names in axes))
