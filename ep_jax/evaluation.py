"""What a trained network can do, and what its feedback does in it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ep_jax import training
from ep_jax.data import Dataset, check_dataset, to_float
from ep_jax.diagnostics import AMBIGUOUS, contractivity, feedback_answers
from ep_jax.hardware import hardware_cost, recorded, synaptic_operations
from ep_jax.network import NetworkSpec, Params
from ep_jax.numerics import beyond
from ep_jax.phases import Phases


def evaluate(
    params: Params,
    spec: NetworkSpec,
    phases: Phases,
    data: Dataset,
    key: jax.Array | None = None,
    *,
    spikes_nudged: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Test error in per cent at the phases' free sweeps and at four times as many, and recurrence.

    The two errors agree where the answers come from an equilibrium and not from a transient. That
    they do not come from a feed-forward network, `recurrence_of` tells.

    Args:
        params: parameters of `spec`.
        spec: the network.
        phases: its phases.
        data: whose test images are answered.
        key: random key; a fixed one by default.
        spikes_nudged: spikes per neuron of each layer in a nudged phase, where they are known.

    Returns:
        ``test_error``, ``test_error_4x``; of one inference: ``spikes_per_neuron`` of each layer,
        and ``synaptic_operations``; ``recurrence``; and ``hardware``, see `hardware_of`.
    """
    check_dataset(data)
    answers, info = training.predict(params, spec, phases, data.test_images, key)
    answers_4x, _ = training.predict(params, spec, phases.longer(4), data.test_images, key)
    return {
        "test_error": training.error_rate(answers, data.test_labels),
        "test_error_4x": training.error_rate(answers_4x, data.test_labels),
        "spikes_per_neuron": [float(s) for s in info.spikes],
        "synaptic_operations": synaptic_operations(spec, info.spikes),
        "recurrence": recurrence_of(params, spec, data),
        "hardware": hardware_of(spec, phases, info.spikes, spikes_nudged),
    }


def held_out(data: Dataset, images: int) -> tuple[np.ndarray, np.ndarray]:
    """The first validation images and their labels, or training ones where none are held out.

    Args:
        data: where they come from.
        images: how many, at most.
    """
    if len(data.validation_images):
        return data.validation_images[:images], data.validation_labels[:images]
    return data.train_images[:images], data.train_labels[:images]


def recurrence_of(
    params: Params, spec: NetworkSpec, data: Dataset, images: int = 2000, radii: int = 256
) -> dict[str, Any]:
    """What feedback does in a trained network: to the states and answers of its rate twin.

    On validation images, or on training images where there are none.

    Args:
        params: parameters.
        spec: the network.
        data: where the images come from.
        images: most images whose states and answers are looked at.
        radii: most images whose relaxation is looked at.

    Returns:
        ``feedback``; ``share`` of each layer's state that feedback makes; errors in per cent at the
        fixed point, ``error``, and in one pass from below with the feedback ``error_cut``, replaced
        by its mean over the images (``error_mean``) or by another image's (``error_other``);
        ``radius_mean`` and ``radius_largest`` of the relaxation, and the share of the images whose
        fixed point depends on the start, ``ambiguous``.
    """
    check_dataset(data)
    pixels, labels = held_out(data, images)
    xs = jnp.asarray(to_float(pixels))
    found = _answers_under(params, spec, xs)
    errors = {
        name: training.error_rate(np.asarray(answers), labels)
        for name, answers in zip(found._fields[1:], found[1:], strict=True)
    }
    relaxation = relaxation_of(params, spec, xs[:radii])
    return {
        "feedback": spec.feedback,
        "share": [float(share) for share in found.share],
        "error": errors["own"],
        **{f"error_{name}": errors[name] for name in ("cut", "mean", "other")},
        "radius_mean": relaxation["mean"],
        "radius_largest": relaxation["largest"],
        "ambiguous": relaxation["ambiguous"],
        "images": len(xs),
    }


def hardware_of(
    spec: NetworkSpec,
    phases: Phases,
    spikes: Sequence[jax.Array | float],
    spikes_nudged: Sequence[float] | None = None,
) -> dict[str, dict[str, float]]:
    """What an example costs on hardware, see `ep_jax.hardware.hardware_cost`.

    Args:
        spec: the network.
        phases: its phases: with a tolerance, their sweeps are the most there can be.
        spikes: spikes per neuron of each layer in a free phase.
        spikes_nudged: those in a nudged phase, where they are known.

    Returns:
        The fields of `ep_jax.hardware.Cost` of an ``inference`` and of learning by ``ep`` (where
        the nudged phase is known), ``bptt`` and ``backprop``.
    """
    costs = hardware_cost(spec, recorded(phases, spikes, spikes_nudged), phases)._asdict()
    return {name: cost._asdict() for name, cost in costs.items() if cost is not None}


_answers_under = jax.jit(feedback_answers, static_argnames=("spec", "phases"))
_contractivity = jax.jit(
    functools.partial(contractivity, starts=1), static_argnames=("spec", "phases")
)


def relaxation_of(params: Params, spec: NetworkSpec, xs: jax.Array) -> dict[str, Any]:
    """Spectral radius, ``mean`` and ``largest``; share of images with an ``ambiguous`` state.

    Args:
        params: parameters.
        spec: the network.
        xs: inputs ``[B, ...]``.
    """
    found = _contractivity(params, spec, xs)
    return {
        "mean": float(found.radius.mean()),
        "largest": float(found.radius.max()),
        "ambiguous": float(beyond(found.disagreement, AMBIGUOUS).mean()),
    }
