"""How a network is relaxed: number, order and size of its sweeps, nudge, estimator, coordinates.

A sweep updates every layer once. In what order it does so changes how fast the state settles, not
where: ``synchronous`` updates all layers from the same old signals, ``alternating`` every other
layer and then the rest, ``ordered`` one after the other, bottom-up in the free phase (as the input
travels) and top-down in the nudged one (as the error does). Each sweep computes the drive and the
adjoint of each layer once, so all cost the same.

**Over-relaxation.** The relaxation of clipped units minimises the quadratic energy ``1/2 s^T (1 -
W) s - b^T s`` on a box, ``W`` symmetric (in the metric of the energy). A sweep in place is a
projected Gauss-Seidel sweep; with steps of ``omega`` times the way to a unit's optimum it is
projected successive over-relaxation, which converges for every ``omega`` in (0, 2) where the energy
is convex (Cryer, SIAM Journal on Control 1971). ``W`` couples adjacent layers alone, so Young's
theory of consistently ordered matrices holds (Iterative Solution of Large Linear Systems, 1971):
with ``rho`` the spectral radius of the synchronous relaxation, a sweep shrinks errors by ``rho``
(synchronous), ``rho^2`` (in place) or, at the optimum ``omega = 2 / (1 + sqrt(1 - rho^2))``
(`optimal_relaxation`), by ``omega - 1``. For smooth activations it is a heuristic without a proof.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ep_jax.checks import check_choice, check_integer, check_key, check_number, known
from ep_jax.network import Edge, NetworkSpec

ESTIMATORS = ("one_sided", "random_sign", "symmetric", "holomorphic")
SWEEPS = ("synchronous", "alternating", "ordered")
COORDINATES = ("absolute", "displacement")
SIGNALS = ("full", "bfloat16")
PRECISIONS = ("float32", "tensorfloat32", "bfloat16")


@dataclass(frozen=True)
class Phases:
    """How the network is relaxed and how its gradient is estimated. Static under ``jit``.

    Attributes:
        free: sweeps of the free phase.
        nudged: sweeps of the nudged phase.
        beta: nudging strength, not 0.
        estimator: ``"one_sided"`` (free against beta), ``"random_sign"`` (free against plus or
            minus beta, drawn for each example), ``"symmetric"`` (plus against minus beta) or
            ``"holomorphic"`` (`points` complex betas on a circle; smooth activations only).
        sweep: ``"synchronous"``, ``"alternating"`` or ``"ordered"``.
        coordinates: ``"absolute"`` or ``"displacement"``, of the nudged phase.
        points: number of points of the holomorphic estimator.
        nudged_signals: ``"full"``, or ``"bfloat16"``: what goes through the weights in the nudged
            phase is rounded to 8 significant bits; states and sums keep their precision. A
            displacement can bear that. A free state cannot: the output's error, to which all that
            is learned is proportional, is a small difference.
        relaxation: ``omega`` in (0, 2): the step of a sweep is ``omega`` times the neuron's own, in
            both phases. Above 1 it needs alternating or ordered sweeps.
        tolerance: stop a phase when the relative residual of every layer is below this; ``free``
            and ``nudged`` are then the largest numbers of sweeps. It is looked at every `CHECK`
            sweeps, since a look costs as much as a sweep. ``None``: do all sweeps.
        stragglers: share of a batch, its least settled examples, that goes on settling when the
            others stop; 0: none does. One example alone (`ep_jax.free_phase`) is no batch.
        free_more: further sweeps of the free phase for the stragglers.
        nudged_more: further sweeps of the nudged phase for its own stragglers.
        limit: how far an example may be displaced by the nudge, relative to its output's error
            and in units of the batch's median; what is beyond is scaled down. An example whose
            relaxation is nearly critical has a huge gradient, which would outweigh all others.
            ``None``: no limit. In displacement coordinates only.
        precision: of the products: ``"float32"`` (that of the states, whatever it is),
            ``"tensorfloat32"`` (10 bits of mantissa on GPUs that have it, and float32 elsewhere),
            or ``"bfloat16"``: links and signals are rounded to 8 significant bits in both phases.
            States and sums keep their precision. A machine never chooses it.

    Example:
        >>> Phases(free=12, nudged=8, sweep="alternating").coordinates
        'displacement'
    """

    free: int = 60
    nudged: int = 40
    beta: float = 1e-3
    estimator: Literal["one_sided", "random_sign", "symmetric", "holomorphic"] = "symmetric"
    sweep: Literal["synchronous", "alternating", "ordered"] = "ordered"
    coordinates: Literal["absolute", "displacement"] = "displacement"
    points: int = 4
    nudged_signals: Literal["full", "bfloat16"] = "full"
    relaxation: float = 1.0
    tolerance: float | None = None
    stragglers: float = 0.0
    free_more: int = 0
    nudged_more: int = 0
    limit: float | None = None
    precision: Literal["float32", "tensorfloat32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        check_integer("Phases.free", self.free, at_least=1)
        check_integer("Phases.nudged", self.nudged, at_least=1)
        check_beta("Phases.beta", self.beta)
        check_choice("Phases.estimator", self.estimator, ESTIMATORS)
        check_choice("Phases.sweep", self.sweep, SWEEPS)
        check_choice("Phases.coordinates", self.coordinates, COORDINATES)
        check_integer("Phases.points", self.points, at_least=2)
        check_choice("Phases.nudged_signals", self.nudged_signals, SIGNALS)
        if self.estimator == "holomorphic" and self.nudged_signals != "full":
            raise ValueError(f"Phases.nudged_signals is {self.nudged_signals!r}; expected 'full' "
                             "with estimator='holomorphic', whose signals are complex")  # fmt: skip
        check_choice("Phases.precision", self.precision, PRECISIONS)
        if self.estimator == "holomorphic" and self.precision == "bfloat16":
            raise ValueError("Phases.precision is 'bfloat16'; expected another one with "
                             "estimator='holomorphic', whose signals are complex")  # fmt: skip
        check_number("Phases.relaxation", self.relaxation, above=0.0)
        if self.relaxation >= 2.0:
            raise ValueError(f"Phases.relaxation is {self.relaxation}; expected a number below 2, "
                             "from which on no relaxation converges")  # fmt: skip
        if self.relaxation > 1.0 and self.sweep == "synchronous":
            raise ValueError(
                f"Phases.relaxation is {self.relaxation} with sweep='synchronous'; expected at "
                "most 1, or 'alternating' or 'ordered' sweeps, for which over-relaxation has a "
                "theory"
            )
        if self.tolerance is not None:
            check_number("Phases.tolerance", self.tolerance, above=0.0)
        check_number("Phases.stragglers", self.stragglers)
        check_integer("Phases.free_more", self.free_more, at_least=0)
        check_integer("Phases.nudged_more", self.nudged_more, at_least=0)
        if not 0.0 <= self.stragglers < 1.0:
            raise ValueError(f"Phases.stragglers is {self.stragglers}; expected a share of the "
                             "batch, at least 0 and less than 1")  # fmt: skip
        if bool(self.stragglers) != bool(self.free_more + self.nudged_more):
            raise ValueError(
                f"Phases.stragglers is {self.stragglers}, free_more {self.free_more} and "
                f"nudged_more {self.nudged_more}; expected a share of the batch and the further "
                "sweeps that it makes, or neither"
            )
        if self.limit is not None:
            check_number("Phases.limit", self.limit, above=0.0)
            if self.coordinates != "displacement":
                raise ValueError(f"Phases.limit is {self.limit} with coordinates="
                                 f"{self.coordinates!r}; expected 'displacement'")  # fmt: skip

    def products(self) -> AbstractContextManager[Any]:
        """Where programs are traced: their products have the precision of these phases."""
        exact = self.precision != "tensorfloat32"
        return jax.default_matmul_precision("float32" if exact else "tensorfloat32")

    def sweeps(self, nudged: bool) -> int:
        """Sweeps of every example in a phase."""
        return self.nudged if nudged else self.free

    def more(self, nudged: bool) -> int:
        """Further sweeps of a phase's stragglers."""
        return self.nudged_more if nudged else self.free_more

    def mean_sweeps(self, nudged: bool) -> float:
        """Sweeps of a phase, mean of the examples of a batch."""
        return self.sweeps(nudged) + self.stragglers * self.more(nudged)

    def longer(self, factor: int) -> Phases:
        """So many times the free sweeps, the stragglers' as well, all of which are made."""
        return replace(
            self, free=factor * self.free, free_more=factor * self.free_more, tolerance=None
        )

    def without_stragglers(self) -> Phases:
        """The phases in which no example goes on."""
        return replace(self, stragglers=0.0, free_more=0, nudged_more=0)

    def for_all(self) -> Phases:
        """The phases in which every example makes as many sweeps as a straggler of these."""
        return replace(
            self.without_stragglers(),
            free=self.free + self.free_more,
            nudged=self.nudged + self.nudged_more,
        )

    def straggling(self, batch: int) -> int:
        """How many examples of a batch go on.

        Raises:
            ValueError: the batch's size is symbolic.
        """
        if self.stragglers and not isinstance(batch, int):
            raise ValueError(f"stragglers is {self.stragglers} in a batch of the symbolic size "
                             f"{batch}; expected 0, or a size that is known")  # fmt: skip
        return math.ceil(self.stragglers * batch)


def optimal_relaxation(radius: float) -> float:
    """Young's optimum ``2 / (1 + sqrt(1 - radius^2))`` for the radius of a synchronous relaxation.

    Example:
        >>> round(optimal_relaxation(0.8), 3)  # errors shrink by .25 a sweep, not by .8^2 = .64
        1.25
    """
    check_number("radius", radius)
    if not 0.0 <= radius < 1.0:
        raise ValueError(f"radius is {radius}; expected at least 0 and less than 1, where the "
                         "relaxation is contractive")  # fmt: skip
    return 2.0 / (1.0 + math.sqrt(1.0 - radius**2))


def check_beta(name: str, beta: Any) -> None:
    """Raise where `beta` is known and no finite number other than 0."""
    if not known(beta):
        return
    beta = beta.item() if hasattr(beta, "item") and getattr(beta, "ndim", 1) == 0 else beta
    check_number(name, beta)
    if beta == 0:
        raise ValueError(f"{name} is 0; expected a nudging strength other than 0")


def check_phases(spec: NetworkSpec, phases: Phases, key: jax.Array | None) -> None:
    """Raise where `phases` or `key` do not suit `spec`."""
    if not isinstance(phases, Phases):
        raise TypeError(f"phases is {phases!r}; expected ep_jax.Phases")
    if phases.estimator == "holomorphic" and not is_holomorphic(spec):
        raise ValueError(f"estimator is 'holomorphic', but the network has {spec.neuron} or a max "
                         "pool, which are not smooth; expected Rate neurons with activation "
                         "'sigmoid', 'tanh', 'softplus' or 'linear' and no max pool")  # fmt: skip
    if phases.relaxation != 1.0 and not getattr(spec.neuron, "damped", True):
        raise ValueError(f"phases.relaxation is {phases.relaxation}; expected 1 with "
                         f"{spec.neuron}, whose state makes no step towards its drive")  # fmt: skip
    if key is not None:
        check_key("key", key)
    elif spec.neuron.stochastic:
        raise ValueError(f"key is None; expected a random key for {spec.neuron}")


ROUNDING = 100
"""A nudge that reaches a layer with fewer units of rounding than this is lost in absolute
coordinates."""


def check_nudge(spec: NetworkSpec, phases: Phases, beta: Any, dtype: Any) -> None:
    """Raise where a nudge in absolute coordinates is lost in rounding before the lowest layer."""
    if phases.coordinates != "absolute" or not known(beta):
        return
    reaches = abs(float(abs(np.asarray(beta)))) * spec.weight_of(0)
    rounded = phases.precision == "bfloat16"
    rounding = float(jnp.finfo(jnp.bfloat16 if rounded else dtype).eps)
    if reaches < ROUNDING * rounding:
        raise ValueError(
            f"beta is {beta} and feedback {spec.feedback}: a nudge of beta * feedback^(L - 1) = "
            f"{reaches:.1e} reaches the lowest of {spec.depth} layers, where a state of {dtype} "
            f"rounds at {rounding:.1e}{' in products of bfloat16' if rounded else ''}; expected at "
            f"least {ROUNDING} times that, or "
            "coordinates='displacement', which are exact at any strength"
        )


def is_holomorphic(spec: NetworkSpec) -> bool:
    """Whether the relaxation is a holomorphic function of its state."""
    return spec.neuron.activation != "hard_sigmoid" and all(
        edge.layer.linear for edge in spec.edges
    )


def sweep_order(sweep: str, depth: int, nudged: bool) -> tuple[int, ...]:
    """The order in which a sweep updates the layers (0-based).

    Alternating sweeps begin with the layers that the news reaches first: those at an even distance
    from the input in the free phase, from the output in the nudged one.
    """
    if sweep == "alternating":
        first = (depth - 1) % 2 if nudged else 0
        return (*range(first, depth, 2), *range(1 - first, depth, 2))
    upwards = range(depth)
    return tuple(reversed(upwards)) if sweep == "ordered" and nudged else tuple(upwards)


class Update(NamedTuple):
    """One layer's turn in a sweep, and which neighbours have something to say to it.

    Attributes:
        layer: number of the layer, 0-based.
        below: the edges by which it hears layers below.
        above: the edges by which it hears layers above.
    """

    layer: int
    below: tuple[Edge, ...]
    above: tuple[Edge, ...]


def all_hear_all(spec: NetworkSpec) -> tuple[Update, ...]:
    """The turns of all layers, bottom-up, in which each hears all of its neighbours."""
    return tuple(
        Update(
            l,
            tuple(edge for edge in spec.links if edge.target == l),
            tuple(edge for edge in spec.links if edge.source == l),
        )
        for l in range(spec.depth)
    )


OPENING = 2
"""Most sweeps at the start of a phase that are compiled by themselves, for what they leave out."""


def plan(
    spec: NetworkSpec, phases: Phases, nudged: bool, from_zero: bool
) -> tuple[tuple[Update, ...], ...]:
    """The updates of the first sweeps of a phase and, last, those of all others.

    A state of zero says nothing, and a displacement of zero stays so until the layer hears another
    one; products with such signals need not be made. Of twelve free and eight nudged alternating
    sweeps that is a tenth of all products.

    Args:
        spec: the network.
        phases: its phases.
        nudged: whether it is the nudged phase.
        from_zero: whether the phase starts from signals of zero (a displacement always does).

    Example:
        >>> spec = NetworkSpec((2,), (ep_jax.Dense(2), ep_jax.Dense(2)))
        >>> first, *_ = plan(spec, Phases(sweep="ordered"), nudged=False, from_zero=True)
        >>> [(turn.layer, len(turn.below), len(turn.above)) for turn in first]
        [(0, 0, 0), (1, 1, 0)]
    """
    depth, displaced = spec.depth, nudged and phases.coordinates == "displacement"
    turns = all_hear_all(spec)
    audible = [not from_zero] * depth
    sweeps: list[tuple[Update, ...]] = []
    while True:
        all_speak = all(audible)
        heard = audible if phases.sweep != "synchronous" else list(audible)
        updates = []
        for l in sweep_order(phases.sweep, depth, nudged):
            below = tuple(edge for edge in turns[l].below if heard[edge.source])
            # Where a map is not linear, what comes back changes with the layer's own state.
            above = tuple(
                edge
                for edge in turns[l].above
                if heard[edge.target] or (displaced and not edge.layer.linear and heard[l])
            )
            updates.append(Update(l, below, above))
            audible[l] = audible[l] or not displaced or bool(below or above) or l == depth - 1
        if all_speak or len(sweeps) < OPENING:
            sweeps.append(tuple(updates))
        if all_speak:
            return tuple(sweeps)
