"""Equilibrium Propagation for convolutional spiking convergent RNNs."""

from ep_jax.dynamics import PhaseInfo, Phases, Snapshot, free_phase, nudged_phase
from ep_jax.gradients.equilibrium import GradientInfo, ep_gradient
from ep_jax.layers import Conv, Dense
from ep_jax.network import NetworkSpec, energy, init_params, phi
from ep_jax.neurons import Bernoulli, DeltaCode, Rate, SigmaDelta
