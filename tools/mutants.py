"""Faults put into the mathematics, one at a time: does the suite notice?

    python tools/mutants.py --out runs/mutants
    python tools/mutants.py --out runs/mutants --only nudge_sign fold_quarter

Each mutant is one change of one place of `ep_jax`, made in a copy of the checkout, where the tests
that should notice run first and then all others. A mutant is caught when a test fails; a copy
without a fault, which must pass, comes first. The table of mutants, with what caught each, is
written to mutants.json as it grows; started again, the script goes on with the mutants that are
not in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from rich.console import Console

from ep_jax.files import write_json
from ep_jax.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    """One fault.

    Attributes:
        fault: what is wrong.
        old: text that occurs once in the package, in whatever file.
        new: what takes its place.
        tests: those that should notice.
    """

    fault: str
    old: str
    new: str
    tests: str


EP, BPTT, DYN = "test_equilibrium.py", "test_bptt.py", "test_dynamics.py"
NET, LAY, NEU = "test_network.py", "test_layers.py", "test_neurons.py"
SET = "test_settling.py"

MUTANTS: dict[str, Mutant] = {
    # Energy, currents, layers.
    "phi_weight": Mutant(
        "Phi without the weights alpha^(l - L)",
        "total + jnp.sum(below * s) / spec.weight_of(l)", "total + jnp.sum(below * s)", NET),
    "phi_bias": Mutant(
        "Phi without the biases",
        "own = external(prepared, input_drive(spec, prepared, x))",
        "own = external(prepared._replace(biases=tuple(map(jnp.zeros_like, prepared.biases))), "
        "input_drive(spec, prepared, x))", NET),
    "energy_half": Mutant(
        "|s|^2 for |s|^2 / 2", "/ (2 * spec.weight_of(l))", "/ spec.weight_of(l)",
        NET),
    "weight_depth": Mutant(
        "alpha^(L - l) off by one layer",
        "** (self.depth - 1 - layer)", "** (self.depth - layer)", NET),
    "no_feedback": Mutant(
        "no feedback at all", "total + spec.attenuation(edge) * above",
        "total + 0.0 * above", DYN),
    "full_feedback": Mutant(
        "feedback not attenuated", "total + spec.attenuation(edge) * above",
        "total + 1.0 * above", DYN),
    "skip_attenuated_as_a_layer": Mutant(
        "a skip attenuated as if its ends were neighbours",
        "** (edge.target - edge.source)", "** 1", "test_derivatives.py"),
    "external_bias": Mutant(
        "a bias dropped from the dynamics",
        "b if drive is None else b + drive for b, drive",
        "b if drive is None else drive for b, drive", DYN),
    "dense_transpose": Mutant(
        "the adjoint of a dense layer rolled by one",
        "return maps.product(field, prepared.T)",
        "return jnp.roll(maps.product(field, prepared.T), 1)", LAY),
    "conv_transpose": Mutant(
        "a kernel not transposed in the loop of the adjoint",
        "corner, weights = _apart(part[0]), part[1]",
        "corner, weights = _apart(part[0]), part[1][::-1]", LAY),
    "pool_quarter": Mutant(
        "the mean of a window for its sum",
        "return self.windows(z).mean(0)", "return self.windows(z).sum(0)", LAY),
    "fold_quarter": Mutant(
        "the folded pool without / 4", "for shift in shifts]) / 4",
        "for shift in shifts])", LAY),
    "fold_flip": Mutant(
        "the folded kernel shifted the wrong way",
        "shifts = [((i, 1 - i), (j, 1 - j)", "shifts = [((i, 1 - i), (0, 1)", LAY),
    "padding": Mutant(
        "padding before and after swapped",
        "return before, self.kernel - 1 - before", "return self.kernel - 1 - before, before", LAY),
    "winners": Mutant(
        "losers of a max pool hear as much as winners",
        "return won / won.sum(0)", "return jnp.ones_like(won)", LAY),
    "flatten": Mutant(
        "blocks packed in another order than they are unpacked",
        "packed = packed.reshape(h // 2, w // 2, 2, 2, c).transpose(0, 2, 1, 3, 4)",
        "packed = packed.reshape(h // 2, w // 2, 2, 2, c).transpose(0, 3, 1, 2, 4)", LAY),
    # The relaxation.
    "nudge_sign": Mutant(
        "the nudge away from the target",
        "total = total - self._nudge.beta", "total = total + self._nudge.beta", EP),
    "nudge_sign_displaced": Mutant(
        "the same in displacement coordinates",
        "current = current - self._nudge", "current = current + self._nudge", EP),
    "nudge_at_rest": Mutant(
        "the nudge of the free state, not of the nudged one",
        "output = self._base.state[l] + self._nudge.beta * d", "output = self._base.state[l]", EP),
    "state_reset": Mutant(
        "the nudged phase starts from zero",
        "self.start = start\n        if nudge",
        "self.start = tuple(0 * s for s in start) if nudge else start\n        if nudge", DYN),
    "sweep_order": Mutant(
        "ordered sweeps go up in the nudged phase as well",
        'return tuple(reversed(upwards)) if sweep == "ordered" and nudged else tuple(upwards)',
        "return tuple(upwards)", DYN),
    "opening": Mutant(
        "an opening sweep leaves out one product too many",
        "if heard[edge.target] or (displaced", "if heard[-1] or (displaced", DYN),
    "in_place": Mutant(
        "synchronous sweeps read what was just updated",
        "heard = tuple(latest if self._in_place else before)", "heard = tuple(latest)", DYN),
    "damping": Mutant(
        "a damped step that overshoots",
        "old + epsilon * (new - old)", "old + 2 * epsilon * (new - old)", NEU),
    "displaced_unit": Mutant(
        "a displacement clipped as if it were a state",
        "return jnp.clip(h + (x - s), -s, 1.0 - s)", "return jnp.clip(h + (x - s), 0.0, 1.0)",
        NEU),
    "drive_difference": Mutant(
        "the bias in the displaced current",
        "total = total + spec.attenuation(edge) * moved\n",
        "total = total + spec.attenuation(edge) * (moved + prepared.biases[l])\n", EP),
    "key_shared": Mutant(
        "one random number for all layers",
        "jax.random.fold_in(jax.random.fold_in(self._key, clock.step), l)",
        "jax.random.fold_in(self._key, clock.step)", DYN),
    "key_frozen": Mutant(
        "one random number for all sweeps",
        "jax.random.fold_in(jax.random.fold_in(self._key, clock.step), l)",
        "jax.random.fold_in(self._key, l)", DYN),
    # How far it is from its fixed point, and what follows from that.
    "relaxation_lost": Mutant(
        "no over-relaxation", "self._phases.relaxation * epsilon)",
        "epsilon)", SET),
    "relaxation_twice": Mutant(
        "twice over-relaxed", "phases.relaxation * epsilon)",
        "phases.relaxation**2 * epsilon)", SET),
    "best_settled": Mutant(
        "the best settled examples go on",
        "jax.lax.top_k(found.info.residual,", "jax.lax.top_k(-found.info.residual,", SET),
    "scattered": Mutant(
        "stragglers put back in another order",
        "all_.at[slow].set(some)", "all_.at[slow].set(some[::-1])", SET),
    "resumed_clock": Mutant(
        "stragglers begin their schedule anew",
        "made = jnp.asarray(phases.sweeps(coordinates.nudged), jnp.int32)",
        "made = jnp.asarray(0, jnp.int32)", SET),
    "residual_layer": Mutant(
        "the residual relative to another layer",
        "changes, coordinates.moved(state)))", "changes, coordinates.moved(state)[::-1]))", SET),
    "residual_of_drive": Mutant(
        "a residual before the activation",
        "tuple(spec.activation(l).apply(i) for l, i in enumerate(currents)), currents",
        "tuple(currents), currents", SET),
    "residual_mean": Mutant(
        "the mean residual of a batch told as its largest",
        "residual=jnp.max(info.residual),", "residual=jnp.mean(info.residual),", SET),
    "tolerance_of_one": Mutant(
        "a phase stops when one layer has settled",
        "largest(residuals(coordinates, readout)) < tolerance",
        "residuals(coordinates, readout)[-1] < tolerance", SET),
    "unit_underflow": Mutant(
        "units of a displacement without a lower bound",
        "max(spec.weight_of(l), rounding)", "spec.weight_of(l)", SET),
    "limit": Mutant(
        "the limit on all examples of a batch",
        "factors = jnp.where(sizes > most,", "factors = jnp.where(sizes > 0,", SET),
    "share_of_feedback": Mutant(
        "the feedback of the image itself for that of another",
        "jnp.roll(h, 1, 0), heard)", "jnp.roll(h, 0, 0), heard)", SET),
    # Gradients.
    "half": Mutant(
        "the symmetric estimate without 1/2",
        "jnp.full(len(signs), 1 / len(signs), dtype)", "jnp.ones(len(signs), dtype)", EP),
    "beta": Mutant(
        "psi without 1/beta",
        "phi_of(inputs, s) / beta)(", "phi_of(inputs, s))(", EP),
    "gradient_sign": Mutant(
        "the gradient uphill",
        "weights = jnp.full(batch, -1 / batch,", "weights = jnp.full(batch, 1 / batch,", EP),
    "cotangent_sign": Mutant(
        "the derivative of an equilibrium uphill", "(params, xs, -sizes)",
        "(params, xs, sizes)", "test_derivatives.py"),
    "cotangent_size": Mutant(
        "the size of a cotangent forgotten", "(params, xs, -sizes)",
        "(params, xs, -jnp.ones_like(sizes))", "test_derivatives.py"),
    "free_term": Mutant(
        "one-sided EP without the free state",
        "return total - (at_rest / points.betas[0]) @ weights", "return total", EP),
    "second_order": Mutant(
        "the second-order term of the displaced gradient",
        "nudged = base.state[l] + beta * spec.weight_of(l) * v", "nudged = base.state[l]", EP),
    "key_of_phases": Mutant(
        "the phases at plus and minus beta draw other random numbers",
        "examples = (betas, data, drives, state)\n        found = dynamics.settle_batch("
        "spec, phases, True, coordinates_of, examples, keys)",
        "examples = (betas, data, drives, state)\n        own = None if keys is None else "
        "jax.vmap(jax.random.fold_in)(keys, (betas > 0).astype(int))\n        "
        "found = dynamics.settle_batch(spec, phases, True, coordinates_of, examples, own)", EP),
    "conjugates": Mutant(
        "points of the circle counted once that stand for two",
        "np.where(real, 1.0, 2.0)", "np.where(real, 1.0, 1.0)", EP),
    "readout": Mutant(
        "the read-out of a cross-entropy network does not learn",
        "return (*before, found.readout_gradient, *after)", "return gradient", EP),
    "softmax_nudge": Mutant(
        "a soft-max that does not divide by its sum",
        "jnp.sum(target) * jnp.log(jnp.sum(jnp.exp(shifted)))", "0.0", EP),
    "tracked": Mutant(
        "one sweep too few tracked by truncated BPTT",
        "if tracked < phase.length:", "if (tracked := tracked - 1) < phase.length:", BPTT),
    "remat_rest": Mutant(
        "the sweeps that fill no segment forgotten",
        "(carry) if rest else carry", "(carry) if rest > 99 else carry", BPTT),
    "implicit_source": Mutant(
        "the adjoint iteration without its source",
        "new = jax.tree.map(jnp.add, source, pull(v)[0])",
        "new = jax.tree.map(jnp.add, v, pull(v)[0])", "test_implicit.py"),
    # Neurons.
    "encoder_index": Mutant(
        "encoder and decoder of different sweeps",
        "heard = sent if clock.neighbours_updated else self.leak(jnp.maximum(now - 1, 1.0))",
        "heard = self.leak(jnp.maximum(now - 2, 1.0))", NEU),
    "predictor": Mutant(
        "an encoder that does not invert the decoder",
        "value = state.error + (s - (1.0 - sent) * state.s) / sent",
        "value = state.error + (s - sent * state.s) / sent", NEU),
    "error_lost": Mutant(
        "what was not sent is forgotten",
        "value = state.error + (s -", "value = 0.0 * state.error + (s -", NEU),
    "stale_known": Mutant(
        "receivers not told of a spike",
        "return DeltaCodeState(s, kept + delta * count, delta), count",
        "return DeltaCodeState(s, kept, delta), count", NEU),
    "lag": Mutant(
        "all layers refine at once",
        "jnp.maximum(t - self.lag * (clock.layer - 1), 0.0)", "jnp.maximum(t, 0.0)", NEU),
    "leak": Mutant(
        "a binary delta code that does not leak",
        "kept = (1.0 - leak) * state.known if self.leak else state.known",
        "kept = state.known", NEU),
    "stale_trace": Mutant(
        "a trace that counts a step too few",
        "steps = self.leak * state.steps + 1.0", "steps = self.leak * (state.steps + 1.0)", NEU),
    "average": Mutant(
        "a running mean that never forgets its first value",
        "mean + (s - mean) / (over.astype(s.dtype) + 1), s)",
        "mean + (s - mean) / (over.astype(s.dtype) + 2), s)", NEU),
    "quantum_frozen": Mutant(
        "a quantum that never shrinks", "shrink * before", "before", NEU),
    "quantum_mean": Mutant(
        "a quantum of the mean square gap",
        "jnp.sqrt(jnp.sum(squares * squares) / jnp.where(energy > 0, energy, 1.0))",
        "jnp.sqrt(energy / squares.size)", NEU),
    "levels": Mutant(
        "three levels whatever is asked for",
        "spikes.graded(self.levels // 2)", "spikes.graded(1)", NEU),
    # Training.
    "decay_rate": Mutant(
        "weights decay without the learning rate of their layer",
        "        *direction,\n        *((shrink_links(spec, shrink),) if shrink else ()),\n"
        "        optax.stateless(scale_layers),\n",
        "        direction[0],\n        optax.stateless(scale_layers),\n        *direction[1:],\n",
        "test_optimizers.py"),
    "cap_above": Mutant(
        "links below the cap are scaled up to it",
        "factors = jnp.where(above, cap / norms, 1.0)", "factors = cap / norms",
        "test_optimizers.py"),
    "cap_update": Mutant(
        "a cap on the update, not on the link",
        "factor * u[n] + (factor - 1) * p[n]", "factor * u[n]", "test_optimizers.py"),
    "unsettled_untold": Mutant(
        "an optimiser that is not told of unsettled images",
        "state.params, unsettled=info.free.unsettled", "state.params", "test_training.py"),
    "augment_key": Mutant(
        "every step varies its images alike",
        "jax.random.split(jax.random.fold_in(key, state.step))", "jax.random.split(key)",
        "test_training.py"),
    "epoch_order": Mutant(
        "every epoch in the same order",
        "np.random.default_rng([self.config.seed, epoch])",
        "np.random.default_rng([self.config.seed])",
        "test_run.py"),
}  # fmt: skip


def sources(package: Path) -> dict[Path, str]:
    """The text of each file of a package."""
    return {file: file.read_text() for file in sorted(package.rglob("*.py"))}


def place(mutant: Mutant, texts: Mapping[Path, str]) -> Path:
    """The file that holds the text to change: files may be renamed, and texts may move."""
    found = [file for file, text in texts.items() for _ in range(text.count(mutant.old))]
    if len(found) != 1:
        raise ValueError(f"the package holds {mutant.old!r} {len(found)} times; expected once")
    return found[0]


def mutate(mutant: Mutant, package: Path) -> Path:
    """Put the fault into a package; the file that has it now."""
    file = place(mutant, sources(package))
    file.write_text(file.read_text().replace(mutant.old, mutant.new))
    return file.relative_to(package)


@contextlib.contextmanager
def copied() -> Iterator[Path]:
    """A copy of the checkout."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".*", "results", "runs", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=ignored)
        yield copy


def hunt(name: str) -> dict[str, Any]:
    """Run the suite on a mutated copy, the tests that should notice first."""
    began = time.monotonic()
    mutant = MUTANTS[name]
    with copied() as copy:
        file = mutate(mutant, copy / "ep_jax")
        failed = first_failure(copy, f"tests/{mutant.tests}") or first_failure(copy, "tests")
    return {
        "fault": mutant.fault,
        "file": str(file),
        "caught_by": failed,
        "seconds": round(time.monotonic() - began),
    }


def first_failure(copy: Path, *words: str) -> str | None:
    """The first test that fails; ``None`` where all pass."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *words],
        cwd=copy,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(copy)},
    )
    if done.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode != 1 or found is None:
        raise RuntimeError(f"pytest {words} did not run: {done.stdout[-2000:]}{done.stderr}")
    return found[1]


def score(rows: dict[str, dict[str, Any]]) -> float:
    """The share of faults that were caught."""
    return sum(row["caught_by"] is not None for row in rows.values()) / len(rows)


@dataclass(frozen=True)
class Arguments:
    """Faults put into the mathematics, one at a time."""

    out: Path
    """Folder for mutants.json."""
    only: tuple[str, ...] = ()
    """Names of mutants, hunted anew; by default all that have no row yet."""
    workers: int = 2
    """Mutants at once."""


def main() -> None:
    """Hunt all; exit status 1 where fewer than 95 % are caught."""
    arguments = tyro.cli(Arguments, description=__doc__)
    file = arguments.out / "mutants.json"
    rows: dict[str, dict[str, Any]] = json.loads(file.read_text())["rows"] if file.exists() else {}
    names = arguments.only or [name for name in MUTANTS if name not in rows]
    texts = sources(ROOT / "ep_jax")
    for name in names:
        place(MUTANTS[name], texts)  # before hours
    with copied() as copy:
        if failed := first_failure(copy, "tests", "-n", str(arguments.workers)):
            sys.exit(f"mutants.py: error: {failed} fails without any fault")
    arguments.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(arguments.workers) as pool:
        for name, row in zip(names, pool.map(hunt, names), strict=True):
            made_by = provenance()
            rows[name] = row | {"commit": made_by["commit"]}
            write_json(file, {"score": score(rows), "rows": rows} | made_by)
            Console().print(f"{name}: {row['caught_by']} ({row['seconds']} s)", soft_wrap=True)
    Console().print(f"{score(rows):.1%} of {len(rows)} faults are caught")
    sys.exit(score(rows) < 0.95)


if __name__ == "__main__":
    main()
