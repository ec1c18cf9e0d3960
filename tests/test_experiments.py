"""The experiments on small inputs: what they measure is what their studies say they measure."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import anytime
import common
import forming
import frontier
import gradient_check
import guarantee
import hardware
import jax
import jax.numpy as jnp
import numpy as np
import pooling
import prune
import pytest
import recurrence
import results_table
import robustness
import strong_feedback

import ep_jax as ep
from ep_jax import training
from ep_jax.data import load
from ep_jax.optimizers import SGD, Muon, make_optimizer
from ep_jax.phases import optimal_relaxation
from ep_jax.presets import PRESETS


def images(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Blots of the size of digits, and labels."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(size=(count, 7, 7, 1)) ** 3
    return np.kron(coarse, np.ones((1, 4, 4, 1))).astype(np.float32), np.arange(count) % 10


@pytest.mark.slow
def test_gradient_check_of_saved_weights(tmp_path: Path) -> None:
    """A network nobody trained: at weak feedback its rate gradients are exact, and so says it."""
    layers = (ep.Conv(4, 3, padding="SAME"), ep.Dense(8), ep.Dense(10))
    spec = ep.NetworkSpec((8, 8, 1), layers, ep.DeltaCode(), feedback=0.1)
    phases = ep.Phases(20, 12, 1e-3, "one_sided", stragglers=0.5, free_more=2, nudged_more=2)
    ep.save_weights(tmp_path, ep.init_params(jax.random.key(0), spec), spec, phases)
    arguments = gradient_check.Arguments(
        tmp_path / "out", weights=tmp_path, dataset="digits", batches=2, batch=8
    )
    gradient_check.check(arguments)
    found = json.loads((tmp_path / "out" / "check.json").read_text())
    gradients = found["gradients"]
    for name in ("EP, rate neurons", "BPTT, rate neurons"):
        assert np.shape(gradients[name]["cosine"]) == (2, 3)
        assert np.min(gradients[name]["cosine"]) > 0.9999
        np.testing.assert_allclose(gradients[name]["norm_ratio"], 1, atol=0.01)
    assert np.min(gradients["EP, as trained"]["total_cosine"]) > 0.95
    assert np.max(found["gdu"]["params_rmse"]) < 1e-3
    assert np.max(found["spectral_radius"]) < 1
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {"gdu.png", "agreement.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either --weights or --preset"),
        ({"preset": "mnist", "weights": Path("x")}, "either --weights or --preset"),
        ({"preset": "nope"}, "preset is 'nope'"),
        ({"weights": Path("x")}, "expected --dataset"),
    ],
)
def test_gradient_check_names_what_is_missing(arguments: Any, message: str) -> None:
    """Before anything is loaded."""
    with pytest.raises(ValueError, match=message):
        gradient_check.Arguments(Path("out"), **arguments)


@pytest.mark.slow
def test_a_max_pool_does_not_see_spikes_as_it_sees_traces() -> None:
    """The study's mechanism: single spikes move winners and inflate maxima, traces hardly do."""
    budget = pooling.Budget(channels=(4, 4), hidden=8)
    xs, ys = images(4)
    spec = pooling.network_of(budget, "max", ep.Rate(), 0.05)
    params = ep.init_params(jax.random.key(0), spec, gain=1.0)
    (exact,) = common.exact_gradients(params, spec, xs[None], ys[None])
    settle = jax.jit(jax.vmap(lambda x: ep.free_phase(params, spec, x, ep.Phases(60))[0]))
    case = pooling.Case(params, xs, ys, exact, settle(xs), 0.0)
    rate, spikes, traces = (
        pooling._measure(budget, "max", "weak", code, "few", [case])
        for code in ("rate", "constant", "constant, pool on traces")
    )
    assert rate["cosine"][0] > 0.999
    assert max(rate["state_error"][0]) < 1e-4
    assert spikes["winner_moves"][0] > 2 * traces["winner_moves"][0] > 0
    assert spikes["bias"][0] > 4 * abs(traces["bias"][0])


def test_frontier_measures_against_the_exact_gradient() -> None:
    """A settled rate network agrees with it; a code's spikes are counted."""
    xs, ys = images(4)
    spec = ep.NetworkSpec((28, 28, 1), (ep.Conv(4, 5), ep.Dense(10)))
    params = ep.init_params(jax.random.key(0), spec, 0.6)
    exact = common.exact_gradients(params, spec, xs[None], ys[None])
    subject = frontier.Subject("early", spec, params, exact, xs[None], ys[None])
    rate = frontier.measure(subject, frontier.RATE, ep.Phases())
    assert frontier.cosines(rate).min() > 0.9999
    assert rate["spikes_free"] == 0
    assert frontier.measure(subject, frontier.CODE, ep.Phases())["spikes_free"] > 0.1


@pytest.mark.slow
def test_recurrence_of_a_network_trained_by_muon(tmp_path: Path) -> None:
    """An epoch of the digits at feedback 1: it is recurrent, it settles, its gradient is right."""
    layers = (ep.Conv(4, 3, padding="SAME"), ep.Dense(8), ep.Dense(10))
    spec = ep.NetworkSpec((8, 8, 1), layers, ep.DeltaCode())
    phases = ep.Phases(
        30, 20, 1e-2, "one_sided", relaxation=1.2, stragglers=0.25, free_more=5, nudged_more=5
    )
    params, metrics = common.learn(
        spec,
        phases,
        ep.ep_gradient,
        load("digits"),
        steps=40,
        learning_rate=0.02,
        weight_decay=0.1,
        gain=0.5,
        batch=32,
        optimizer=Muon(),
        cap=0.9,
    )
    assert metrics.loss[-5:].mean() < 0.9 * metrics.loss[:5].mean()
    assert metrics.links is not None
    assert max(float(norm.max()) for norm in metrics.links.norms) < 0.95
    ep.save_weights(tmp_path, params, spec, phases)
    arguments = recurrence.Arguments(
        tmp_path, "digits", tmp_path, images=16, batches=2, fast_images=8, scales=(1.0,)
    )
    recurrence.check(arguments)
    found = json.loads((tmp_path / "recurrence.json").read_text())
    assert len(found["recurrent"]["share"]) == 3
    assert max(found["recurrent"]["share"]) > 0.02
    assert max(found["settled"]["distance"]) < 0.02
    assert list(found["right"]) == ["own, 30 + 20", "rate, 30 + 20"]
    assert min(found["right"]["rate, 30 + 20"]["lowest"]) > 0.99
    fast = found["fast"]
    assert 0.1 < fast["radius_largest"] < 1
    assert fast["relaxation"] == optimal_relaxation(fast["radius_largest"])
    assert fast["sweeps"] <= fast["sweeps_without"]
    assert fast["fixed_points_apart"] < 1e-12
    told = recurrence.summary({"muon": found})
    assert f"| error at the fixed point, % | {found['recurrent']['error']:.2f} |" in told
    assert "| `muon` | own, 30 + 20 |" in recurrence.more_sweeps({"muon": found})


def test_young_predicts_what_he_proved() -> None:
    """The spectral radius of the matrix of an over-relaxed sweep, on a chain of three unknowns."""
    chain = np.diag([0.6, 0.5], 1) + np.diag([0.6, 0.5], -1)
    radius = np.abs(np.linalg.eigvals(chain)).max()
    best = optimal_relaxation(radius)
    for omega in (1.0, 1.1, best, 1.5, 1.8):
        below = np.eye(3) - omega * np.tril(chain)
        sweep = np.linalg.solve(below, (1 - omega) * np.eye(3) + omega * np.triu(chain))
        expected = np.abs(np.linalg.eigvals(sweep)).max()
        np.testing.assert_allclose(strong_feedback.young_factor(omega, radius), expected, rtol=1e-6)
    assert optimal_relaxation(0.0) == 1.0
    assert strong_feedback.young_sweeps(1.0, 0.0) == 1.0
    assert strong_feedback.young_sweeps(1.0, 1.0) is None


def test_muon_spreads_a_step_and_sgd_does_not() -> None:
    """A gradient of all but rank one, as states that are never negative make it."""
    layers = (ep.Dense(32), ep.Dense(10))
    spec = ep.NetworkSpec((20,), layers)
    params = ep.init_params(jax.random.key(0), spec)
    key = jax.random.key(1)
    activity = jax.random.uniform(key, (32,))
    errors = jax.random.normal(key, (10,))
    noise = 0.05 * jax.random.normal(jax.random.key(2), (32, 10))
    grads: Any = jax.tree.map(jnp.zeros_like, params)
    grads[1]["w"] = jnp.outer(activity, errors) + noise
    found = {}
    for settings in (SGD(), Muon()):
        optimizer = make_optimizer(spec, settings, learning_rate=0.1, steps=9)
        steps: Any = jax.jit(optimizer.update)(grads, optimizer.init(params), params)[0]
        step = steps[1]["w"]
        found[type(settings)] = (
            float(strong_feedback.concentration(step)),
            float(strong_feedback.along(step, activity)),
        )
    assert min(found[SGD]) > 0.95
    equal = 1 / np.sqrt(10)
    assert equal - 1e-6 <= found[Muon][0] < 1.3 * equal  # singular values are within .68 and 1.21
    assert found[Muon][1] < (1.3 * equal) ** 2


@pytest.mark.slow
def test_strong_feedback_follows_two_optimisers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few steps on digits: what is told agrees with theory, and nothing is made twice."""
    monkeypatch.setattr(strong_feedback, "FEEDBACKS", (1.0,))
    monkeypatch.setattr(strong_feedback, "LOOKS", 2)
    arguments = strong_feedback.Arguments(
        tmp_path / "runs",
        tmp_path / "out",
        parts=("feedback",),
        dataset="digits",
        train_images=256,
        seeds=(0,),
        batches=2,
        images=8,
    )
    study = strong_feedback.Study(arguments)
    looks = {
        name: study.trained(strong_feedback.Cell(name, 0))["looks"] for name in ("sgd", "muon")
    }
    ranks = np.sqrt([9, 64, 128, 10])  # of the kernels and matrices: the smaller side
    for seen in looks.values():
        assert [len(look["links"]) for look in seen] == [3] * len(seen)
        spread = np.array([look["concentration"] for look in seen])
        assert (spread * ranks > 1 - 1e-3).all()
        assert (spread < 1 + 1e-4).all()
        for look in seen:
            assert look["radius"]["mean"] <= look["radius"]["largest"] <= look["bound"] + 1e-2
            assert min(look["along"]) > 0
    sgd, muon = (
        np.array([look["concentration"] for look in looks[name]]) for name in ("sgd", "muon")
    )
    assert (muon[:, 3] * ranks[3] < 1.3).all()  # ten classes: all singular values are made one
    assert (sgd[:, 1:3].mean(0) > 2 * muon[:, 1:3].mean(0)).all()

    strong_feedback.run(arguments)
    written = json.loads((tmp_path / "out" / "strong_feedback.json").read_text())
    kinds = [row["kind"] for row in written["rows"]]
    assert kinds == ["training", "training", "feedback"]
    fast = written["rows"][-1]
    assert fast["relaxation"] == optimal_relaxation(fast["radius_largest"])
    assert 1 < fast["sweeps"] <= fast["sweeps_without"]
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {"training.png", "settling.png"}


@pytest.mark.usefixtures("nans_allowed")
def test_intervals_and_json() -> None:
    """Student's t for five values by hand; numbers that are none become None."""
    mean, half = common.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    np.testing.assert_allclose(half, 2.7764 * np.sqrt(2.5) / np.sqrt(5), rtol=1e-4)
    tree = {"a": jnp.array([1.0, np.nan]), "b": (np.float32(2), "x", None)}
    assert common.plain(tree) == {"a": [1.0, None], "b": [2.0, "x", None]}


def test_the_answer_after_each_sweep() -> None:
    """A sweep off by one, or spikes that are not summed up."""
    layers = (ep.Conv(4, 3, padding="SAME"), ep.Dense(8), ep.Dense(10))
    spec = ep.NetworkSpec((8, 8, 1), layers, ep.DeltaCode(), feedback=0.1)
    params = ep.init_params(jax.random.key(0), spec)
    pictures = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1)).astype(np.uint8)
    phases = ep.Phases(free=8, sweep="ordered")
    answers, spikes = anytime.follow(params, spec, phases, pictures, batch=3)
    assert answers.shape == (8, 6)
    for sweeps in (3, 8):
        expected, info = training.predict(params, spec, replace(phases, free=sweeps), pictures)
        assert (answers[sweeps - 1] == expected).all()
        np.testing.assert_allclose(spikes[sweeps - 1], info.spikes, rtol=1e-5)


@pytest.mark.slow
def test_pruned_weights_answer_as_before(tmp_path: Path) -> None:
    """A network of which two channels and three units never wake."""
    layers = (ep.Conv(4, 3, padding="SAME"), ep.Dense(8), ep.Dense(10))
    spec = ep.NetworkSpec((8, 8, 1), layers, ep.DeltaCode(), feedback=0.1)
    params = list(ep.init_params(jax.random.key(0), spec))
    for l, silent in enumerate(([0, 2], [1, 2, 7])):
        bias = jnp.full_like(params[l]["b"], 0.5).at[np.array(silent)].set(-50.0)
        params[l] = params[l] | {"b": bias}
    phases = ep.Phases(free=8, sweep="ordered")
    ep.save_weights(tmp_path / "large", tuple(params), spec, phases)
    prune.run(prune.Arguments(tmp_path / "large", "digits", tmp_path / "small"))
    result = json.loads((tmp_path / "small" / "result.json").read_text())
    assert result["before"]["units"] == [4, 8, 10]
    assert result["after"]["units"] == [2, 5, 10]
    assert result["before"]["parameters"] == (9 + 1) * 4 + (4 * 4 * 4 + 1) * 8 + (8 + 1) * 10
    assert result["after"]["parameters"] == (9 + 1) * 2 + (4 * 4 * 2 + 1) * 5 + (5 + 1) * 10
    assert result["changed_validation_answers"] == 0
    smaller, smaller_spec, _ = ep.load_weights(tmp_path / "small")
    assert sum(a.size for a in jax.tree.leaves(smaller)) == result["after"]["parameters"]
    pictures = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 1)).astype(np.uint8)
    before, _ = training.predict(tuple(params), spec, phases, pictures)
    after, _ = training.predict(smaller, smaller_spec, phases, pictures)
    np.testing.assert_array_equal(after, before)


def result_file(path: Path, seed: int, error: float, epochs: int = 10, **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    config = {
        "seed": seed,
        "epochs": epochs,
        "gradient": "ep",
        "neuron": "delta_code",
        "feedback": 0.05,
        "phases": {"free": 9, "nudged": 6, "free_more": 12, "nudged_more": 0},
    }
    result = {
        "seed": seed,
        "config": config,
        "test_error": error,
        "test_error_4x": error + 0.01,
        "val_error": [3.0, 1.0],
        "last_epoch": {"spikes_free": 0.5, "spikes_nudged": 0.25},
    } | more
    path.write_text(json.dumps(result))


def test_results_become_a_table(tmp_path: Path) -> None:
    """Mean and spread over seeds, and runs that do not belong together."""
    for seed, error in enumerate((0.5, 0.6, 0.7)):
        heard = {"share": [0.1, 0.2], "radius_mean": 0.5, "radius_largest": error, "error_cut": 9}
        path = tmp_path / "mnist" / "preset" / f"seed{seed}.json"
        result_file(path, seed, error, recurrence=heard)
    result_file(tmp_path / "mnist" / "single" / "seed0.json", 0, 0.4)
    result_file(tmp_path / "digits" / "preset" / "seed0.json", 0, 1.0)
    _, _, digits, *published, many, one = results_table.table(tmp_path).splitlines()
    assert "| digits | `preset` |" in digits
    assert any("Lin et al. 2024" in line and "| 0.97 |" in line for line in published)
    assert many == (
        "| mnist | `preset` | delta code | EP | 10; 0, 1, 2 | 9 (+12)/6 | 0.05 | 0.10 0.20 "
        "| 0.50; 0.70 | 0.60 ± 0.10 | 1.00 ± 0.00; 9.00 ± 0.00 | 0.50 + 0.250 |"
    )
    assert "| 0.05 | – | – | 0.40 | 1.00; – |" in one  # an older file
    assert results_table.spread([]) == "–"  # nothing held out: no validation error
    result_file(tmp_path / "mnist" / "preset" / "seed3.json", 3, 0.5, epochs=20)
    with pytest.raises(ValueError, match="mnist/preset holds runs whose configurations differ"):
        results_table.table(tmp_path)
    with pytest.raises(ValueError, match="expected a folder with DATASET/NAME"):
        results_table.table(tmp_path / "mnist" / "single")


def test_neuron_models_in_words() -> None:
    """Older files hold a name, newer ones a description."""
    assert results_table.neurons("delta_code") == "delta code"
    assert results_table.neurons({"type": "SigmaDelta", "lam": 0.5}) == "sigma delta"
    leaky = {"type": "DeltaCode", "leak": True}
    assert results_table.neurons(leaky) == "sigma-delta, closed loop"


def test_the_hardware_of_saved_weights(tmp_path: Path) -> None:
    """Spikes from the result file; half of the images make four sweeps more."""
    spec = ep.NetworkSpec((8,), (ep.Dense(4), ep.Dense(2)), ep.DeltaCode())
    phases = ep.Phases(10, 5, 0.1, "one_sided", stragglers=0.5, free_more=4, nudged_more=2)
    ep.save_weights(tmp_path, ep.init_params(jax.random.key(0), spec), spec, phases)
    result: dict[str, Any] = {"spikes_per_neuron": [1.5, 2.0]}
    (tmp_path / "result.json").write_text(json.dumps(result))
    cost = hardware.cost_of(tmp_path, "float32")
    assert cost.inference.macs == 32 + 12 * 6 * 2
    assert cost.inference.acs == 28
    assert "learning by EP" not in hardware.table(cost)  # an older file
    result["last_epoch"] = {"spikes_nudged_per_layer": [0.5, 0.0]}
    (tmp_path / "result.json").write_text(json.dumps(result))
    cost = hardware.cost_of(tmp_path, "int8")
    assert cost.ep is not None
    assert cost.ep.acs == 28 + 2 * 2
    assert cost.ep.macs == 32 + (12 + 6) * 6 * 2 + 48 + 46
    assert "| learning by EP | 0.0 |" in hardware.table(cost)


def test_spoiled_images_are_what_they_are_said_to_be() -> None:
    """A strength of zero that spoils, values beyond [0, 1], a square of another size or place."""
    images = np.random.default_rng(0).uniform(size=(5, 10, 12, 1)).astype(np.float32)
    for kind in robustness.STRENGTHS:
        if kind != "attack":
            np.testing.assert_allclose(robustness.spoil(kind, 0.0, images), images, atol=1e-6)
            spoiled = robustness.spoil(kind, 0.9, images)
            assert spoiled.dtype == images.dtype
            assert 0 <= spoiled.min() <= spoiled.max() <= 1
    hidden = robustness.spoil("hidden square", 0.4, images)
    assert ((hidden == 0).sum((1, 2, 3)) == 16).all()
    assert len({tuple(np.argwhere(image == 0)[0]) for image in hidden}) > 1
    grey = robustness.spoil("lost contrast", 1.0, images)
    np.testing.assert_allclose(
        grey, np.broadcast_to(images.mean((1, 2), keepdims=True), grey.shape)
    )


@pytest.mark.parametrize("rule", [ep.EP(), ep.BPTT()])
def test_an_attack_on_a_linear_network_is_the_best_there_is(rule: ep.Derivative) -> None:
    """Steps down, or out of the ball; a gradient of another image: best is a corner of the ball."""
    spec = ep.NetworkSpec((6,), (ep.Dense(2),), ep.Rate())
    params = ep.init_params(jax.random.key(0), spec)
    outputs = robustness.outputs_of(params, spec, ep.Phases(free=4, nudged=4), rule)
    xs, ys = (
        jax.random.uniform(jax.random.key(1), (4, 6), minval=0.2, maxval=0.7),
        jnp.arange(4) % 2,
    )
    moved = robustness.attack(outputs, xs, ys, 0.1, 20, jax.random.key(2))
    towards = params[0]["w"].T[1 - ys] - params[0]["w"].T[ys]
    np.testing.assert_allclose(moved, xs + 0.1 * jnp.sign(towards), atol=1e-6)


def test_what_feedback_says_is_brought_back_by_the_adjoint() -> None:
    """A picture of something else: of the input, of the wrong layer, of other weights."""
    spec = ep.NetworkSpec((4, 3, 1), (ep.Dense(6), ep.Dense(5)), ep.DeltaCode())
    params = ep.init_params(jax.random.key(0), spec, gain=0.4)
    x = jnp.asarray(np.random.default_rng(1).uniform(size=(1, 4, 3, 1)), jnp.float32)
    seen = forming.follow(params, spec, x, sweeps=3)
    (w, b), (v, _) = (
        (np.asarray(params[0][n]) for n in "wb"),
        (np.asarray(params[1][n]) for n in "wb"),
    )
    alone, last = np.clip(x.reshape(-1) @ w + b, 0, 1), seen.settled[0]
    state = np.clip(x.reshape(-1) @ w + b + v @ last, 0, 1)
    assert np.abs(state - alone).max() > 1e-3
    np.testing.assert_allclose(seen.said[0].reshape(-1), w @ (state - alone), atol=1e-5)
    np.testing.assert_allclose(seen.outputs[0, 0], seen.alone[0], atol=1e-6)


def test_what_feedback_mends_and_spoils_is_counted() -> None:
    """Mended and spoiled swapped, or counted among those that both get right."""
    labels = np.array([0, 1, 1, 0, 1])
    settled, alone = np.eye(2)[[0, 1, 0, 0, 1]], np.eye(2)[[1, 0, 1, 0, 0]]
    assert forming.count(forming.Forming(None, settled, alone, None), labels) == {
        "images": 5,
        "wrong": 1,
        "wrong_without_feedback": 3,
        "mended": 3,
        "spoiled": 1,
    }


def test_a_gradient_is_compared_with_what_it_is_without_the_edge() -> None:
    """The wrong end of the radii, or norms for their squares."""
    radius = np.linspace(0.5, 0.99, 10)
    gradients = np.tile([1.0, 0.0], (10, 1))
    gradients[-1] = [0.0, 10.0]  # the image nearest to the edge pulls elsewhere
    seen = {
        "radius": radius,
        "norm": np.linalg.norm(gradients, axis=1),
        "margin": np.append(np.ones(9), -1.0),
        "gradients": gradients,
    }
    found = guarantee.summary(seen, share=0.1)
    np.testing.assert_allclose(found["share of the squared norms: edge"], 100 / 109)
    np.testing.assert_allclose(found["cosine of the mean gradient: all, rest"], 0.9 / 1.81**0.5)
    assert (found["error, %: edge"], found["error, %: rest"]) == (100.0, 0.0)


def test_every_recipe_is_a_training_of_the_same_network() -> None:
    """A recipe that changes the layers, the code or the budget."""
    preset = PRESETS["mnist"]
    kept = ("channels", "kernels", "hidden", "neuron", "feedback", "batch", "augmentation")
    for recipe in guarantee.RECIPES:
        config = guarantee.config_of(recipe, preset)
        assert all(getattr(config, name) == getattr(preset, name) for name in kept)
        assert (config == preset) == (recipe == "preset")
