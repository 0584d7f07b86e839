"""The subcommands: arguments and one sentence of help each; implementations are imported when called.

Exit codes: 0 success, 1 failure, 2 wrong usage or configuration, 128 + n stopped by signal n.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from steplm.cli.loading import load_torch

app = typer.Typer(
    name="steplm",
    help="Pre-train a language model in a fraction of the memory, with the memory known before the run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Run = Annotated[str, typer.Argument(metavar="RUN.yaml", help="A YAML file, a recipe, or a Hugging Face model folder.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides, e.g. plan.num_stages=3 train.sequence_length=512."),
]
Budget = Annotated[
    str | None,
    typer.Option(help="Refuse a plan that needs more, e.g. 24GiB, and say what would fit; sets plan.budget."),
]
HostBudget = Annotated[
    str | None, typer.Option(help="Refuse a plan that needs more host memory, e.g. 64GiB; sets plan.host_budget.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Jobs = Annotated[int | None, typer.Option(min=1, help="Number of runs at a time.")]
TopP = Annotated[float, typer.Option(help="Nucleus sampling: probability mass that is kept.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


@contextmanager
def _suggesting(run: str, overrides: list[str]) -> Iterator[None]:
    """If a plan does not fit its budget, list what would fit."""
    from steplm.errors import OverBudget

    try:
        yield
    except OverBudget as error:
        from steplm.cli.fit import what_fits

        raise what_fits(error, run, overrides) from None


def _with_budgets(overrides: list[str] | None, budget: str | None, host_budget: str | None) -> list[str]:
    """The overrides, plus one for each budget that is given as an option."""
    budgets = {"plan.budget": budget, "plan.host_budget": host_budget}
    return [*(overrides or []), *(f"{key}={value}" for key, value in budgets.items() if value is not None)]


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from steplm.version import __version__

        print(__version__)
        raise typer.Exit


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("run.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented starter YAML."""
    from steplm.cli.init import write_starter

    write_starter(path, force=force)


@app.command()
def plan(
    run: Run,
    overrides: Overrides = None,
    json: Json = False,
    budget: Budget = None,
    host_budget: HostBudget = None,
    explain: Annotated[bool, typer.Option("--explain", help="Print every term with its formula.")] = False,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Count a real step's bytes on fake tensors; seconds to a minute.")
    ] = False,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Measure two real steps of the largest stage on your device; with --device here, time it again.",
        ),
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            help="Estimate the time on h200, rtx4090, …, or here: this machine, timed in less than a minute. "
            "Default for several devices: h100."
        ),
    ] = None,
    price: Annotated[float | None, typer.Option(help="Price of one device per hour, e.g. 2.5.", min=0)] = None,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Number of devices, e.g. 64; sets distributed.world_size.")
    ] = None,
    shard_size: Annotated[
        int | None, typer.Option(min=1, help="Devices that share one copy of the model; default: all.")
    ] = None,
    utilization: Annotated[
        float | None,
        typer.Option(help="With several devices: share of peak FLOP/s that each one reaches. Default: 0.4."),
    ] = None,
    bandwidth: Annotated[
        str | None,
        typer.Option(help="With several devices: bytes per second that each one sends to other nodes, e.g. 25GB."),
    ] = None,
) -> None:
    """Plan the memory of every stage, and the time with --device; needs no GPU and no data."""
    from steplm.cli.plan import show_plan

    given = _with_budgets(overrides, budget, host_budget)
    with _suggesting(run, given):
        show_plan(
            run,
            given,
            as_json=json,
            explain=explain,
            simulate=simulate,
            calibrate=calibrate,
            world_size=world_size,
            shard_size=shard_size,
            utilization=utilization,
            bandwidth=bandwidth,
            device=device,
            price=price,
        )


@app.command()
def fit(
    run: Run,
    overrides: Overrides = None,
    budget: Annotated[
        str | None, typer.Option(help="Memory of the device, e.g. 24GiB. Default: that of --device.")
    ] = None,
    host_budget: HostBudget = None,
    device: Annotated[
        str | None, typer.Option(help="Estimate the time on h200, rtx4090, …, or here (this machine), and rank by it.")
    ] = None,
    maximize: Annotated[
        str | None, typer.Option(help="depth, width, batch or sequence; default: sizes stay as written.")
    ] = None,
    vary: Annotated[str, typer.Option(help="What else may change: stages, rank, options.")] = "stages,rank,options",
    show: Annotated[
        int, typer.Option(help="Number of commands to print, spread from the gentlest way to the harshest.", min=1)
    ] = 3,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Draw memory against time, e.g. fit.png or fit.svg.")
    ] = None,
    json: Json = False,
) -> None:
    """Find ways to train within a memory budget, or the largest model, batch or sequence that fits."""
    from steplm.cli.fit import show_fit

    show_fit(
        run,
        _with_budgets(overrides, None, host_budget),
        budget=budget,
        maximize=maximize,
        vary=vary,
        show=show,
        as_json=json,
        device=device,
        output=output,
    )


@app.command()
def prepare(
    run: Run,
    overrides: Overrides = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read every shard and check its hash.")] = False,
) -> None:
    """Turn documents into token shards; restartable."""
    from steplm.cli.prepare import run_prepare

    run_prepare(run, overrides or [], verify_hashes=verify)


@app.command()
def train(
    run: Run,
    overrides: Overrides = None,
    budget: Budget = None,
    host_budget: HostBudget = None,
    extend: Annotated[
        Path | None,
        typer.Option(
            help="Continue from this run's last checkpoint before its decay; needs more tokens and a new name."
        ),
    ] = None,
) -> None:
    """Train every stage and export the merged model; run again to resume."""
    given = _with_budgets(overrides, budget, host_budget)
    with _suggesting(run, given):
        from steplm.cli.train import run_train

        raise typer.Exit(run_train(run, given, extend))


@app.command()
def decay(
    checkpoint: Annotated[Path, typer.Argument(help="RUN_DIR/checkpoints/NAME, from before the run's decay.")],
    tokens: Annotated[str, typer.Option(help="Tokens over which the learning rate decays, e.g. 2B.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="New run directory; default: beside RUN_DIR, named after both."),
    ] = None,
) -> None:
    """Decay the learning rate from a checkpoint to get a finished model; run again to resume."""
    from steplm.cli.train import run_decay

    raise typer.Exit(run_decay(checkpoint, tokens, output))


@app.command()
def grow(
    model: Annotated[str, typer.Argument(help="Hugging Face folder or hub name of a decoder-only model.")],
    to: Annotated[int, typer.Option(help="Layers after growth, e.g. 36.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder.")],
    operator: Annotated[
        str, typer.Option(help="interpolation, interpolation_mean, stack, identity or random.")
    ] = "interpolation_mean",
    position: Annotated[
        str | None, typer.Option(help="upper (default), intermediate, lower, random or even; stack goes on top.")
    ] = None,
    seed: Annotated[int, typer.Option(help="For the random position and operator.")] = 0,
) -> None:
    """Make a deeper model from any Hugging Face decoder."""
    load_torch()
    from steplm.cli.grow import run_grow

    run_grow(model, to=to, output=output, operator=operator, position=position, seed=seed)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="Run directory, or one of its checkpoints.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="New folder; default RUN_DIR/export.")] = None,
) -> None:
    """Merge the adapters of a checkpoint into a plain Hugging Face folder."""
    load_torch()
    from steplm.training.export import export as export_folder

    print(export_folder(source, output))


@app.command("eval")
def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Hugging Face folders or hub names.")],
    tasks: Annotated[
        list[str] | None, typer.Option("--tasks", "-t", help="Tasks of lm_eval, e.g. lambada_openai,piqa; repeatable.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            "-d",
            "--perplexity",
            help="Texts: files, globs, hub://OWNER/NAME?split=test; NAME=FILES for a separate row; repeatable.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Use only the first items of each task, this many; default: all.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Solved examples before each item; default: the task's own number.")
    ] = None,
    tasks_data: Annotated[
        Path | None,
        typer.Option(
            envvar="STEPLM_TASKS_DATA", help="Folder with local copies of data sets, used instead of the hub."
        ),
    ] = None,
    tasks_path: Annotated[
        list[Path] | None,
        typer.Option(
            envvar="STEPLM_TASKS_PATH",
            help="Folder of your own lm_eval task files; runs the Python functions that they name; repeatable.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of tables, figure and item scores; existing scores are reused."),
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field of a record that holds the text.")] = "text",
    sequence_length: Annotated[
        int | None,
        typer.Option(help="Tokens per window; default: as in training if recorded, else the context, at most 1024."),
    ] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens scored per window (sliding window); default: all.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows, or requests of a task, per forward pass.")] = 8,
    max_tokens: Annotated[
        str | None,
        typer.Option(
            help="Stop a text after this many tokens of the first model, e.g. 1M; default: all; hub data: 10M."
        ),
    ] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Zero-shot tasks of lm_eval, perplexity and bits per byte; several models share one table."""
    from steplm.cli.evaluate import run_eval

    run_eval(
        models,
        data or [],
        tasks or [],
        limit=limit,
        num_fewshot=num_fewshot,
        tasks_data=tasks_data,
        tasks_path=tasks_path or [],
        output=output,
        text_field=text_field,
        sequence_length=sequence_length,
        stride=stride,
        batch_size=batch_size,
        max_tokens=max_tokens,
        device=device,
        json_output=json,
    )


@app.command()
def mtbench(
    judge_model: Annotated[str, typer.Option(help="The judge's name at its endpoint, e.g. gpt-4.")],
    data: Annotated[
        Path, typer.Option("--data", "-d", help="Folder in FastChat's layout: question.jsonl, reference_answer/, …")
    ],
    models: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL", help="Hugging Face folders or hub names of chat models.")
    ] = None,
    questions: Annotated[
        str | None,
        typer.Option(help="Read the questions from a file or hub://OWNER/NAME instead of --data."),
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible endpoint, such as http://HOST:8000/v1; default: OpenAI's.")
    ] = None,
    mode: Annotated[
        str, typer.Option(help="single (each answer 1 to 10), pairwise (every two models) or both.")
    ] = "single",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of answers, replies and tables.")] = Path(
        "runs/mt_bench"
    ),
    name: Annotated[
        list[str] | None,
        typer.Option(help="Name of a model in tables and files, once per model; default: the end of its path."),
    ] = None,
    answers: Annotated[
        list[Path] | None, typer.Option(help="Existing answers in FastChat's format; repeatable.")
    ] = None,
    categories: Annotated[
        str | None, typer.Option(help="Categories of questions, e.g. writing,math; default: all.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each category; default: all.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens per answer.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at once.")] = 8,
    seed: Annotated[int, typer.Option(help="The same seed gives the same answers.")] = 0,
    chat_template: Annotated[Path | None, typer.Option(help="Jinja file for models without a chat template.")] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable that holds the judge's key; default: OPENAI_API_KEY.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Concurrent requests.")] = 4,
    requests_per_minute: Annotated[
        float | None, typer.Option(help="Maximum requests per minute; default: no limit.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for a reply.")] = 120.0,
    retries: Annotated[int, typer.Option(min=0, help="Retries of a failed request.")] = 6,
    backoff: Annotated[float, typer.Option(help="Seconds before the first retry; doubled each time.")] = 1.0,
    ask_again: Annotated[int, typer.Option(min=0, help="Times to ask again if a reply cannot be read.")] = 2,
    max_judge_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum tokens of a judge's reply, including its reasoning.")
    ] = 2048,
    rating: Annotated[
        str,
        typer.Option(help="Which rating in a reply counts: the first (as in FastChat), or the last outside <think>."),
    ] = "first",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the number of requests and tokens; send nothing.")
    ] = False,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """MT-Bench: answers to two-turn questions, judged by a language model; run again to resume."""
    given = dict(locals())
    from steplm.cli.mtbench import run_mtbench
    from steplm.compare.suite import MtBenchConfig
    from steplm.problems import validated

    options = {name: given[name] for name in MtBenchConfig.model_fields} | {
        "data": str(data),
        "categories": [part.strip() for part in (categories or "").split(",") if part.strip()],
        "chat_template": None if chat_template is None else str(chat_template),
    }
    raise typer.Exit(
        run_mtbench(
            models or [],
            validated(MtBenchConfig, options, "the options"),
            output=output,
            names=name or [],
            answers=answers or [],
            device=device,
            dry_run=dry_run,
            json_output=json,
        )
    )


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Hugging Face folder or hub name.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 100,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token.")] = 0.8,
    top_p: TopP = 0.95,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    device: Device = "auto",
) -> None:
    """Continue a prompt."""
    from steplm.cli.model_paths import find_model

    found = find_model(model)
    load_torch()
    from steplm.eval.generate import generate as continued

    text = continued(
        found, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, device=device
    )
    print(prompt + text)


@app.command()
def sft(
    model: Annotated[str, typer.Argument(help="Hugging Face folder or hub name of a decoder-only model.")],
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            "-d",
            help="json, jsonl, parquet: Alpaca's columns, chats, ShareGPT's, or prompt and completion; repeatable.",
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="E.g. lora_rank=8 num_train_epochs=1 packing=true.")
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML file with the same keys.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the run; default runs/NAME-sft.")
    ] = None,
) -> None:
    """Fine-tune a model on instructions, for `steplm chat`; run again to resume."""
    from steplm.cli.model_paths import find_model, require_hub
    from steplm.sft.config import load_sft_config

    checked = load_sft_config(config, overrides or [])
    found = find_model(model)
    if any(entry.startswith("hub://") for entry in data):
        require_hub()
    load_torch()
    from steplm.sft.run import instruction_tune

    result = instruction_tune(found, data, checked, output_dir=output, say=lambda line: print(line, flush=True))
    raise typer.Exit(0 if result.stop_signal is None else 128 + result.stop_signal)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="Hugging Face folder or hub name of a model with a chat template.")],
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="A Jinja file, instead of the model's own template.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum tokens per answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token.")] = 0.7,
    top_p: TopP = 0.95,
    seed: Annotated[int, typer.Option(help="The same seed and messages give the same answers.")] = 0,
    device: Device = "auto",
) -> None:
    """Chat with a model; also reads lines from a pipe."""
    from steplm.cli.chat import run_chat

    run_chat(
        model,
        system=system,
        chat_template=chat_template,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        device=device,
    )


@app.command()
def quickstart(
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the runs.")] = Path("runs/quickstart"),
) -> None:
    """Train a small LLaMA on text found in this installation: with 8-bit Muon, with STEP, and with AdamW."""
    load_torch()
    from steplm.cli.quickstart import run_quickstart

    raise typer.Exit(run_quickstart(output, overrides or []))


@app.command()
def compare(
    suite: Annotated[str, typer.Argument(metavar="SUITE.yaml", help="A YAML file, or the name of a shipped suite.")],
    overrides: Overrides = None,
    jobs: Jobs = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the runs and their cost; train nothing.")] = False,
    report: Annotated[bool, typer.Option(help="Make the report at the end.")] = True,
) -> None:
    """Run methods, seeds and learning rates side by side, matched and tuned; run again to resume."""
    from steplm.cli.compare import run_compare

    raise typer.Exit(run_compare(suite, overrides or [], jobs=jobs, dry_run=dry_run, report=report))


@app.command()
def tune(
    run: Run,
    overrides: Overrides = None,
    share: Annotated[
        float | None, typer.Option(help="Share of the run's tokens in each trial. Default: 0.1.", min=0.001, max=1)
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="Limit all trials together to about this many minutes, instead of --share.", min=0.1),
    ] = None,
    jobs: Jobs = None,
) -> None:
    """Find a learning rate with short runs at several rates; run again to resume."""
    from steplm.cli.tune import run_tune

    raise typer.Exit(run_tune(run, overrides or [], share=share, minutes=minutes, jobs=jobs))


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A suite, a run, or a folder of runs.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder; default DIR/report.")] = None,
) -> None:
    """Make tables, figures and an HTML page from a suite or runs, finished or not."""
    from steplm.cli.report import show_report

    show_report(directory, output)


@app.command()
def schema() -> None:
    """Print the JSON schema of RUN.yaml, for editors."""
    import json as jsonlib

    from steplm.config import config_schema

    print(jsonlib.dumps(config_schema(), indent=1))


def _print_error(text: str) -> None:
    """Print to stderr; on a terminal, break lines between words, and indent what follows a break as its line."""
    if sys.stderr.isatty():
        import shutil

        from steplm.units import wrapped

        width = shutil.get_terminal_size().columns
        lines = [wrapped(line, width, len(line) - len(line.lstrip())) or [""] for line in text.split("\n")]
        text = "\n".join(part for parts in lines for part in parts)
    print(text, file=sys.stderr)


def main() -> None:
    """Entry point that turns errors of this package into one message and an exit code, without a traceback."""
    from steplm.cli.ranks import failure_told_to_launcher, who
    from steplm.errors import SteplmError
    from steplm.files import refusal

    # Set before tokenizers is imported: it warns, and can hang, if a process forks after it has used threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with failure_told_to_launcher():
            app()
    except SteplmError as error:
        _print_error(f"{who()}{type(error).__name__}: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        what = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        _print_error(f"{who()}error: {what}")
        sys.exit(1)
    except Exception as error:  # safetensors, tokenizers and torch raise their own errors when a write fails
        if (why := refusal(error)) is None:
            raise
        _print_error(f"{who()}error: a file cannot be written: {why}")
        sys.exit(1)
