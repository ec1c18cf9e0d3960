"""The settled network as a layer under losses, a head and an optimiser of your own.

    python experiments/own_loss.py

Three tasks on the digits: classes by soft-max with label smoothing, classes by a hinge loss with a
margin, and the angle by which an image was turned. `learn` is all there is to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import muon
from flax import nnx
from rich.console import Console
from scipy import ndimage

import ep_jax as ep
from ep_jax.data import load, to_float
from ep_jax.nnx import Equilibrium

SPEC = ep.NetworkSpec(
    (8, 8, 1),
    (ep.Conv(32, 3, padding="SAME"), ep.Conv(64, 3, padding="SAME")),
    output="hard_sigmoid",
)
PHASES = ep.Phases(free=16, nudged=12, estimator="one_sided", relaxation=1.2)
Loss = Callable[[jax.Array, jax.Array], jax.Array]


class Model(nnx.Module):
    """An equilibrium, batch norm, and a linear head."""

    def __init__(self, outputs: int, rngs: nnx.Rngs) -> None:
        self.body = Equilibrium(SPEC, PHASES, rngs=rngs)
        self.norm = nnx.BatchNorm(SPEC.state_shapes[-1][-1], momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(math.prod(SPEC.state_shapes[-1]), outputs, rngs=rngs)

    def __call__(self, xs: jax.Array) -> jax.Array:
        """Outputs ``[B, outputs]`` of images."""
        return self.head(self.norm(self.body(xs)).reshape(len(xs), -1))


def learn(loss: Loss, outputs: int, xs: jax.Array, ys: jax.Array, steps: int = 300) -> Model:
    """A model whose outputs have a small loss."""
    model = Model(outputs, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, muon(0.01, steps, weight_decay=0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model: Model, optimizer: nnx.Optimizer[Model], key: jax.Array) -> None:
        chosen = jax.random.randint(key, (64,), 0, len(xs))
        grads = nnx.grad(lambda model: loss(model(xs[chosen]), ys[chosen]).mean())(model)
        optimizer.update(model, grads)

    for i in range(steps):
        step(model, optimizer, jax.random.key(i))
    model.eval()
    return model


def smoothed(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy with a tenth of the target on all classes."""
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), 0.1)
    return optax.softmax_cross_entropy(logits, targets)


def margin(scores: jax.Array, labels: jax.Array) -> jax.Array:
    """What a wrong class lacks of being one below the right one."""
    right = jnp.take_along_axis(scores, labels[:, None], -1)
    others = jnp.where(jax.nn.one_hot(labels, scores.shape[-1]) == 1, 0, 1 + scores - right)
    return jax.nn.relu(others).max(-1)


def angle(outputs: jax.Array, radians: jax.Array) -> jax.Array:
    """Squared error."""
    return (outputs[:, 0] - radians) ** 2


def turned(images: np.ndarray, seed: int) -> tuple[jax.Array, jax.Array]:
    """Images turned by up to an eighth of a turn to either side, and the angles in radians."""
    radians = np.random.default_rng(seed).uniform(-np.pi / 4, np.pi / 4, len(images))
    found = [
        ndimage.rotate(image, np.rad2deg(a), reshape=False, order=1)
        for image, a in zip(to_float(images), radians, strict=True)
    ]
    return jnp.asarray(np.stack(found)), jnp.asarray(radians, jnp.float32)


def main() -> None:
    """Learn each task, and tell how well on validation images."""
    data, console = load("digits"), Console()
    train, labels = jnp.asarray(to_float(data.train_images)), jnp.asarray(data.train_labels)
    held_out = jnp.asarray(to_float(data.validation_images))
    for name, loss in (("label smoothing", smoothed), ("margin", margin)):
        said = learn(loss, 10, train, labels)(held_out).argmax(-1)
        wrong = 100 * float((said != data.validation_labels).mean())
        console.print(f"{name}: validation error {wrong:.1f} %")
    said = learn(angle, 1, *turned(data.train_images, 0))
    xs, radians = turned(data.validation_images, 1)
    off, spread = (
        float(jnp.rad2deg(jnp.abs(e).mean())) for e in (said(xs)[:, 0] - radians, radians)
    )
    console.print(f"angle: off by {off:.1f} degrees in the mean, of {spread:.1f}")


if __name__ == "__main__":
    main()
