"""EP and truncated BPTT as they are usually written: PyTorch, autograd of Phi in a Python loop.

The same networks (rate, average pool), the same phases (synchronous, absolute, symmetric) and the
same parameters as `ep_jax`'s. The optional extra ``peer`` installs PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn import functional

import ep_jax as ep

Tensors = list[torch.Tensor]


class Peer:
    """A rate network in PyTorch with the parameters of one of `ep_jax`.

    Args:
        params: parameters, as of `ep_jax.init_params`.
        spec: rate neurons, squared error, average pools, VALID padding.
        xs: inputs ``[B, H, W, C]``.
        ys: labels ``[B]``.
    """

    def __init__(self, params: ep.Params, spec: ep.NetworkSpec, xs: Any, ys: Any) -> None:
        if spec.neuron != ep.Rate() or spec.cost != "squared_error":
            raise ValueError(f"spec is {spec}; expected ep_jax.Rate() and squared error")
        self.spec = spec
        self.weights: Tensors = []
        self.biases: Tensors = []
        for below, layer, p in zip(spec.shapes, spec.layers, params, strict=False):
            w = np.asarray(p["w"])
            if isinstance(layer, ep.Conv):
                w = w.transpose(3, 2, 0, 1)
            elif len(below) == 3:  # flattened as HWC there, as CHW here
                w = w.reshape(*below, -1).transpose(2, 0, 1, 3).reshape(len(w), -1).T
            else:
                w = w.T
            self.weights.append(torch.tensor(np.ascontiguousarray(w), requires_grad=True))
            self.biases.append(torch.tensor(np.asarray(p["b"]), requires_grad=True))
        self.x = torch.tensor(np.ascontiguousarray(np.asarray(xs).transpose(0, 3, 1, 2)))
        self.y = functional.one_hot(torch.tensor(np.asarray(ys)).long(), spec.classes).to(
            self.x.dtype
        )

    def phi(self, s: Tensors) -> torch.Tensor:
        """The primitive function, summed over the batch (feedback 1)."""
        total = torch.zeros((), dtype=self.x.dtype)
        for layer, w, b, below, here in zip(
            self.spec.layers, self.weights, self.biases, [self.x, *s], s, strict=False
        ):
            if isinstance(layer, ep.Conv):
                drive = functional.avg_pool2d(functional.conv2d(below, w, b), 2)
            else:
                drive = functional.linear(below.flatten(1), w, b)
            total = total + (drive * here).sum()
        return total

    def settle(self, s: Tensors, sweeps: int, beta: float, track: bool = False) -> Tensors:
        """Synchronous sweeps; with `track` the graph through them is kept."""
        for _ in range(sweeps):
            if not track:
                s = [a.detach().requires_grad_() for a in s]
            drive = torch.autograd.grad(self.phi(s), s, create_graph=track)
            s = [*(d.clamp(0, 1) for d in drive[:-1]), drive[-1] - beta * (s[-1] - self.y)]
        return s if track else [a.detach() for a in s]

    def zeros(self) -> Tensors:
        """The state a free phase starts from."""
        batch = len(self.x)
        shapes = [s if len(s) == 1 else (s[2], *s[:2]) for s in self.spec.state_shapes]
        return [torch.zeros(batch, *s, dtype=self.x.dtype, requires_grad=True) for s in shapes]

    def ep_gradient(self, phases: ep.Phases) -> Tensors:
        """Gradient of weights, then biases, of the batch-mean cost, by symmetric EP."""
        free = self.settle(self.zeros(), phases.free, 0.0)
        plus = self.settle(free, phases.nudged, phases.beta)
        minus = self.settle(free, phases.nudged, -phases.beta)
        contrast = (self.phi(minus) - self.phi(plus)) / (2 * phases.beta * len(self.x))
        return list(torch.autograd.grad(contrast, [*self.weights, *self.biases]))

    def bptt_gradient(self, phases: ep.Phases, tracked: int) -> Tensors:
        """The same by back-propagation through the last `tracked` sweeps."""
        free = self.settle(self.zeros(), phases.free - tracked, 0.0)
        start = [a.requires_grad_() for a in free]
        last = self.settle(start, tracked, 0.0, track=True)[-1]
        cost = 0.5 * ((last - self.y) ** 2).sum() / len(self.x)
        return list(torch.autograd.grad(cost, [*self.weights, *self.biases]))

    def as_params(self, grads: Tensors) -> ep.Params:
        """Gradients in the layout of `ep_jax`."""
        depth = len(self.weights)
        found = []
        for below, layer, w, b in zip(
            self.spec.shapes, self.spec.layers, grads[:depth], grads[depth:], strict=False
        ):
            array = w.numpy()
            if isinstance(layer, ep.Conv):
                array = array.transpose(2, 3, 1, 0)
            elif len(below) == 3:
                h, v, c = below
                array = array.T.reshape(c, h, v, -1).transpose(1, 2, 0, 3).reshape(h * v * c, -1)
            else:
                array = array.T
            found.append({"w": jnp.asarray(array), "b": jnp.asarray(b.numpy())})
        return tuple(found)


def check_equal(ours: ep.Params, peers: ep.Params, tolerance: float = 1e-8) -> None:
    """Raise where two gradients are not the same up to rounding."""
    for l, (a, b) in enumerate(zip(ours, peers, strict=True), start=1):
        for name in a:
            apart = float(jnp.linalg.norm(a[name] - b[name]) / jnp.linalg.norm(b[name]))
            if not apart < tolerance:
                raise AssertionError(
                    f"the gradients of {name!r} in layer {l} differ by {apart:.1e}; "
                    f"expected less than {tolerance:.0e}"
                )


Call = Callable[[], Any]


def calls(
    params: ep.Params, spec: ep.NetworkSpec, xs: jax.Array, ys: jax.Array, phases: ep.Phases
) -> dict[str, Call]:
    """What is timed."""
    peer = Peer(params, spec, xs, ys)
    return {
        "PyTorch, EP": lambda: peer.ep_gradient(phases),
        "PyTorch, BPTT, 10 tracked": lambda: peer.bptt_gradient(phases, 10),
    }
