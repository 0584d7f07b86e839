"""``steplm mtbench``."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import Progress

from steplm.cli.model_paths import find_model, require_hub
from steplm.cli.tables import print_table
from steplm.compare.suite import MtBenchConfig
from steplm.errors import ConfigError
from steplm.mt_bench.client import Endpoint, JudgeClient
from steplm.mt_bench.run import Benchmark, Cost, Outcome, cost, generate_answers, judge_answers, prepare
from steplm.units import format_count

OPENAI_URL = "https://api.openai.com/v1"
DEFAULT_KEY_VARIABLE = "OPENAI_API_KEY"


def run_mtbench(
    models: Sequence[str],
    options: MtBenchConfig,
    *,
    output: Path,
    names: Sequence[str] = (),
    answers: Sequence[Path] = (),
    device: str = "auto",
    dry_run: bool = False,
    check_only: bool = False,
    json_output: bool = False,
) -> int:
    """Generate answers, judge them and print the tables; return the exit code, 1 if judgments are missing.

    Args:
        dry_run: only print the expected cost.
        check_only: also raise errors that can be found while the models need not exist yet.
    """
    if not check_only:  # otherwise the models need not exist yet
        models = [find_model(model) for model in models]
    if options.questions is not None and options.questions.startswith("hub://"):
        require_hub()
    benchmark = prepare(
        models,
        data=Path(options.data),
        output=output,
        questions=options.questions,
        mode=options.mode,
        names=names,
        answer_files=answers,
        categories=options.categories,
        limit=options.limit,
        max_judge_tokens=options.max_judge_tokens,
        rating=options.rating,
    )
    expected = cost(benchmark, options.judge_model, max_new_tokens=options.max_new_tokens, ask_again=options.ask_again)
    endpoint = _endpoint(options)
    _say(_announcement(benchmark, endpoint, expected))
    if dry_run:
        return 0
    client = None
    if expected.num_requests:
        _require_key(endpoint, options)
        client = JudgeClient(endpoint, _say)
    chat_template = None if options.chat_template is None else Path(options.chat_template)
    if check_only:
        if chat_template is not None:
            from steplm.eval.chat import read_chat_template

            read_chat_template(chat_template)
        return 0
    if client is not None:
        client.check()  # fail before hours of generation
    if models:
        from steplm.mt_bench.answers import AnswerSettings

        made = generate_answers(
            benchmark,
            settings=AnswerSettings(options.max_new_tokens, options.seed),
            batch_size=options.batch_size,
            device=device,
            chat_template=chat_template,
            progress=_progress,
        )
        _say_limits(benchmark, options.max_new_tokens)
    else:
        made = benchmark.saved_answers()
    outcome = judge_answers(
        benchmark,
        made,
        options.judge_model,
        lambda: client or JudgeClient(endpoint, _say),
        ask_again=options.ask_again,
        progress=_progress,
    )
    _show(outcome, json_output)
    if outcome.num_thinking and options.rating == "first":
        _say(
            f"note: {outcome.num_thinking:,} replies think aloud (<think>), and the first rating in each counts, as in "
            "FastChat, even inside <think>. --rating last counts the last one outside of <think>."
        )
    return 1 if outcome.failures else 0


def _endpoint(options: MtBenchConfig) -> Endpoint:
    key_variable = options.api_key_env or DEFAULT_KEY_VARIABLE
    return Endpoint(
        options.judge_model,
        options.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL,
        os.environ.get(key_variable, "").strip() or None,
        key_variable,
        timeout_seconds=options.timeout,
        retries=options.retries,
        backoff_seconds=options.backoff,
        concurrency=options.concurrency,
        requests_per_minute=options.requests_per_minute,
    )


def _require_key(endpoint: Endpoint, options: MtBenchConfig) -> None:
    """Check that there is a key if OpenAI is the judge or a variable is named; a local server may need none."""
    is_openai = urlsplit(endpoint.base_url).netloc == urlsplit(OPENAI_URL).netloc
    if endpoint.api_key is None and (options.api_key_env is not None or is_openai):
        raise ConfigError(
            f"no key for the judge at {endpoint.shown_url}: the environment variable {endpoint.api_key_env} is not "
            "set. Export it, name another with --api-key-env, or name a local server with --base-url."
        )


def _announcement(benchmark: Benchmark, endpoint: Endpoint, expected: Cost) -> str:
    names = benchmark.names
    lines = [f"{_of(len(names), 'model')}, {_of(benchmark.num_questions, 'question')}: {', '.join(names)}"]
    if benchmark.bench.num_own_references:
        lines.append(
            f"note: {benchmark.bench.num_own_references:,} questions are judged against the references of their own "
            "set, not against published ones of GPT-4: scores differ from published ones"
        )
    if expected.num_answers:
        lines.append(f"{_of(expected.num_answers, 'answer')} to generate")
    if_long = " (if every answer is as long as it may be)" if expected.num_answers else ""
    asked_before = f" ({expected.num_saved:,} have their reply)" if expected.num_saved else ""
    lines.append(
        f"{_of(expected.num_requests, 'request')} to {endpoint.model} at {endpoint.shown_url}{asked_before}: about "
        f"{format_count(expected.prompt_tokens)} tokens sent{if_long}, {format_count(expected.reply_tokens)} received"
    )
    return "\n".join(lines)


def _say_limits(benchmark: Benchmark, max_new_tokens: int) -> None:
    for name, limits in benchmark.limits().items():
        if limits["num_unended"]:
            _say(
                f"note: {limits['num_unended']:,} of {_of(limits['num_turns'], 'turn')} of {name} ended at a limit "
                f"({max_new_tokens:,} new tokens, or the model's context), not by themselves"
            )
        if num_cut := limits["num_cut_prompts"]:
            _say(f"note: {_of(num_cut, 'prompt')} of {name} cut at the beginning to fit the model's context")


def _show(outcome: Outcome, json_output: bool) -> None:
    if json_output:
        print(json.dumps([score.row for score in outcome.scores.scores], indent=1))
    else:
        console = Console(highlight=False)
        for table in outcome.tables:
            print_table(console, table, titled=True)
            console.print()
        for file in outcome.files:
            console.print(str(file), style="dim", soft_wrap=True)
    if outcome.num_asked:
        tokens = (
            f"{outcome.prompt_tokens:,} tokens sent, {outcome.completion_tokens:,} received"
            if outcome.prompt_tokens
            else "the server does not report tokens"
        )
        _say(f"replies: {outcome.num_asked:,}; {tokens}")
    for reason, count in Counter(failure.reason for failure in outcome.failures).items():
        _say(f"{_of(count, 'request')} got no reply: {reason}")
    if outcome.failures:
        _say("Start the same command again to ask only these.")


def _of(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal; elsewhere print a line at each tenth."""
    if sys.stderr.isatty() and total:
        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task(what, total=total)
            yield lambda n: progress.advance(task, n)
        return
    done = 0

    def advance(n: int) -> None:
        nonlocal done
        done += n
        if done * 10 // total > (done - n) * 10 // total:
            _say(f"{what}: {done:,} of {total:,}")

    yield advance
