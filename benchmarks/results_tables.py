"""Fill the tables of some pages in docs/, between ``<!-- SOURCE: TITLE -->`` and ``<!-- / -->``.

    python benchmarks/results_tables.py

There are four kinds of source:

- a saved suite, such as ``results/cpu``, whose title is that of one of its questions, or "Learning rates";
- ``plans``, whose title is a recipe, for which every method is planned;
- ``scales``, whose title names saved suites to compare, one per column, after an optional ``TEXT of`` that selects the
  text of the losses (default: the validation text);
- ``rates``, whose title names saved suites: the best learning rate of every tuned entry, times the hidden size.

Facts that every table on a page would repeat are left out, because the page states them once.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from steplm.compare.methods import METHODS
from steplm.config import load_config
from steplm.planner.plan import plan
from steplm.report.summary import Suite, difference, read_suite
from steplm.report.tables import all_tables, tuning_run, warnings
from steplm.units import format_bytes, format_count, percent

ROOT = Path(__file__).parents[1]
PAGES = tuple(ROOT / "docs" / name for name in ("results.md", "comparing.md", "update_rules.md"))
BLOCK = re.compile(r"<!-- (results/\w+|plans|scales|rates): (.+?) -->\n.*?<!-- / -->", re.DOTALL)

kept = cache(read_suite)


# Planned bytes equal measured ones, or the run would have failed. Times are not meaningful in most suites, which ran
# alongside other work; the pages mention them where they are.
LEFT_OUT = ("model state planned", "tok/s", "time")


def table(suite: Suite, title: str) -> str:
    """The Markdown of one table and its warnings, without the title, which is a heading on the page."""
    made = {made.title: made for made in all_tables(suite)}[title]
    kept_columns = [index for index, name in enumerate(made.columns) if name not in LEFT_OUT]
    questions = {question.title: question for question in suite.record.questions}
    caption = " ".join(warnings(suite, questions[title])) if title in questions else made.caption
    made = replace(
        made,
        columns=tuple(made.columns[index].removesuffix(" measured") for index in kept_columns),
        rows=tuple(tuple(row[index] for index in kept_columns) for row in made.rows),
        caption=caption,
    )
    return made.markdown().partition("\n\n")[2].strip()


def plans(recipe: str) -> str:
    """A table of the planned bytes of every method on the model of a recipe."""
    lines = ["| method | model state | | whole peak | |", "| --- | ---: | ---: | ---: | ---: |"]
    lean = {"memory.optimizer_states": "8bit", "memory.master_weights": False}
    methods = [
        *METHODS.values(),
        *(replace(METHODS[name], label=f"{METHODS[name].label}, 8-bit states, no master weights",
                  settings=METHODS[name].settings | lean) for name in ("vanilla", "step")),
    ]  # fmt: skip
    for method in methods:
        made = plan(load_config(recipe, [f"{key}={json.dumps(value)}" for key, value in method.settings.items()]))
        assert made.peak_bytes is not None
        assert made.vanilla_peak_bytes is not None
        state, peak = made.peak_model_state_bytes, made.peak_bytes
        saved = percent(-made.reduction) if made.reduction else ""
        saved_peak = percent(peak / made.vanilla_peak_bytes - 1) if peak != made.vanilla_peak_bytes else ""
        label = f"{method.label}, layers {'+'.join(map(str, made.layers))}" if len(made.layers) > 1 else method.label
        lines.append(f"| {label} | {format_bytes(state)} | {saved} | {format_bytes(peak)} | {saved_peak} |")
    return "\n".join(lines)


def scales(names: str) -> str:
    """A table that compares every entry of several suites with vanilla of its suite: loss and planned model state."""
    text, _, names = names.rpartition(" of ")
    suites = [kept(ROOT / "results" / name) for name in names.split()]
    labels = {name: entry.label for suite in suites for name, entry in suite.entries.items() if name != "vanilla"}
    lines = [_line(["against vanilla", *map(_scale, suites)]), _line(["---", *["---:"] * len(suites)])]
    for name, label in labels.items():
        cells = [_against_vanilla(suite, name, text) for suite in suites]
        if any(cells):
            lines.append(_line([label, *(cell or "–" for cell in cells)]))
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _scale(suite: Suite) -> str:
    """The heading of a suite's column: ``"cpu: 2.11M parameters, 0.38 tokens per parameter"``."""
    vanilla = suite.entries["vanilla"].finished[0].row
    ratio = vanilla["tokens"] / vanilla["parameters"]
    return f"{suite.record.name}: {format_count(vanilla['parameters'])} parameters, {ratio:.2g} tokens per parameter"


def _against_vanilla(suite: Suite, name: str, text: str = "") -> str | None:
    """The loss and planned bytes, as in ``"+0.135 ± 0.061, −23.7%"``; None if no seed has finished."""
    vanilla, entry = suite.entries["vanilla"], suite.entries.get(name)
    if entry is None or entry.plan is None or vanilla.plan is None:
        return None
    gap = difference(entry, vanilla, text or None)
    if gap is None:
        return None
    half = gap.estimate.half_width
    loss = f"{gap.estimate.mean:+.3f}".replace("-", "−") + (" (one seed)" if half is None else f" ± {half:.3f}")
    if text:
        return loss
    share = entry.plan.peak_model_state_bytes / vanilla.plan.peak_model_state_bytes - 1
    return f"{loss}, {percent(share)}"


def rates(names: str) -> str:
    """A table of the best learning rate times the hidden size, for every tuned entry of several suites."""
    suites = [kept(ROOT / "results" / name) for name in names.split()]
    found = [{entry.label: best_rate(suite, name) for name, entry in suite.entries.items()} for suite in suites]
    labels = dict.fromkeys(label for of_suite in found for label, best in of_suite.items() if best is not None)
    lines = [_line(["best rate × hidden size", *map(_width, suites)]), _line(["---", *["---:"] * len(suites)])]
    for label in labels:
        cells = [of_suite.get(label) for of_suite in found]
        lines.append(_line([label, *("–" if cell is None else f"{cell:.2f}" for cell in cells)]))
    return "\n".join(lines)


def _width(suite: Suite) -> str:
    plan = suite.entries["vanilla"].plan
    assert plan is not None
    return f"{suite.record.name}: {plan.shape.hidden_size}"


def best_rate(suite: Suite, name: str) -> float | None:
    """The best learning rate times the hidden size, between those of the grid; None without a lower and a higher one.

    The vertex of a parabola through the best rate and its neighbors, over the logarithm of the rate.
    """
    plan = suite.entries[name].plan
    runs = {rate: tuning_run(suite, name, rate) for rate in sorted(suite.record.grid)}
    losses = {rate: run.validation_loss for rate, run in runs.items() if run and run.validation_loss is not None}
    tried, best = list(losses), min(losses, key=losses.__getitem__, default=None)
    if best is None or best in (tried[0], tried[-1]) or plan is None:
        return None
    near = tried[tried.index(best) - 1 :][:3]
    curvature, slope, _ = np.polyfit(np.log(near), [losses[rate] for rate in near], 2)
    return float(np.exp(-slope / (2 * curvature))) * plan.shape.hidden_size


def block(source: str, title: str) -> str:
    """The text between the markers."""
    makers = {"plans": plans, "scales": scales, "rates": rates}
    return makers[source](title) if source in makers else table(kept(ROOT / source), title)


def filled(page: str) -> str:
    """The page with every table updated from the saved runs or the planner."""
    return BLOCK.sub(lambda match: f"<!-- {match[1]}: {match[2]} -->\n{block(match[1], match[2])}\n<!-- / -->", page)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
