"""``steplm quickstart``: three ways to train one model on the same tokens, compared."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from steplm.eval.generate import generate
from steplm.planner.auto import load_config
from steplm.report.figure import run_figure
from steplm.report.runs import load_run, render_rich
from steplm.training.run import train

WAYS = {
    "auto": ("8-bit Muon, what method: auto recommends", ["method=auto"]),
    "STEP": ("grown in two stages, old layers frozen under LoRA", ["method=step", "plan.num_stages=2"]),
    "vanilla": ("ordinary pre-training with AdamW", ["method=vanilla", "plan.num_stages=1"]),
}
PROMPT = "Return a list of"


def run_quickstart(output: Path, overrides: list[str]) -> int:
    console = Console(highlight=False)
    run_dirs = {label: output / label.lower() for label in WAYS}
    for label, (what, settings) in WAYS.items():
        console.rule(f"[bold]{label}[/]: {what}", align="left")
        result = train(load_config("quickstart", [*overrides, *settings, f"output_dir={run_dirs[label]}"]))
        if result.stop_signal is not None:
            return 128 + result.stop_signal

    records = [load_run(run_dir, label=label) for label, run_dir in run_dirs.items()]
    figure = output / "loss_and_memory.png"
    run_figure(records, figure)
    best = min(records, key=lambda record: record.validation_perplexity or float("inf"))
    model = run_dirs[best.label] / "export"
    text = generate(model, PROMPT, max_new_tokens=60, temperature=0.7, top_p=0.95, seed=0)

    console.rule("[bold]result", align="left")
    render_rich(records, console)
    console.print(f"\n[bold]sample[/] of the {best.label} model, which has the lowest perplexity")
    console.print(PROMPT, end="", style="bold")
    console.print(text, style="italic", markup=False)
    console.print(f"\nfigure  {figure}\nmodel   {model}  (a plain LlamaForCausalLM folder)")
    return 0
