"""Keep what is small of a finished run: plan, metrics, environment, figure, perplexities. Weights stay where they are.

    python benchmarks/keep_results.py runs/corpus_10m results/corpus_10m \\
        --text "corpus validation=$STEPLM_DATA/corpus/validation-000.jsonl.gz" \\
        --text "WikiText-2 test=$STEPLM_DATA/wikitext-2/wiki.test.raw"
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from steplm.config import load_config
from steplm.eval.perplexity import evaluate_folder
from steplm.report.figure import run_figure
from steplm.report.runs import load_run, render_markdown

KEPT = ("plan.json", "metrics.jsonl", "environment.json", "summary.json", "config.yaml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="repeatable")
    arguments = parser.parse_args()
    run_dir, output = arguments.run_dir, arguments.output_dir

    output.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copy(run_dir / name, output / name)
    record = load_run(run_dir)
    run_figure([record], output / "loss_and_memory.png")

    sequence_length = load_config(run_dir / "config.yaml").train.sequence_length
    perplexities = {}
    for text in arguments.text:
        name, _, file = text.partition("=")
        result = evaluate_folder(run_dir / "export", [file], sequence_length=sequence_length)
        perplexities[name] = {
            "perplexity": result.perplexity,
            "bits_per_byte": result.bits_per_byte,
            "num_tokens": result.num_tokens,
            "sequence_length": sequence_length,
        }
    (output / "perplexity.json").write_text(json.dumps(perplexities, indent=1) + "\n")

    environment = json.loads((output / "environment.json").read_text())
    lines = [f"# {record.label}", "", f"    {environment['command']}", "", _machine(environment), ""]
    lines += [render_markdown([record]), "![loss and memory over tokens](loss_and_memory.png)", ""]
    lines += ["| text | perplexity | bits per byte | tokens |", "| --- | ---: | ---: | ---: |"]
    lines += [
        f"| {name} | {values['perplexity']:.2f} | {values['bits_per_byte']:.3f} | {values['num_tokens']:,} |"
        for name, values in perplexities.items()
    ]
    (output / "README.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _machine(environment: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return f"{environment['device']}, {environment['num_threads']} threads; {versions}."


if __name__ == "__main__":
    main()
