"""``steplm quickstart``: the main job, twice at equal tokens, and what came of it."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from steplm.config import load_config
from steplm.eval.generate import generate
from steplm.report.figure import run_figure
from steplm.report.runs import load_run, render_rich
from steplm.training.run import train

METHODS = {"STEP": "plan.num_stages=2", "vanilla": "plan.num_stages=1"}
PROMPT = "Return a list of"


def run_quickstart(output: Path, overrides: list[str]) -> int:
    console = Console()
    run_dirs = {label: output / label.lower() for label in METHODS}
    for label, override in METHODS.items():
        console.rule(f"[bold]{label}", align="left")
        result = train(load_config("quickstart", [*overrides, override, f"output_dir={run_dirs[label]}"]))
        if result.stop_signal is not None:
            return 128 + result.stop_signal

    records = [load_run(run_dir, label=label) for label, run_dir in run_dirs.items()]
    figure = output / "loss_and_memory.png"
    run_figure(records, figure)
    model = run_dirs["STEP"] / "export"
    text = generate(model, PROMPT, max_new_tokens=60, temperature=0.7, top_p=0.95, seed=0)

    console.rule("[bold]result", align="left")
    render_rich(records, console)
    console.print("\n[bold]sample[/] of the STEP model")
    console.print(PROMPT, end="", style="bold")
    console.print(text, style="italic", markup=False, highlight=False)
    console.print(f"\nfigure  {figure}\nmodel   {model}  (a plain LlamaForCausalLM folder)", highlight=False)
    return 0
