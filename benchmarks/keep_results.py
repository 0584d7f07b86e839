"""Keep what is small of a finished run, suite or folder of runs, to be committed: no weights, no paths.

    python benchmarks/keep_results.py runs/corpus_10m results/corpus_10m --command "steplm train corpus_10m" \\
        --text "corpus validation=$STEPLM_DATA/corpus/validation-000.jsonl.gz" \\
        --text "WikiText-2 test=$STEPLM_DATA/wikitext-2/wiki.test.raw"
    python benchmarks/keep_results.py runs/suites/cpu results/cpu --command "steplm compare cpu"

Of a suite and of a folder of runs, the tables of evaluations are kept too, and the losses of instruction tuning.
``steplm report`` then makes the page of what was kept.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from pathlib import Path

from steplm.config import load_config
from steplm.eval.perplexity import evaluate_folder
from steplm.report.evaluations import SUFFIX, find_evaluations
from steplm.report.figure import run_figure
from steplm.report.runs import load_run
from steplm.report.suite import is_suite
from steplm.report.suite_figures import write_figures
from steplm.report.summary import read_suite
from steplm.report.tables import write_tables

KEPT = ("config.yaml", "plan.json", "metrics.jsonl", "environment.json", "summary.json", "evaluations.json")
KEPT_OF_A_SUITE = ("suite.json", "suite.yaml")
KEPT_OF_TUNING = ("config.yaml", "metrics.jsonl", "result.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--command", required=True, help="what a reader would type")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="of a run; repeatable")
    arguments = parser.parse_args()
    source, output = arguments.source, arguments.output
    if is_suite(source) or not (source / "plan.json").is_file():
        _copy(source, output, KEPT_OF_A_SUITE, arguments.command)
        for config in sorted(source.glob("**/config.yaml")):
            names = KEPT if (config.parent / "plan.json").is_file() else KEPT_OF_TUNING
            _copy(config.parent, output / config.parent.relative_to(source), names, arguments.command)
        for tables in sorted(source.glob(f"**/*{SUFFIX}")):
            figures = json.loads(tables.read_text(encoding="utf-8"))["figures"]
            (target := output / tables.parent.relative_to(source)).mkdir(parents=True, exist_ok=True)
            for name in (tables.name, *figures):
                shutil.copyfile(tables.parent / name, target / name)
        _write_report(output, arguments.command)
        return
    _copy(source, output, KEPT, arguments.command)
    record = load_run(output)
    run_figure([record], output / "loss_and_memory.png")
    perplexities = _perplexities(source, arguments.text)
    (output / "perplexity.json").write_text(json.dumps(perplexities, indent=1) + "\n")
    lines = [f"# {record.label}", "", _made_by(output / "environment.json", arguments.command), ""]
    lines += ["![loss and memory over tokens](loss_and_memory.png)", ""]
    lines += ["| text | perplexity | bits per byte | tokens |", "| --- | ---: | ---: | ---: |"]
    lines += [
        f"| {name} | {values['perplexity']:.2f} | {values['bits_per_byte']:.3f} | {values['num_tokens']:,} |"
        for name, values in perplexities.items()
    ]
    (output / "README.md").write_text("\n".join(lines) + "\n")


def _write_report(output: Path, command: str) -> None:
    """Tables and figures of a suite, or of a folder of runs, as a page."""
    suite = read_suite(output)
    evaluations = [evaluation.markdown(output) for evaluation in find_evaluations(output)]
    tables = write_tables(suite, output, evaluations)[0]
    figures = write_figures(suite, output / "figures")
    if not is_suite(output):  # a few runs: all of them in one picture
        figures["loss_and_memory"] = output / "figures" / "loss_and_memory.png"
        run_figure([load_run(plan.parent) for plan in sorted(output.glob("*/plan.json"))], figures["loss_and_memory"])
    environment = next(iter(sorted(output.glob("**/environment.json"))))
    pictures = "\n".join(f"![{name}](figures/{path.name})\n" for name, path in figures.items())
    head = f"# {suite.record.name}\n\n{_made_by(environment, command)}\n"
    body = tables.read_text(encoding="utf-8").partition("\n")[2]
    (output / "README.md").write_text(f"{head}{body}\n{pictures}", encoding="utf-8")
    tables.unlink()  # the same as the README


def _copy(source: Path, target: Path, names: tuple[str, ...], command: str) -> None:
    target.mkdir(parents=True, exist_ok=True)
    data = os.environ.get("STEPLM_DATA")
    for name in names:
        if not (source / name).is_file():
            continue
        text = (source / name).read_text(encoding="utf-8")
        if data:
            text = text.replace(data, "${STEPLM_DATA:-data}")
        if name in ("config.yaml", "suite.yaml"):  # where it was run is of no interest
            text = re.sub(r"^(\s*(?:output_dir|prepared_dir)): .*$", r"\1: null", text, flags=re.MULTILINE)
        if name == "environment.json":
            text = json.dumps(json.loads(text) | {"command": command}, indent=1) + "\n"
        if name == "plan.json":
            text = json.dumps(json.loads(text), separators=(",", ":")) + "\n"
        (target / name).write_text(text, encoding="utf-8")


def _perplexities(run_dir: Path, texts: list[str]) -> dict[str, dict[str, float]]:
    sequence_length = load_config(run_dir / "config.yaml").train.sequence_length
    perplexities = {}
    for text in texts:
        name, _, file = text.partition("=")
        result = evaluate_folder(run_dir / "export", [file], sequence_length=sequence_length)
        perplexities[name] = {
            "perplexity": result.perplexity,
            "bits_per_byte": result.bits_per_byte,
            "num_tokens": result.num_tokens,
            "sequence_length": sequence_length,
        }
    return perplexities


def _made_by(environment_file: Path, command: str) -> str:
    environment = json.loads(environment_file.read_text())
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return f"    {command}\n\n{environment['device']}, threads a run: {environment['num_threads']}; {versions}."


if __name__ == "__main__":
    main()
