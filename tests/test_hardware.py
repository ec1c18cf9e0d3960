"""The cost of hardware, counted by hand on networks of a few units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import ep_jax as ep
from ep_jax.diagnostics import FLOAT32, FLOAT32_DRAM, hardware_cost
from ep_jax.hardware import Energies, is_spiking, state_words
from ep_jax.presets import NEURONS

LAYERS = (ep.Dense(4), ep.Dense(2))
RATE = ep.NetworkSpec((8,), LAYERS, ep.Rate())
"""32 connections from the input, a link of 8, 6 units, 46 parameters."""
SPIKING = ep.NetworkSpec((8,), LAYERS, ep.DeltaCode())


def told(sweeps: Any, *spikes: Any) -> ep.PhaseInfo:
    """What a phase told: only sweeps and spikes are looked at."""
    return ep.PhaseInfo(0.0, (), 0.0, 0.0, jnp.asarray(sweeps), 0.0, spikes, ())  # type: ignore


def learned(free: ep.PhaseInfo, nudged: ep.PhaseInfo) -> ep.GradientInfo:
    return ep.GradientInfo(0.0, 0.0, free, nudged)  # type: ignore


def test_an_inference_of_rate_neurons() -> None:
    """Ten sweeps: each has 8 products up, 8 down, and 6 updates of one word."""
    cost = hardware_cost(RATE, told(10.0, 0.0, 0.0)).inference
    assert cost.macs == 32 + 10 * (8 + 8 + 6)
    assert cost.weight_reads == 32 + 10 * 16
    assert cost.state_reads == 32 + 10 * (16 + 6 * 3)
    assert cost.state_writes == 4 + 10 * (2 + 4 + 6)
    assert (cost.acs, cost.spikes, cost.weight_writes) == (0, 0, 0)
    assert cost.held == 6 * 3
    words = 192 + 372 + 124
    np.testing.assert_allclose(cost.memory_joules, words * 10e-12)
    np.testing.assert_allclose(cost.joules, (252 * 4.6 + words * 10) * 1e-12)


def test_an_inference_of_spikes() -> None:
    """Six spikes below that reach 2 units each, four above that reach 4; two words of state."""
    cost = hardware_cost(SPIKING, told(10.0, 1.5, 2.0)).inference
    assert cost.spikes == 6 + 4
    assert cost.acs == 6 * 2 + 4 * 4
    assert cost.macs == 32 + 10 * 6 * 2
    assert cost.weight_reads == 32 + 28
    assert cost.state_reads == 32 + 28 + 10 * 6 * 4
    assert cost.state_writes == 4 + 28 + 10 * 6 * 2
    arithmetic = cost.macs * 4.6 + 28 * 0.9
    np.testing.assert_allclose(cost.joules - cost.memory_joules, arithmetic * 1e-12)


def test_learning() -> None:
    """EP: a nudged phase and a contrast. BPTT: twice each product again. Backprop: no sweeps."""
    free = told(10.0, 0.0, 0.0)
    cost = hardware_cost(RATE, learned(free, told(5.0, 0.0, 0.0)))
    assert cost.ep is not None
    assert cost.ep.macs == 252 + 5 * (16 + 6) + (2 * 8 + 32) + 46
    assert cost.ep.weight_writes == cost.bptt.weight_writes == cost.backprop.weight_writes == 46
    assert cost.ep.held == cost.inference.held + 6
    assert cost.bptt.macs == 252 + 10 * (16 + 16 + 6) + 32 + 46
    assert cost.bptt.held == cost.inference.held + 11 * 6
    assert cost.backprop.macs == (32 + 8) + 8 + (32 + 8) + 2 * 6 + 46
    assert hardware_cost(RATE, free).ep is None
    assert hardware_cost(RATE, free).bptt == cost.bptt


def test_memory_of_bptt_alone_grows_with_the_sweeps() -> None:
    """What EP is for, on chip."""
    few, many = (
        hardware_cost(SPIKING, learned(told(t, 1.0, 1.0), told(t, 1.0, 1.0))) for t in (10.0, 99.0)
    )
    assert few.ep is not None
    assert many.ep is not None
    assert few.ep.held == many.ep.held
    assert many.bptt.held == few.bptt.held + 89 * 6 * 2


@pytest.mark.parametrize(
    ("estimator", "coordinates", "phases", "contrasts"),
    [
        ("one_sided", "absolute", 1, 1),
        ("random_sign", "displacement", 1, 1),
        ("symmetric", "absolute", 2, 1),
        ("symmetric", "displacement", 2, 2),
    ],
)
def test_estimators(estimator: Any, coordinates: Any, phases: int, contrasts: int) -> None:
    """The symmetric one nudges twice; two displacements are contrasted apart."""
    info = learned(told(10.0, 0.0, 0.0), told(5.0, 0.0, 0.0))
    given = ep.Phases(beta=0.1, estimator=estimator, coordinates=coordinates)
    cost = hardware_cost(RATE, info, given).ep
    assert cost is not None
    assert cost.macs == 252 + phases * 5 * 22 + contrasts * 48 + 46


def test_holomorphic_is_complex() -> None:
    """Three of four points are settled, with four products for one."""
    info = learned(told(10.0, 0.0, 0.0), told(5.0, 0.0, 0.0))
    given = ep.Phases(beta=0.1, estimator="holomorphic", coordinates="absolute", points=4)
    cost = hardware_cost(RATE, info, given).ep
    assert cost is not None
    assert cost.macs == 252 + 3 * 4 * 5 * 22 + 3 * 48 + 46


def test_a_read_out() -> None:
    """It answers once, and in every nudged sweep; it learns."""
    spec = ep.NetworkSpec((8,), LAYERS, ep.Rate(), cost="cross_entropy")
    cost = hardware_cost(spec, learned(told(3.0, 0.0), told(2.0, 0.0)))
    assert cost.inference.macs == 32 + 3 * 4 + 8
    assert cost.ep is not None
    assert cost.ep.macs == 52 + 2 * (4 + 2 * 8) + (32 + 8) + 46
    assert cost.backprop.macs == (32 + 8) + 8 + (32 + 8) + 2 * 4 + 46


def test_skips_pools_and_layers_of_ones_own() -> None:
    """Each connection counts, whoever makes it."""

    @dataclass(frozen=True)
    class Own(ep.Layer):
        """Each unit hears two of the three below."""

        def output_shape(self, below: Any) -> Any:
            return below

        def init(self, key: Any, below: Any, gain: float, dtype: Any) -> Any:
            return {"w": jnp.ones((2, *below), dtype)}

        def drive(self, prepared: Any, s: Any) -> Any:
            return prepared["w"][0] * s + prepared["w"][1] * jnp.roll(s, 1)

    skip = ep.Skip(1, 3, ep.Dense(1))
    spec = ep.NetworkSpec((3,), (ep.Dense(3), Own(), ep.Dense(1)), ep.Rate(), skips=(skip,))
    assert hardware_cost(spec, told(1.0, 0, 0, 0)).inference.macs == 9 + 2 * (6 + 3 + 3) + 7
    pooled = ep.NetworkSpec((8, 8, 1), (ep.Conv(2, 3, "max"), ep.Dense(1)), ep.Rate())
    assert hardware_cost(pooled, told(0.0, 0, 0)).inference.macs == 6 * 6 * 9 * 2


def test_a_batch_and_an_example_cost_the_same() -> None:
    """Stragglers and a tolerance: the mean of what examples took."""
    batch = told([11.0, 31.0], jnp.array([1.0, 3.0]), jnp.array([0.0, 2.0]))
    assert hardware_cost(SPIKING, batch) == hardware_cost(SPIKING, told(21.0, 2.0, 1.0))


@pytest.mark.parametrize("name", NEURONS)
def test_every_neuron_model(name: str) -> None:
    """Whether it spikes, and how much a unit remembers."""
    neuron = NEURONS[name]()
    assert is_spiking(neuron) == (name != "rate")
    words = {"rate": 1, "sigma_delta": 5, "delta_code": 2, "bernoulli": 3, "integrate_fire": 5}
    assert state_words(neuron) == words[name]


def test_energies() -> None:
    """Weights that lie further away cost more, and nothing else changes."""
    info = told(10.0, 0.0, 0.0)
    near, far = (hardware_cost(RATE, info, energies=e).inference for e in (FLOAT32, FLOAT32_DRAM))
    np.testing.assert_allclose(far.joules - near.joules, 192 * 640e-12)
    free_memory = Energies(multiply=1.0, add=2.0, state=0.0, weight=0.0)
    only = hardware_cost(RATE, info, energies=free_memory).inference
    np.testing.assert_allclose(only.joules, 252 * 3e-12)
    assert only.memory_joules == 0


def test_what_is_no_info() -> None:
    """A state, or what a trace saw."""
    with pytest.raises(TypeError, match=r"info is tuple; expected an ep_jax\.PhaseInfo"):
        hardware_cost(RATE, ())  # type: ignore
