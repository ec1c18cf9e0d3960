"""A run as one page of HTML: figures, tables and settings in a file that needs no network.

`figures_of` draws, `page` writes. Of a run that is on disk, `report` does both.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ep_jax import plots, training
from ep_jax.checkpoint import load_weights
from ep_jax.data import DATASETS, Dataset, load, to_float
from ep_jax.evaluation import held_out
from ep_jax.extras import extra
from ep_jax.files import own_path, write_atomically
from ep_jax.hardware import Cost
from ep_jax.network import NetworkSpec, Params
from ep_jax.phases import Phases
from ep_jax.tables import spaced

with extra("plot"):
    import matplotlib as mpl
    from matplotlib.figure import Figure

RECORDED = 64
"""Images whose free phases are recorded."""
LOOKED_AT = 5000
"""Most images of which the answers are shown."""

CAPTIONS = {
    "learning_curve": "Loss and residual, training and validation error, spikes.",
    "layers": "What each layer did. Below the grey line a free phase counts as settled.",
    "raster": "One free phase of a validation image: spikes up (blue) and down (red) of some units "
    "of each layer.",
    "relaxation": f"The free phase, mean of {RECORDED} validation images: energy and change of the "
    "state, sweep by sweep.",
    "filters": "Kernels of the first layer.",
    "confusion": "Answers to validation images; the colour is the share of the label, on a "
    "square-root scale.",
    "wrong": "Validation images with a wrong answer: label, answer.",
}
"""The figures of a page, in their order, and what is said below them."""


def figures_of(
    params: Params,
    spec: NetworkSpec,
    phases: Phases,
    history: Sequence[Mapping[str, Any]],
    data: Dataset | None,
    key: jax.Array | None = None,
) -> dict[str, Figure]:
    """The figures of a run by name. Test images are not looked at.

    Args:
        params: the trained parameters.
        spec: the network.
        phases: its phases.
        history: the records of ``metrics.jsonl``.
        data: what was learned; without it some figures are missing.
        key: random key of stochastic neurons.
    """
    figures: dict[str, Figure | None] = {
        "learning_curve": plots.learning_curve(history),
        "layers": plots.layers(history),
        "filters": plots.filters(params),
    }
    if data is not None:
        key = jax.random.key(0) if key is None else key
        images, labels = held_out(data, LOOKED_AT)
        some = images[:RECORDED]
        seen = plots.record_free_phase(params, spec, phases, jnp.asarray(to_float(some)), key)
        answers, _ = training.predict(params, spec, phases, images, key)
        figures |= {
            "relaxation": plots.relaxation(seen),
            "raster": plots.raster(seen.spikes, some[0]),
            "confusion": plots.confusion(answers, labels, data.classes),
            "wrong": plots.wrong(images, answers, labels),
        }
    return {name: figure for name in CAPTIONS if (figure := figures.get(name)) is not None}


def report(
    folder: str | os.PathLike[str],
    *,
    data: Dataset | None = None,
    data_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Write ``report.html`` into the folder of a finished run.

    Args:
        folder: the folder.
        data: what was learned, where it is none of `ep_jax.data.DATASETS`; without it figures of
            images are missing.
        data_dir: where the data lie, see `ep_jax.data.load`.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: the folder holds no finished run.
        ValueError: one of its files is unreadable.
    """
    folder = own_path("folder", folder)
    for name in ("result.json", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"folder is {str(folder)!r}, which holds no {name}; expected "
                                    "the folder of a finished run")  # fmt: skip
    result = json.loads((folder / "result.json").read_text())
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    history = [json.loads(line) for line in lines]
    params, spec, phases = load_weights(folder)
    config = result["config"]
    if data is None and config["dataset"] == result.get("dataset", config["dataset"]) in DATASETS:
        data = load(config["dataset"], validation=config["validation"], data_dir=data_dir)
    if data is None:
        warnings.warn(f"the run learned data of its own ({result.get('dataset')!r}), so the page "
                      "has no figures of images; ep_jax.report.report(folder, data=...) draws them",
                      stacklevel=2)  # fmt: skip
    figures = figures_of(params, spec, phases, history, data)
    return write(folder, result, history, figures)


def write(
    folder: Path,
    result: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    figures: Mapping[str, Figure],
) -> Path:
    """Write the `page` of a run into its `folder`, from its `result`, `history` and `figures`."""
    path = folder / "report.html"
    write_atomically(path, page(folder.resolve().name, result, history, figures).encode())
    return path


def page(
    name: str,
    result: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    figures: Mapping[str, Figure],
) -> str:
    """A run as a page of HTML that refers to no other file.

    Args:
        name: what the run is called.
        result: what ``result.json`` holds; parts that older versions did not write may be missing.
        history: the records of ``metrics.jsonl``.
        figures: as from `figures_of`; some may be missing.

    Example:
        >>> text = page("a run", {"test_error": 1.5, "config": {"dataset": "digits"}}, [], {})
        >>> "1.50 %" in text, "http" in text
        (True, False)
    """
    parts = [_summary(result, history), _warnings(history)]
    for title, names in (
        ("Training", ("learning_curve", "layers")),
        ("Inside the network", ("raster", "relaxation", "filters")),
        ("Answers", ("confusion", "wrong")),
    ):
        shown = "".join(_picture(n, figures[n]) for n in names if n in figures)
        parts.append(_section(title, shown))
    parts += [_recurrence(result), _hardware(result), _config(result), _made_by(result)]
    body = "".join(parts)
    title = html.escape(name)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{title}</title>\n<style>{_STYLE}</style>\n'
        f"</head>\n<body>\n<main>\n<h1>{title}</h1>\n{body}</main>\n</body>\n</html>\n"
    )


_STYLE = """
:root { color-scheme: light; }
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; color: #1c2733; background: #f4f6f8; }
main { max-width: 68rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; margin: .5rem 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .75rem; }
section { background: #fff; border: 1px solid #dde3e9; border-radius: .6rem; padding: 1rem;
  margin: 0 0 1rem; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 1rem; }
.numbers b { display: block; font-size: 1.5rem; line-height: 1.2; }
.numbers span, figcaption, .note { color: #566472; font-size: .9rem; }
figure { margin: 0 0 1.25rem; }
.wide { overflow-x: auto; }
.wide img { display: block; min-width: 38rem; width: 100%; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #e6ebf0;
  vertical-align: top; }
td.number, th.number { text-align: right; }
pre { margin: 0; overflow-x: auto; font-size: .85rem; }
.warning { border-left: .3rem solid #d98200; }
summary { cursor: pointer; }
"""
_WIDE = ("learning_curve", "layers", "raster", "relaxation")


def _section(title: str, body: str, kind: str = "") -> str:
    """A part of the page; nothing where there is nothing in it."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<section{attribute}>\n<h2>{title}</h2>\n{body}</section>\n" if body else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""

    def line(cells: Sequence[str], tag: str) -> str:
        marked = (
            f"<{tag}{' class=number' if i else ''}>{html.escape(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )
        return f"<tr>{''.join(marked)}</tr>\n"

    body = "".join(line(row, "td") for row in rows)
    top = line(head, "th") if any(head) else ""
    return f'<div class="wide"><table>\n{top}{body}</table></div>\n'


def _picture(name: str, figure: Figure) -> str:
    """A figure as an image that is part of the page."""
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": name}):  # the same page for the same run
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    caption = html.escape(CAPTIONS[name])
    kind = "wide" if name in _WIDE else "plain"
    return (
        f'<figure>\n<div class="{kind}"><img alt="{caption}" '
        f'src="data:image/svg+xml;base64,{data}"></div>\n'
        f"<figcaption>{caption}</figcaption>\n</figure>\n"
    )


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} %"


def _summary(result: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> str:
    """The numbers that one looks at first."""
    heard = result.get("recurrence", {})
    epochs = str(len(history)) + (" (stopped early)" if result.get("stopped_early") else "")
    numbers = {
        "test error": _percent(result.get("test_error")),
        "at four times the sweeps": _percent(result.get("test_error_4x")),
        "validation error, lowest": _percent(_lowest(result.get("val_error", ()))),
        "largest spectral radius": f"{heard['radius_largest']:.2f}" if heard else "–",
        "epochs": epochs,
        "weights are of epoch": str(result.get("weights_of_epoch", len(history))),
    }
    cells = "".join(f"<div><b>{v}</b><span>{name}</span></div>\n" for name, v in numbers.items())
    return f'<section><div class="numbers">\n{cells}</div></section>\n'


def _lowest(errors: Iterable[float | None]) -> float | None:
    return min((error for error in errors if error is not None), default=None)


def _warnings(history: Sequence[Mapping[str, Any]]) -> str:
    """What the last epoch was warned of."""
    said = history[-1].get("warnings", {}).values() if history else ()
    lines = "".join(f"<p>{html.escape(line)}.</p>\n" for line in said)
    return _section("Warnings of the last epoch", lines, "warning")


def _recurrence(result: Mapping[str, Any]) -> str:
    """What feedback does."""
    if "recurrence" not in result:
        return ""
    heard = result["recurrence"]
    share = spaced(heard["share"])
    rows = [
        ("feedback strength", f"{heard['feedback']:g}"),
        ("share of each layer's state that feedback makes", share),
        ("error at the fixed point", _percent(heard["error"])),
        ("error with the feedback cut", _percent(heard["error_cut"])),
        ("error with its mean over the images", _percent(heard["error_mean"])),
        ("error with another image's feedback", _percent(heard["error_other"])),
        ("spectral radius, mean", f"{heard['radius_mean']:.3f}"),
        ("spectral radius, largest", f"{heard['radius_largest']:.3f}"),
        ("images whose state depends on the start", _percent(100 * heard["ambiguous"])),
    ]
    note = f'<p class="note">Rate network, {heard["images"]} validation images.</p>\n'
    return _section("What feedback does", _table(("", ""), rows) + note)


_COSTS = {
    "inference": "inference",
    "ep": "learning by EP",
    "bptt": "learning by BPTT",
    "backprop": "learning by feed-forward backprop",
}


def _hardware(result: Mapping[str, Any]) -> str:
    """What an example costs."""
    costs = result.get("hardware", {})
    if not costs:
        return ""
    head = ("of an example", "MACs", "ACs", "spikes", "words moved", "words held", "µJ")
    rows = []
    for name, title in _COSTS.items():
        if (cost := costs.get(name)) is not None:
            found = Cost(**cost)
            counts = (found.macs, found.acs, found.spikes, found.moved, found.held)
            energy = f"{1e6 * found.joules:.3g}"
            rows.append((title, *(f"{count:,.0f}" for count in counts), energy))
    note = (
        '<p class="note">Counted, not measured: 32-bit arithmetic in 45 nm, memories of 32 KB. '
        "The assumptions are those of ep_jax.diagnostics.hardware_cost.</p>\n"
    )
    return _section("Cost on hardware", _table(head, rows) + note)


def _config(result: Mapping[str, Any]) -> str:
    """All settings, folded."""
    text = html.escape(json.dumps(result.get("config", {}), indent=2))
    return f"<section><details><summary>All settings</summary><pre>{text}</pre></details></section>"


def _made_by(result: Mapping[str, Any]) -> str:
    """What made the run."""
    if "versions" not in result:
        return ""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    text = f"{result['device']}; commit {result['commit']}; {versions}"
    return f'\n<p class="note">{html.escape(text)}</p>\n'
