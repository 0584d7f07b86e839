"""Copy the small files of a finished run, suite or folder of runs for committing, without weights and local paths.

    python benchmarks/keep_results.py runs/corpus_10m results/corpus_10m --command "steplm train corpus_10m" \\
        --figures loss_and_memory --text "corpus validation=$STEPLM_DATA/corpus/validation-000.jsonl.gz" \\
        --text "WikiText-2 test=$STEPLM_DATA/wikitext-2/wiki.test.raw"
    python benchmarks/keep_results.py runs/suites/cpu results/cpu --command "steplm compare cpu"

The files that ``steplm report`` and ``steplm compare`` read go into ``runs.tar.xz``; evaluation tables go next to it.
The README contains the tables and the requested figures. If SOURCE already is such a copy, its README is rewritten.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from steplm.config import load_config
from steplm.report.archive import ARCHIVE, pack, unpacked
from steplm.report.evaluations import SUFFIX, find_evaluations
from steplm.report.figure import run_figure
from steplm.report.suite_figures import write_figures
from steplm.report.summary import read_suite
from steplm.report.tables import write_tables

KEPT = ("config.yaml", "plan.json", "metrics.jsonl", "environment.json", "summary.json", "evaluations.json")
KEPT_OF_A_SUITE = ("suite.json", "suite.yaml")
KEPT_OF_TUNING = ("config.yaml", "metrics.jsonl", "result.json")
NUM_COLORS = 64  # in the saved figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--command", required=True, help="what a reader would type")
    parser.add_argument("--figures", nargs="*", default=["q1_loss_tokens"], help="of the report, or loss_and_memory")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="of a run; repeatable")
    arguments = parser.parse_args()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    with unpacked(arguments.source) as source, TemporaryDirectory() as temporary:
        _copy(source, Path(temporary), KEPT_OF_A_SUITE, arguments.command)
        for config in sorted(source.glob("**/config.yaml")):
            names = KEPT if (config.parent / "plan.json").is_file() else KEPT_OF_TUNING
            _copy(config.parent, Path(temporary) / config.parent.relative_to(source), names, arguments.command)
        for tables in sorted(source.glob(f"**/*{SUFFIX}")):
            figures = json.loads(tables.read_text(encoding="utf-8"))["figures"]
            (target := output / tables.parent.relative_to(source)).mkdir(parents=True, exist_ok=True)
            for name in (tables.name, *figures):
                shutil.copyfile(tables.parent / name, target / name)
        pack(Path(temporary), output / ARCHIVE)
        if arguments.text:
            perplexities = _perplexities(source, arguments.text)
            (output / "perplexity.json").write_text(json.dumps(perplexities, indent=1) + "\n")
    _write_readme(output, arguments.command, arguments.figures)


def _write_readme(output: Path, command: str, kept_figures: Sequence[str]) -> None:
    """Write the tables of the runs, the requested figures, and the command that makes the others."""
    suite = read_suite(output)
    evaluations = [evaluation.markdown(output) for evaluation in find_evaluations(output)]
    shutil.rmtree(output / "figures", ignore_errors=True)
    with TemporaryDirectory() as temporary:
        tables = write_tables(suite, Path(temporary), evaluations)[0].read_text(encoding="utf-8").partition("\n")[2]
        figures = write_figures(suite, Path(temporary))
        figures["loss_and_memory"] = Path(temporary) / "loss_and_memory.png"
        if "loss_and_memory" in kept_figures:
            run_figure([run.record for run in suite.runs if run.record is not None], figures["loss_and_memory"])
        for name in kept_figures:
            (output / "figures").mkdir(exist_ok=True)
            with Image.open(figures[name]) as image:
                image.convert("RGB").quantize(NUM_COLORS).save(output / f"figures/{name}.png", optimize=True)
    with unpacked(output) as folder:
        made_by = _made_by(next(iter(sorted(folder.glob("**/environment.json")))), command)
        is_resumable = (folder / "suite.yaml").is_file()
    lines = [
        f"# {suite.record.name}",
        "",
        made_by,
        "",
        f"The output of the runs is in `{ARCHIVE}`. To make all tables and figures from it:",
        "",
    ]
    lines += [f"    steplm report {output.as_posix()}", ""]
    if is_resumable:
        there = f"runs/suites/{suite.record.name}"
        lines += ["To resume the suite:", ""]
        lines += [f"    mkdir -p {there} && tar xJf {output.as_posix()}/{ARCHIVE} -C {there}", f"    {command}", ""]
    if (output / "findings.md").is_file():
        lines += ["What the runs show: [findings.md](findings.md).", ""]
    lines += [tables.strip(), "", *_perplexity_table(output / "perplexity.json")]
    lines += [line for name in kept_figures for line in (f"![{name}](figures/{name}.png)", "")]
    (output / "README.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _perplexity_table(path: Path) -> list[str]:
    if not path.is_file():
        return []
    rows = [
        f"| {name} | {values['perplexity']:.2f} | {values['bits_per_byte']:.3f} | {values['num_tokens']:,} |"
        for name, values in json.loads(path.read_text(encoding="utf-8")).items()
    ]
    return ["| text | perplexity | bits per byte | tokens |", "| --- | ---: | ---: | ---: |", *rows, ""]


def _copy(source: Path, target: Path, names: tuple[str, ...], command: str) -> None:
    target.mkdir(parents=True, exist_ok=True)
    data = os.environ.get("STEPLM_DATA")
    for name in names:
        if not (source / name).is_file():
            continue
        text = (source / name).read_text(encoding="utf-8")
        if data:
            text = text.replace(data, "${STEPLM_DATA:-data}")
        if name in ("config.yaml", "suite.yaml"):  # drop local paths
            text = re.sub(r"^(\s*(?:output_dir|prepared_dir)): .*$", r"\1: null", text, flags=re.MULTILINE)
        if name == "environment.json":
            text = json.dumps(json.loads(text) | {"command": command}, indent=1) + "\n"
        if name == "plan.json":
            text = json.dumps(json.loads(text), separators=(",", ":")) + "\n"
        (target / name).write_text(text, encoding="utf-8")


def _perplexities(run_dir: Path, texts: list[str]) -> dict[str, dict[str, float]]:
    from steplm.eval.perplexity import evaluate_folder  # imports torch

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
    return f"    {command}\n\n{environment['device']}, threads per run: {environment['num_threads']}; {versions}."


if __name__ == "__main__":
    main()
