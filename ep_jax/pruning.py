"""Units that stay silent, and the same network without them.

A unit of a hard-sigmoid network whose state is zero on an image takes no part in it: nothing goes
up or down its weights. One that is zero on all images costs memory and products and does nothing.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ep_jax.data import to_float
from ep_jax.dynamics import free_phase
from ep_jax.network import NetworkSpec, Params, check_params
from ep_jax.phases import Phases
from ep_jax.relaxation import Snapshot
from ep_jax.training import check_images


@functools.partial(jax.jit, static_argnames=("spec", "phases", "batch"))
def _activity(
    params: Params, images: jax.Array, *, spec: NetworkSpec, phases: Phases, batch: int
) -> tuple[jax.Array, ...]:
    hidden = len(spec.layers) - 1

    def of_sweep(now: Snapshot) -> tuple[jax.Array, ...]:
        return tuple((s != 0).reshape(-1, s.shape[-1]).any(0) for s in now.state[:hidden])

    def of_image(image: jax.Array, key: jax.Array) -> tuple[jax.Array, ...]:
        noise = key if spec.neuron.stochastic else None
        _, info = free_phase(params, spec, to_float(image), phases, noise, trace=of_sweep)
        return jax.tree.map(lambda sweeps: sweeps.any(0), info.trace)

    keys = jax.random.split(jax.random.key(0), len(images))
    found = jax.lax.map(lambda args: of_image(*args), (images, keys), batch_size=batch)
    return jax.tree.map(lambda of_images: of_images.mean(0), found)


def activity(
    params: Params,
    spec: NetworkSpec,
    phases: Phases,
    images: np.ndarray | jax.Array,
    batch: int = 100,
) -> tuple[np.ndarray, ...]:
    """The share of images that wake each hidden unit: its state leaves zero in some free sweep.

    Args:
        params: parameters of `spec`.
        spec: the network.
        phases: how long and in which sweeps it settles.
        images: uint8 ``[N, *spec.input_shape]``.
        batch: images in flight at once.

    Returns:
        A tuple over all layers but the last of shares ``[features]`` in [0, 1]; of a channel, any
        position counts.

    Raises:
        ValueError: an argument of wrong shape or dtype.

    Example:
        >>> spec = NetworkSpec((1,), (Dense(2), Dense(1)), Rate())
        >>> w = jnp.array([[1.0, -1.0]])
        >>> params = ({"w": w, "b": jnp.zeros(2)}, {"w": w.T, "b": jnp.zeros(1)})
        >>> activity(params, spec, Phases(free=3), np.full((4, 1), 255, np.uint8))
        (array([1., 0.], dtype=float32),)
    """
    check_params(spec, params)
    check_images(spec, images)
    found = _activity(
        params, jnp.asarray(images), spec=spec, phases=phases, batch=min(batch, len(images))
    )
    return tuple(np.asarray(units) for units in found)


def prune(
    params: Params, spec: NetworkSpec, keep: tuple[np.ndarray, ...]
) -> tuple[Params, NetworkSpec]:
    """The network without the units that are not kept.

    Where these would be zero, states, energy and gradients of the others are those of the network
    as it was. (Gradients of spiking neurons under cross-entropy only nearly so: there the nudge
    falls on hidden units, and its largest value, a silent unit's too, sets the nudged quantum.)

    Args:
        params: parameters of `spec`.
        spec: the network.
        keep: a tuple over all layers but the last of booleans ``[features]``, such as
            ``share > 0`` of `activity`.

    Returns:
        Parameters and specification of the smaller network.

    Raises:
        ValueError: `keep` does not fit the layers, or a layer would be empty.

    Example:
        >>> spec = NetworkSpec((1,), (Dense(2), Dense(1)))
        >>> params = network.draw_params(jax.random.key(0), spec)
        >>> params, spec = prune(params, spec, (np.array([True, False]),))
        >>> spec.layers
        (Dense(features=1), Dense(features=1))
    """
    check_params(spec, params)
    hidden = [shape[-1] for shape in spec.shapes[1:-1]]
    if [np.shape(units) for units in keep] != [(n,) for n in hidden] or any(
        np.asarray(units).dtype != bool for units in keep
    ):
        found = [(np.asarray(units).dtype.name, np.shape(units)) for units in keep]
        raise ValueError(f"keep holds {found}; expected booleans, one for each unit of the layers "
                         f"of {hidden} units")  # fmt: skip
    if empty := [l for l, units in enumerate(keep, start=1) if not np.any(units)]:
        raise ValueError(f"keep leaves no unit in layers {empty}; expected one or more in each")

    alive = (np.ones(spec.input_shape[-1], bool), *keep, np.ones(spec.output_shape[-1], bool))
    alive = tuple(map(np.asarray, alive))
    smaller = [
        layer.keep(p, below, alive[l], alive[l + 1])
        for l, (layer, p, below) in enumerate(zip(spec.layers, params, spec.shapes, strict=False))
    ]
    skipped = [
        skip.layer.keep(p, spec.shapes[skip.source], alive[skip.source], alive[skip.target])
        for skip, p in zip(spec.skips, params[len(spec.layers) :], strict=True)
    ]
    skips = tuple(
        dataclasses.replace(skip, layer=layer)
        for skip, (layer, _) in zip(spec.skips, skipped, strict=True)
    )
    layers = tuple(layer for layer, _ in smaller)
    kept = tuple(p for _, p in (*smaller, *skipped))
    return kept, dataclasses.replace(spec, layers=layers, skips=skips)
