"""Several processes of one job on this machine: what one process with as many devices does."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import kills
import numpy as np
import pytest

import ep_jax as ep
from ep_jax import processes
from ep_jax.devices import placements

ROOT = Path(__file__).resolve().parent.parent
SHORT = (
    *("--preset", "digits", "--train-images", "400", "--epochs", "3", "--devices", "2"),
    *("--neuron", "rate", "--channels", "4", "--kernels", "3", "--hidden", "8"),
    *("--phases.free", "5", "--phases.nudged", "3", "--phases.stragglers", "0"),
    *("--phases.free-more", "0", "--phases.nudged-more", "0"),
)


def start(out: Path, *words: str, count: int = 1) -> list[subprocess.Popen[str]]:
    """A training by so many processes."""
    line = [sys.executable, str(ROOT / "experiments" / "train.py"), "--out", str(out), *SHORT]
    line += words
    return [
        subprocess.Popen(
            [*line, *own], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
        )
        for own in kills.addresses(count)
    ]


def ended(jobs: list[subprocess.Popen[str]]) -> list[str]:
    said = [job.communicate(timeout=600)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0] * len(jobs), said
    return said


def close(one: Path, other: Path) -> None:
    """The same weights and records, up to the order of sums."""
    weights = [jax.tree.leaves(ep.load_weights(folder)[0]) for folder in (one, other)]
    for a, b in zip(*weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (one, other)]
    losses = [[json.loads(line)["loss"] for line in of] for of in lines]
    np.testing.assert_allclose(*losses, rtol=1e-3)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process with two devices."""
    out = tmp_path_factory.mktemp("alone") / "out"
    ended(start(out))
    return out


@pytest.mark.slow
def test_two_processes_are_one_with_two_devices(alone: Path, tmp_path: Path) -> None:
    """Two trainings of the same, side by side in one folder; or half of the data learned."""
    first, second = ended(start(tmp_path / "out", count=2))
    assert "epoch 3/3" in first
    assert "epoch" not in second  # one of them speaks
    close(alone, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_where_one_dies_all_end_and_one_can_go_on(victim: int, alone: Path, tmp_path: Path) -> None:
    """Others that wait for ever; a checkpoint that only as many can read."""
    out = tmp_path / "out"
    jobs = start(out, count=2)
    while not (out / "metrics.jsonl").exists():
        assert all(job.poll() is None for job in jobs), jobs[victim].communicate()
        time.sleep(0.05)
    jobs[victim].kill()
    codes = [job.wait(timeout=4 * processes.SILENCE) for job in jobs]
    assert all(codes), codes
    if victim == 1:
        ended(start(out, "--resume"))
        close(alone, out)


@pytest.mark.slow
def test_a_folder_that_is_held_is_refused_by_all(alone: Path) -> None:
    """One that stops, and others that train on into its folder."""
    jobs = start(alone, count=2)
    said = [job.communicate(timeout=300)[0] for job in jobs]
    assert all(job.returncode == 1 for job in jobs)
    assert "which holds a run" in said[0]
    assert "its message says why" in said[1]


@pytest.mark.parametrize(
    "given", [("localhost:1", None, None), (None, 2, None), ("localhost:1", 2, 2), (None, None, 0)]
)
def test_half_of_a_job_is_refused(given: tuple[str | None, int | None, int | None]) -> None:
    """Processes that wait for others who were never told."""
    with pytest.raises(ValueError, match="expected"):
        processes.join(*given)


def test_alone_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that is opened, or a wait for nobody."""
    for name in (*processes.STARTERS, processes.HOSTS):
        monkeypatch.delenv(name, raising=False)
    processes.join()
    assert processes.is_first()
    assert processes.largest(1.0, 2.0) == (1.0, 2.0)
    processes.after_first(None)
    with pytest.raises(OSError, match="mine"):
        processes.after_first(OSError("mine"))


@pytest.mark.parametrize(
    ("name", "value", "joins"),
    [
        ("SLURM_STEP_NUM_TASKS", "2", True),
        ("SLURM_STEP_NUM_TASKS", "1", False),
        ("OMPI_COMM_WORLD_SIZE", "4", True),
        ("TPU_WORKER_HOSTNAMES", "one,two", True),
        ("TPU_WORKER_HOSTNAMES", "one", False),
    ],
)
def test_a_clusters_environment_is_heard(
    name: str, value: str, joins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes that each train alone, into one folder; one that waits for others who are none."""
    for other in (*processes.STARTERS, processes.HOSTS):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *who, **_: joined.append(who))
    processes.join()
    assert joined == [(None, None, None)] * joins


def test_devices_are_of_all_processes_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device more on one process than on another."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="devices is 3; expected a multiple of the 2 processes"):
        placements(3)
