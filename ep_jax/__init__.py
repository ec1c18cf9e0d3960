"""Equilibrium Propagation for convolutional spiking convergent RNNs.

The names a user needs; `ep_jax.data`, `ep_jax.spikes`, `ep_jax.optimizers`, `ep_jax.training`,
`ep_jax.pruning`, `ep_jax.presets`, `ep_jax.run` and `ep_jax.plots` are imported by name.
"""

from ep_jax import diagnostics
from ep_jax.checkpoint import load_weights, save_weights
from ep_jax.dynamics import PhaseInfo, Snapshot, free_phase, nudged_phase
from ep_jax.gradients.batch import GradientInfo
from ep_jax.gradients.bptt import bptt_gradient
from ep_jax.gradients.equilibrium import ep_gradient
from ep_jax.gradients.implicit import implicit_gradient
from ep_jax.layers import Conv, Dense
from ep_jax.network import LayerParams, NetworkSpec, Params, State, energy, init_params, phi
from ep_jax.neurons import Bernoulli, DeltaCode, IntegrateFire, Neuron, Rate, SigmaDelta
from ep_jax.phases import Phases

__all__ = [
    "Bernoulli",
    "Conv",
    "DeltaCode",
    "Dense",
    "GradientInfo",
    "IntegrateFire",
    "LayerParams",
    "NetworkSpec",
    "Neuron",
    "Params",
    "PhaseInfo",
    "Phases",
    "Rate",
    "SigmaDelta",
    "Snapshot",
    "State",
    "bptt_gradient",
    "diagnostics",
    "energy",
    "ep_gradient",
    "free_phase",
    "implicit_gradient",
    "init_params",
    "load_weights",
    "nudged_phase",
    "phi",
    "save_weights",
]
