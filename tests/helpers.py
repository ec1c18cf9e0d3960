"""Independent references for the tests: nothing here calls ep_jax's own mathematics.

Layers are ``jax.lax`` convolutions and window reductions, Phi is a plain sum over them, currents
are its exact derivatives, and gradients of the cost come from reverse-mode through the relaxation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import ep_jax as ep
from ep_jax.network import parameters_of

Tree: TypeAlias = Any


def slow(*values: Any) -> Any:
    """A case of a parametrized test that ``make test`` leaves out."""
    return pytest.param(*values, marks=pytest.mark.slow)


def attempt(call: Callable[[], Any]) -> Any:
    """What `call` returns, or the ``ValueError`` it raises; any other exception is its own."""
    try:
        return call()
    except ValueError as error:
        return error


def make_params(spec: ep.NetworkSpec, seed: int = 0, gain: float = 1.0, bias: float = 0.3) -> Tree:
    """Random float64 parameters ``N(0, gain^2 / fan_in)`` with biases that are not zero."""
    rng = np.random.default_rng(seed)
    params = []
    for like in parameters_of(spec):
        shape = like["w"].shape
        w = rng.normal(size=shape) * gain / math.sqrt(math.prod(shape[:-1]))
        params.append({"w": jnp.asarray(w)})
        if "b" in like:  # a skip has none
            params[-1]["b"] = jnp.asarray(rng.normal(size=like["b"].shape) * bias)
    return tuple(params)


def make_batch(spec: ep.NetworkSpec, size: int, seed: int = 1) -> tuple[jax.Array, jax.Array]:
    """Random inputs in [0, 1] and labels, of which no two neighbours are equal."""
    rng = np.random.default_rng(seed)
    xs = rng.uniform(size=(size, *spec.input_shape))
    return jnp.asarray(xs), jnp.asarray(np.arange(size) % spec.classes)


def make_state(spec: ep.NetworkSpec, seed: int = 2) -> tuple[jax.Array, ...]:
    """A random state in [0, 1]; it is at no fixed point."""
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.uniform(size=shape)) for shape in spec.state_shapes)


def affine(layer: ep.Layer, p: Tree, below: jax.Array) -> jax.Array:
    """``A(s)`` of one layer as the papers write it: convolution, bias, then the pool."""
    bias = p.get("b", jnp.zeros(p["w"].shape[-1], p["w"].dtype))
    if isinstance(layer, ep.Dense):
        return below.reshape(-1) @ p["w"] + bias
    assert isinstance(layer, ep.Conv)
    out = jax.lax.conv_general_dilated(
        below[None],
        p["w"],
        (layer.stride,) * 2,
        layer.padding,
        rhs_dilation=(layer.dilation,) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=layer.groups,
    )
    out = out[0] + jnp.broadcast_to(bias, out[0].shape)
    named: Any = {"avg": ep.AvgPool(), "max": ep.MaxPool()}
    pool = named[layer.pool] if isinstance(layer.pool, str) else layer.pool
    if pool is None:
        return out
    if isinstance(pool, ep.GlobalAvgPool):
        return out.mean((0, 1), keepdims=True)
    assert isinstance(pool, ep.AvgPool | ep.MaxPool)
    size, step = (pool.size,) * 2, (pool.stride or pool.size,) * 2
    window = {"window_dimensions": (*size, 1), "window_strides": (*step, 1), "padding": "VALID"}
    if isinstance(pool, ep.MaxPool):
        return jax.lax.reduce_window(out, -jnp.inf, jax.lax.max, **window)
    total = jax.lax.reduce_window(out, np.zeros((), out.dtype)[()], jax.lax.add, **window)
    return total / pool.size**2


def reference_phi(params: Tree, spec: ep.NetworkSpec, x: jax.Array, state: Tree) -> jax.Array:
    """``sum alpha^(m - L) <A(s_l), s_m>`` over the layers inside the dynamics, and the skips."""
    L, states = len(state), (x, *state)
    edges = [(l, l + 1, spec.layers[l]) for l in range(L)]
    edges += [(skip.source, skip.target, skip.layer) for skip in spec.skips]
    own = (*params[:L], *params[len(spec.layers) :])
    terms = [
        spec.feedback ** (m - L) * jnp.sum(affine(layer, p, states[l]) * states[m])
        for (l, m, layer), p in zip(edges, own, strict=True)
    ]
    return sum(terms[1:], terms[0])


def reference_current(
    params: Tree, spec: ep.NetworkSpec, x: jax.Array, state: Tree, l: int
) -> jax.Array:
    """``alpha^(L - l) dPhi/ds_l`` of 0-based layer `l`, by reverse-mode through `reference_phi`."""
    gradient = jax.grad(reference_phi, 3)(params, spec, x, tuple(state))
    return spec.feedback ** (len(state) - 1 - l) * gradient[l]


def reference_cost(params: Tree, spec: ep.NetworkSpec, last: jax.Array, y: jax.Array) -> jax.Array:
    """``C(s_L, y)`` of one example with one-hot `y`."""
    if spec.cost == "squared_error":
        return 0.5 * jnp.sum((last - y) ** 2)
    logits = last.reshape(-1) @ params[-1]["w"] + params[-1]["b"]
    return jax.scipy.special.logsumexp(logits) - jnp.dot(logits, y)


def reference_nudge(params: Tree, spec: ep.NetworkSpec, last: jax.Array, y: jax.Array) -> jax.Array:
    """``-dC/ds_L``."""
    return -jax.grad(reference_cost, 2)(params, spec, last, y)


def one_hot(spec: ep.NetworkSpec, ys: jax.Array) -> jax.Array:
    return jnp.eye(spec.classes)[ys]


def exact_gradient(params: Tree, spec: ep.NetworkSpec, xs: Any, ys: Any, steps: int) -> Tree:
    """The gradient of the batch-mean cost by reverse-mode through the free relaxation (BPTT)."""

    def mean_cost(params: Tree) -> jax.Array:
        phases = ep.Phases(free=steps)
        states, _ = jax.vmap(lambda x: ep.free_phase(params, spec, x, phases))(xs)
        costs = jax.vmap(lambda s, y: reference_cost(params, spec, s, y))(
            states[-1], one_hot(spec, ys)
        )
        return jnp.mean(costs)

    return jax.jit(jax.grad(mean_cost))(params)


def flat(tree: Tree) -> np.ndarray:
    return np.asarray(ravel_pytree(tree)[0], np.float64)


def relative_error(tree: Tree, exact: Tree) -> float:
    return float(np.linalg.norm(flat(tree) - flat(exact)) / np.linalg.norm(flat(exact)))


def cosine(tree: Tree, exact: Tree) -> float:
    a, b = flat(tree), flat(exact)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


class LinearNetwork:
    """A dense linear network as one system ``s = M s + c + beta P (y - s)``, all in numpy."""

    def __init__(self, params: Any, alpha: float, x: np.ndarray, y: np.ndarray) -> None:
        self.W, b = ([np.asarray(p[name]) for p in params] for name in ("w", "b"))
        self.alpha, self.x, self.y = alpha, x, y
        self.ends = np.cumsum([w.shape[1] for w in self.W])
        starts = self.ends - [w.shape[1] for w in self.W]
        self.at = [slice(i, j) for i, j in zip(starts, self.ends, strict=True)]
        n = self.ends[-1]
        self.M, self.c = np.zeros((n, n)), np.concatenate(b)
        self.c[self.at[0]] += x @ self.W[0]
        for l in range(1, len(self.W)):
            self.M[self.at[l], self.at[l - 1]] = self.W[l].T
            self.M[self.at[l - 1], self.at[l]] = alpha * self.W[l]
        self.P = np.zeros((n, n))
        self.P[self.at[-1], self.at[-1]] = np.eye(len(y))
        self.target = np.zeros(n)
        self.target[self.at[-1]] = y

    def rest(self, beta: float) -> np.ndarray:
        """The fixed point under the nudge."""
        A = np.eye(len(self.c)) - self.M + beta * self.P
        return np.linalg.solve(A, self.c + beta * self.target)

    def exact(self) -> Any:
        """dC/dtheta at the free fixed point: ``(I - M)^T v = dC/ds``, then ``v . dF/dtheta``."""
        return self.pull(np.linalg.solve((np.eye(len(self.c)) - self.M).T, self.source()))

    def truncated(self, sweeps: int) -> Any:
        """The same with the adjoint's series cut: ``v = sum_(k < sweeps) (M^T)^k dC/ds``."""
        powers = [np.linalg.matrix_power(self.M.T, k) for k in range(sweeps)]
        return self.pull(sum(p @ self.source() for p in powers))

    def source(self) -> np.ndarray:
        """dC/ds at the free fixed point."""
        return self.P @ (self.rest(0) - self.target)

    def pull(self, v: Any) -> Any:
        """``v . dF/dtheta`` at the free fixed point."""
        s = self.rest(0)
        split, adjoint = [s[at] for at in self.at], [v[at] for at in self.at]
        grads = [{"w": np.outer(self.x, adjoint[0]), "b": adjoint[0]}]
        for l in range(1, len(self.W)):
            w = np.outer(split[l - 1], adjoint[l])
            w += self.alpha * np.outer(adjoint[l - 1], split[l])
            grads.append({"w": w, "b": adjoint[l]})
        return tuple(grads)

    def phi_gradient(self, s: np.ndarray) -> Any:
        """dPhi/dtheta, weighted by ``alpha^(l - L)``."""
        L, split = len(self.W), [s[at] for at in self.at]
        below = [self.x, *split[:-1]]
        weights = [self.alpha ** (l + 1 - L) for l in range(L)]
        return tuple(
            {"w": a * np.outer(u, v), "b": a * v}
            for a, u, v in zip(weights, below, split, strict=True)
        )

    def estimate(self, beta: float, symmetric: bool) -> Any:
        """EP at finite beta, from the fixed points."""
        other = self.rest(-beta if symmetric else 0)
        span = 2 * beta if symmetric else beta
        plus, minus = self.phi_gradient(self.rest(beta)), self.phi_gradient(other)
        return jax.tree.map(lambda p, m: -(p - m) / span, plus, minus)
