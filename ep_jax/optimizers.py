"""Optimisers, and a cap on the links between layers that keeps the network a contraction.

`make_optimizer` chains a direction (`AdamW`, `Muon` or `SGD`), the decay of weights, factors of the
layers, a cosine schedule and, where asked for, `cap_links`.

**What the cap is for.** Training drives the loop gain of a recurrent network up, and what is no
contraction settles late or never. `link_norms` measures the links, `radius_bound` is what they
prove, and `cap_links` holds them where it proves a contraction.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import optax

from ep_jax import network
from ep_jax.checks import check_float_array, check_integer, check_non_negative, check_number
from ep_jax.layers import Layer
from ep_jax.network import NetworkSpec, Params, Skip
from ep_jax.numerics import norm


@dataclass(frozen=True)
class AdamW:
    """Adam (Kingma & Ba, ICLR 2015) with decoupled weight decay (Loshchilov & Hutter, ICLR 2019).

    Without decay each weight moves by about the learning rate a step.
    """

    b1: float = 0.9
    """Decay of the mean of the gradients."""
    b2: float = 0.999
    """Decay of the mean of their squares."""

    def __post_init__(self) -> None:
        _check_decay("AdamW.b1", self.b1)
        _check_decay("AdamW.b2", self.b2)


@dataclass(frozen=True)
class Muon:
    """Momentum whose singular values are all made one (Jordan et al., 2024); biases by Adam.

    The weights of a layer are one matrix, a convolution's ``[k * k * in, out]``, and a step moves
    them by the learning rate times `orthogonalize` of their momentum. So without decay the operator
    norm of that matrix grows by about the learning rate a step at most. The norm of a convolution's
    drive grows by up to ``k`` times as much, half of that with the average pool. There is no factor
    for the matrix's shape: that of ``optax.contrib.muon``, ``sqrt(max(1, out / in))``, is left out.
    """

    momentum: float = 0.95
    """Decay of the momentum."""
    nesterov: bool = True
    """Look ahead: add the gradient to the decayed momentum once more."""
    ns_steps: int = 5
    """Newton-Schulz steps that make the singular values one."""
    bias_rate: float = 1e-3
    """Peak learning rate of the biases; it follows the schedule and the layers' factors."""

    def __post_init__(self) -> None:
        _check_decay("Muon.momentum", self.momentum)
        check_integer("Muon.ns_steps", self.ns_steps, at_least=1)
        check_non_negative("Muon.bias_rate", self.bias_rate)


@dataclass(frozen=True)
class SGD:
    """Gradient descent with momentum; weight decay is part of the gradient (L2 regularisation)."""

    momentum: float = 0.9
    """Decay of the momentum; 0 is plain gradient descent."""
    nesterov: bool = False
    """Look ahead: add the gradient to the decayed momentum once more."""

    def __post_init__(self) -> None:
        _check_decay("SGD.momentum", self.momentum)


Settings: TypeAlias = AdamW | Muon | SGD
"""Any of the optimisers."""


def check_layer_factors(name: str, values: Sequence[float], depth: int) -> None:
    """Raise where `values` are not a factor for each layer, or none at all.

    Args:
        name: what the message calls them.
        values: factors, from the input up.
        depth: number of layers.
    """
    if len(values) not in (0, depth):
        raise ValueError(f"{name} is {tuple(values)}; expected a factor for each of the {depth} "
                         "layers, or none")  # fmt: skip
    for value in values:
        check_non_negative(name, value)


def _check_decay(name: str, value: Any) -> None:
    check_non_negative(name, value, at_most=1.0)
    if value == 1:
        raise ValueError(f"{name} is {value}; expected a number below 1")


def check_warmup(warmup: float) -> None:
    """Raise unless something of the training is left after a `warmup` of this share."""
    check_non_negative("warmup", warmup, at_most=1.0)
    if warmup == 1.0:
        raise ValueError("warmup is 1.0; expected less than 1: the rate decays after it")


def make_optimizer(
    spec: NetworkSpec,
    settings: Settings,
    *,
    learning_rate: float,
    steps: int,
    layer_rates: Sequence[float] = (),
    weight_decay: float = 0.0,
    layer_decays: Sequence[float] = (),
    warmup: float = 0.0,
    cap: float | None = None,
    shrink: float = 0.0,
) -> optax.GradientTransformation:
    """An optimiser with a cosine schedule over `steps` that ends at 0.

    Args:
        spec: the network.
        settings: `AdamW`, `Muon` or `SGD`.
        learning_rate: peak learning rate.
        steps: number of optimisation steps of the whole training.
        layer_rates: factor on the learning rate for each layer, from the lowest up; empty: 1.
        weight_decay: on weights and not on biases. A step takes learning rate times decay times the
            weight off (`AdamW`, `Muon`), or adds decay times the weight to the gradient (`SGD`).
        layer_decays: factor on the weight decay for each layer; empty: 1.
        warmup: share of the steps during which the rate rises linearly from 0.
        cap: what `cap_links` holds the norms of the links at; ``None``: no cap.
        shrink: the decay that `shrink_links` adds to theirs while images are unsettled.

    Raises:
        ValueError, TypeError: naming the argument.

    Example:
        >>> spec = NetworkSpec((8, 8, 1), (Conv(4, 3), Dense(10)))
        >>> optimizer = make_optimizer(spec, Muon(), learning_rate=0.02, steps=100, cap=0.9)
    """
    check_number("learning_rate", learning_rate, above=0.0)
    check_integer("steps", steps, at_least=1)
    check_non_negative("weight_decay", weight_decay)
    check_warmup(warmup)
    check_non_negative("shrink", shrink)
    depth = len(spec.layers)
    for name, values in (("layer_rates", layer_rates), ("layer_decays", layer_decays)):
        check_layer_factors(name, values, depth)
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else learning_rate,
        peak_value=learning_rate,
        warmup_steps=min(round(warmup * steps), steps - 1),
        decay_steps=steps,
    )
    owners = _owners(spec)
    matrices = _matrices(spec)
    factors = layer_decays or (1.0,) * depth
    decays = [weight_decay * factors[owner] for owner in owners]
    decay = optax.stateless(lambda updates, params: _add_weights(spec, updates, params, decays))
    bias_factor = 1.0
    match settings:
        case AdamW():
            direction = (optax.scale_by_adam(settings.b1, settings.b2), decay)
        case SGD():
            direction = (decay, optax.trace(settings.momentum, settings.nesterov))
        case Muon():
            direction = (_muon(settings, spec), decay)
            bias_factor = settings.bias_rate / learning_rate
        case _:
            raise TypeError(f"settings is {settings!r}; expected AdamW, Muon or SGD of "
                            "ep_jax.optimizers")  # fmt: skip
    rates = layer_rates or (1.0,) * depth
    factors = tuple(
        {name: rates[owner] * (1.0 if name in own else bias_factor) for name in like}
        for like, own, owner in zip(network.parameters_of(spec), matrices, owners, strict=True)
    )

    def scale_layers(updates: Any, _: Any) -> Any:
        return jax.tree.map(lambda factor, update: factor * update, factors, updates)

    return optax.chain(
        *direction,
        *((shrink_links(spec, shrink),) if shrink else ()),
        optax.stateless(scale_layers),
        optax.scale_by_learning_rate(schedule),
        *(() if cap is None else (cap_links(spec, cap),)),
    )


def _owners(spec: NetworkSpec) -> tuple[int, ...]:
    """The layer (0-based) whose rates and decay the parameters have; of a skip, its target."""
    return (*range(len(spec.layers)), *(skip.target - 1 for skip in spec.skips))


def _matrices(spec: NetworkSpec) -> tuple[dict[str, int], ...]:
    """See `ep_jax.layers.Layer.matrices`, of each dictionary of parameters."""
    layers = (*spec.layers, *(skip.layer for skip in spec.skips))
    parameters = network.parameters_of(spec)
    return tuple(layer.matrices(like) for layer, like in zip(layers, parameters, strict=True))


def _add_weights(spec: NetworkSpec, directions: Any, params: Any, factors: Sequence[Any]) -> Any:
    """Directions with its factor times the weights of each layer added; biases as they are."""
    return tuple(
        direction | {name: direction[name] + factor * p[name] for name in own}
        for direction, p, factor, own in zip(
            directions, params, factors, _matrices(spec), strict=True
        )
    )


def _muon(settings: Muon, spec: NetworkSpec) -> optax.GradientTransformation:
    """The directions of Muon: orthogonal matrices for the weights, Adam's for the biases."""
    matrices, parameters = _matrices(spec), network.parameters_of(spec)

    def straighten(w: jax.Array, counted: int) -> jax.Array:
        straight = functools.partial(orthogonalize, steps=settings.ns_steps)
        stack = w.reshape(-1, math.prod(w.shape[counted:-1]), w.shape[-1])
        return (jax.vmap(straight)(stack) if counted else straight(stack[0])[None]).reshape(w.shape)

    def straighten_all(updates: Any, _: Any) -> Any:
        return tuple(
            {n: straighten(u, own[n]) if n in own else u for n, u in update.items()}
            for update, own in zip(updates, matrices, strict=True)
        )

    weights = optax.chain(
        optax.trace(settings.momentum, settings.nesterov), optax.stateless(straighten_all)
    )
    labels = tuple(
        {name: "weights" if name in own else "biases" for name in like}
        for like, own in zip(parameters, matrices, strict=True)
    )
    return optax.partition({"weights": weights, "biases": optax.scale_by_adam()}, labels)


def orthogonalize(matrix: jax.Array, steps: int = 5) -> jax.Array:
    """A matrix with its singular vectors, and about one for each singular value.

    Newton-Schulz steps ``X <- X (a + b G + c G^2)`` with ``G = X^T X`` and the coefficients of
    Jordan et al. (2024), as in ``optax.contrib``. Five of them bring what is above .0015 of the
    Frobenius norm to between .68 and 1.21, and what is less to less; nothing above. All factors
    commute, so the steps are made on the small Gram matrix alone, and only the first and the last
    product are of the matrix's own size: four times as fast for ``[3136, 256]``. This squares the
    condition number. A ridge of one rounding unit for every five steps keeps what is lost in
    rounding positive, which the steps would otherwise blow up. In single precision the error of
    five steps is below .005.

    Args:
        matrix: ``[m, n]``; zeros stay zeros.
        steps: number of steps.

    Returns:
        An array ``[m, n]``.

    Example:
        >>> singular = jnp.linalg.svd(orthogonalize(jnp.diag(jnp.array([9.0, 1.0]))))[1]
        >>> bool((singular > 0.68).all() and (singular < 1.21).all())
        True
    """
    check_integer("steps", steps, at_least=1)
    if matrix.shape[0] < matrix.shape[1]:
        return orthogonalize(matrix.T, steps).T
    a, b, c = 3.4445, -4.7750, 2.0315
    info = jnp.finfo(matrix.dtype)
    _, exponent = jnp.frexp(jnp.max(jnp.abs(matrix)))
    matrix = jnp.ldexp(matrix, -exponent)  # squares of a dead layer's momentum would underflow
    unit = jnp.eye(matrix.shape[1], dtype=matrix.dtype)
    with jax.default_matmul_precision("highest"):  # an accelerator would round more than the ridge
        gram = matrix.T @ matrix
        square = jnp.maximum(jnp.trace(gram), 0.25)  # of the Frobenius norm; less where all are 0
        gram = gram / square + max(1.0, steps / 5) * float(info.eps) * unit
        product = jax.lax.rsqrt(square) * unit
        for _ in range(steps):
            factor = a * unit + b * gram + c * (gram @ gram)
            product = product @ factor
            gram = factor @ gram @ factor
        return matrix @ product


class CapState(NamedTuple):
    """State of `cap_links`; the links are ``spec.links``: those between neighbours, then skips.

    Attributes:
        vectors: the power iteration's unit vector of each link, in the packed layout of the state
            below it.
        norms: latest norm of each link, after the cap.
        capped: how many links the last step scaled down, int32.
    """

    vectors: tuple[jax.Array, ...]
    norms: jax.Array
    capped: jax.Array


def cap_links(spec: NetworkSpec, cap: float, iterations: int = 4) -> optax.GradientTransformation:
    """Scale the weights of a link down where a step takes its norm above `cap`.

    It comes last in a chain and looks at ``params + updates``. A link's norm is the operator norm
    of the bias-free drive of a layer by the layer below; the first layer, which the input drives,
    and a read-out outside the dynamics are no part of the loop and stay as they are. A max pool is
    not linear, but 1-Lipschitz: its link is held by the norm of the convolution before it.

    The norm comes from a power iteration that goes on where the step before left it. It is an
    estimate from below, and lags where another singular value overtakes the largest. Above the cap
    by, at most, in per cent, for 1, 2, 4 and 8 iterations: 1.1, .6, .2 and .01 on the digits with
    `Muon` at .05 and the cap at .5 for two epochs. A single one let 5 through after three epochs;
    steps that are all the same and large let 9 through, and 3 with four iterations. Who wants a
    bound keeps a margin, and looks at `link_norms`, which starts anew, now and then.

    Args:
        spec: the network.
        cap: the largest norm allowed.
        iterations: drives and adjoints of one example a step.

    Returns:
        A transformation whose state is a `CapState`.

    Example:
        >>> spec = NetworkSpec((1,), (Dense(1), Dense(1)))
        >>> params = ({"w": jnp.ones((1, 1)), "b": jnp.zeros(1)},) * 2
        >>> capped = cap_links(spec, 0.5)
        >>> updates, state = capped.update(params, capped.init(params), params)
        >>> [(u["w"] + p["w"]).item() for u, p in zip(updates, params)]  # 2 is too much for a link
        [2.0, 0.5]
        >>> state.capped.item()
        1
    """
    check_number("cap", cap, above=0.0)
    check_integer("iterations", iterations, at_least=1)

    def init(params: Any) -> CapState:
        vectors, norms = _measure(params, spec, _start(params, spec), 20)
        return CapState(vectors, norms, jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, CapState]:
        if params is None:
            raise ValueError("params is None; expected the parameters, which cap_links looks at")
        moved = cast(Params, optax.apply_updates(params, updates))
        vectors, norms = _measure(moved, spec, state.vectors, iterations)
        above = norms > cap
        factors = jnp.where(above, cap / norms, 1.0)
        held = _scale_links(spec, updates, params, factors)
        return held, CapState(vectors, factors * norms, above.sum(dtype=jnp.int32))

    return optax.GradientTransformation(init, update)


def _scale_links(spec: NetworkSpec, updates: Any, params: Any, factors: Any) -> Any:
    """Updates that take the weights of each link to its factor times where they would go."""
    scaled, matrices = list(updates), _matrices(spec)
    for edge, factor in zip(spec.links, factors, strict=True):
        u, p = updates[edge.params_index], params[edge.params_index]
        moved = {n: factor * u[n] + (factor - 1) * p[n] for n in matrices[edge.params_index]}
        scaled[edge.params_index] = u | moved
    return tuple(scaled)


def shrink_links(spec: NetworkSpec, decay: float) -> optax.GradientTransformationExtraArgs:
    """Decay of the links' weights while images are unsettled: a controller of the radius.

    Adds ``decay * unsettled`` times the weights to the direction of a step, where ``unsettled`` is
    the share of the batch that the free phase left unsettled (`ep_jax.PhaseInfo`): what is observed
    of contractivity, where `cap_links` holds what would prove it. Like weight decay it comes before
    the learning rate, so that it keeps its strength against the steps as they become small.
    ``update`` takes ``unsettled`` as an argument by name (0 where it is not given).

    Args:
        spec: the network.
        decay: the decay where all images are unsettled.

    Example:
        >>> spec = NetworkSpec((1,), (Dense(1), Dense(1)))
        >>> params = ({"w": jnp.ones((1, 1)), "b": jnp.zeros(1)},) * 2
        >>> shrinking, still = shrink_links(spec, 2.0), jax.tree.map(jnp.zeros_like, params)
        >>> direction, _ = shrinking.update(still, shrinking.init(params), params, unsettled=0.25)
        >>> [d["w"].item() for d in direction]
        [0.0, 0.5]
    """
    check_number("decay", decay, above=0.0)

    def update(
        updates: Any, state: Any, params: Any = None, *, unsettled: Any = 0.0, **others: Any
    ) -> tuple[Any, Any]:
        del others
        if params is None:
            raise ValueError("params is None; expected the parameters, which shrink_links scales")
        links = {edge.params_index for edge in spec.links}
        factors = [decay * unsettled if i in links else 0.0 for i in range(len(params))]
        return _add_weights(spec, updates, params, factors), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def link_norms(params: Params, spec: NetworkSpec, iterations: int = 100) -> jax.Array:
    """The norms of the links between the layers inside the dynamics, ``[L - 1]``, then of skips.

    The operator norm of each bias-free drive by the layer below, as `cap_links` means it, from a
    power iteration that starts anew: it approaches the norm from below.

    Args:
        params: parameters of `spec`.
        spec: the network.
        iterations: drives and adjoints of one example.

    Example:
        >>> spec = NetworkSpec((1,), (Dense(2), Dense(2)))
        >>> params = network.draw_params(jax.random.key(0), spec)
        >>> params[1]["w"] = jnp.array([[0.0, 3.0], [0.5, 0.0]])
        >>> link_norms(params, spec).tolist()
        [3.0]
    """
    network.check_params(spec, params)
    check_integer("iterations", iterations, at_least=1)
    return _measure(params, spec, _start(params, spec), iterations)[1]


def radius_bound(norms: jax.Array, feedback: float, skips: Sequence[Skip] = ()) -> jax.Array:
    """What the norms of the links prove: no spectral radius of the relaxation is larger.

    The largest eigenvalue of the symmetric matrix ``N [L, L]`` that holds, for each link from layer
    ``l`` to ``m``, ``feedback^((m - l) / 2)`` times its norm. Without skips it is tridiagonal, and
    ``2 c cos(pi / (L + 1))`` where all its entries are ``c``.

    If the bound ``r`` is below 1, the activation's slope is at most 1 and no pool takes a maximum:

    1. In ``z_l = alpha^((l - L) / 2) s_l`` the currents are ``S z`` plus a constant, with symmetric
       ``S`` of blocks ``alpha^((m - l) / 2) A_e``, so ``|S| <= |N| = r``, and the Jacobian's radius
       is no larger either.
    2. The energy's Hessian is ``I - S >= 1 - r > 0``: it is strongly convex on the box.
    3. ``N`` has a positive eigenvector ``u`` (Perron). Two states of one input whose layers differ
       by ``d_m`` differ, once layer ``l`` is updated, there by at most ``sum_m N_lm |d_m|``, and
       ``sum_m N_lm |d_m| <= r u_l max_m |d_m| / u_m``.
    4. So each update of a layer brings its ``|d_l| / u_l`` to at most ``r`` times the largest one:
       whatever their order, sweeps without over-relaxation converge, and all to one fixed point.

    A max pool breaks the proof, since its feedback jumps as another unit wins; for it the bound
    holds for the Jacobian at a state only. Winston & Kolter (NeurIPS 2020, arXiv:2006.08591) have
    the like for equilibrium networks by monotone operators.

    Args:
        norms: norms of the links, ``[L - 1]`` and one for each skip, as from `link_norms`.
        feedback: the feedback strength alpha in (0, 1].
        skips: those of the network.

    Returns:
        A scalar.

    Example:
        >>> round(float(radius_bound(jnp.array([1.0, 1.0]), feedback=0.25)), 4)  # cos(pi / 4)
        0.7071
    """
    check_float_array("norms", norms, ("L - 1",))
    check_number("feedback", feedback, above=0.0, at_most=1.0)
    between = [skip for skip in skips if skip.source > 0]  # the input hears nothing
    depth = len(norms) - len(between) + 1
    ends = [(l, l + 1) for l in range(depth - 1)]
    ends += [(skip.source - 1, skip.target - 1) for skip in between]
    bounds = jnp.zeros((depth, depth), norms.dtype)
    for (l, m), of_link in zip(ends, norms, strict=True):
        bounds = bounds.at[l, m].set(feedback ** ((m - l) / 2) * of_link)
    return jnp.linalg.eigvalsh(bounds + bounds.T)[-1]


def norms_of(opt_state: optax.OptState) -> CapState | None:
    """The `CapState` in an optimiser's state; ``None`` where nothing is capped.

    Args:
        opt_state: the state of an optimiser from `make_optimizer`.

    Example:
        >>> spec = NetworkSpec((1,), (Dense(1), Dense(1)))
        >>> params = network.draw_params(jax.random.key(0), spec)
        >>> optimizer = make_optimizer(spec, SGD(), learning_rate=0.1, steps=9, cap=0.9)
        >>> norms_of(optimizer.init(params)).norms.shape
        (1,)
    """
    parts = jax.tree.leaves(opt_state, is_leaf=lambda part: isinstance(part, CapState))
    return next((part for part in parts if isinstance(part, CapState)), None)


def _start(params: Params, spec: NetworkSpec) -> tuple[jax.Array, ...]:
    """Random vectors for `_measure`."""
    dtype = network.precision_of(params)
    return tuple(
        edge.layer.pack(
            (shape := spec.state_shapes[edge.source]),
            jax.random.normal(jax.random.fold_in(jax.random.key(0), edge.number - 1), shape, dtype),
        )
        for edge in spec.links
    )


def _measure(
    params: Params, spec: NetworkSpec, vectors: tuple[jax.Array, ...], iterations: int
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Vectors and norms of the links after a power iteration from `vectors`."""
    measured, factors = [], []
    for edge, vector in zip(spec.links, vectors, strict=True):
        layer, factor = edge.layer.bound()
        prepared = layer.prepare(params[edge.params_index], spec.state_shapes[edge.source])
        step = functools.partial(_stretch, layer, prepared)
        start = (vector, jnp.zeros((), vector.dtype))
        measured.append(
            jax.lax.fori_loop(0, iterations, lambda _, found, step=step: step(found[0]), start)
        )
        factors.append(factor)
    norms = [factor * norm for factor, (_, norm) in zip(factors, measured, strict=True)]
    return tuple(vector for vector, _ in measured), jnp.array(norms, network.precision_of(params))


def _stretch(layer: Layer, prepared: Any, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One step of the power iteration with ``A^T A``: the next unit vector and the norm so far.

    Of the estimates that ``A v`` and ``A^T A v`` allow, ``|A^T A v| / |A v|`` is the largest, and
    the norm is no smaller.
    """
    with jax.default_matmul_precision("highest"):
        there = layer.drive(prepared, v)
        out = norm(there)
        back = layer.pull(prepared, v, there / jnp.where(out > 0, out, 1.0))
    size = norm(back)
    moves = size > 0  # else weights are 0
    return jnp.where(moves, back / jnp.where(moves, size, 1.0), v), size
