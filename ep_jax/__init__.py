"""Equilibrium Propagation for convolutional spiking convergent RNNs.

The names a user needs. Further modules, such as `ep_jax.data`, `ep_jax.run` and `ep_jax.nnx` (the
flax module), load when they are first asked for.
"""

import importlib
from typing import Any

from ep_jax import diagnostics
from ep_jax.checkpoint import load_weights, save_weights
from ep_jax.conv import Conv
from ep_jax.derivatives import BPTT, EP, Implicit, NotSettledWarning, equilibrium
from ep_jax.dynamics import PhaseInfo, free_phase, nudged_phase
from ep_jax.gradients.batch import GradientInfo
from ep_jax.gradients.bptt import bptt_gradient
from ep_jax.gradients.ep import ep_gradient
from ep_jax.gradients.implicit import implicit_gradient
from ep_jax.initialization import init_params
from ep_jax.layers import Dense, Layer, LayerParams
from ep_jax.maps import Pool
from ep_jax.network import (
    NetworkSpec,
    Normalization,
    Params,
    Skip,
    State,
    energy,
    phi,
)
from ep_jax.neurons import Bernoulli, DeltaCode, IntegrateFire, Neuron, Rate, SigmaDelta
from ep_jax.phases import Phases
from ep_jax.pools import AvgPool, GlobalAvgPool, MaxPool
from ep_jax.relaxation import Snapshot

__version__ = "0.2.0"

__all__ = [
    "BPTT",
    "EP",
    "AvgPool",
    "Bernoulli",
    "Conv",
    "DeltaCode",
    "Dense",
    "GlobalAvgPool",
    "GradientInfo",
    "Implicit",
    "IntegrateFire",
    "Layer",
    "LayerParams",
    "MaxPool",
    "NetworkSpec",
    "Neuron",
    "Normalization",
    "NotSettledWarning",
    "Params",
    "PhaseInfo",
    "Phases",
    "Pool",
    "Rate",
    "SigmaDelta",
    "Skip",
    "Snapshot",
    "State",
    "bptt_gradient",
    "diagnostics",
    "energy",
    "ep_gradient",
    "equilibrium",
    "free_phase",
    "implicit_gradient",
    "init_params",
    "load_weights",
    "nudged_phase",
    "phi",
    "save_weights",
]

_LATER = (
    *("benchmark", "costs", "data", "devices", "evaluation", "logs", "loop", "nnx", "optimizers"),
    *("plots", "presets", "processes", "pruning", "report", "run", "spikes", "training"),
)


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return importlib.import_module(f"ep_jax.{name}")
    raise AttributeError(f"module 'ep_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
