"""``steplm mtbench`` as a whole, killed and started again."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Make = Callable[..., Any]

pytest.importorskip("openai", reason="needs the extra steplm[mtbench]")

KEY = "sk-very-secret-0123456789"
ROOT = Path(__file__).parents[2]


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def mtbench(steplm: Make, bench_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """``mtbench(judge, …)``: the command with quick retries and the output in ``tmp_path / "out"``."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def run(judge: Any, *arguments: object) -> Any:
        settings = ["--data", bench_folder, "--output", tmp_path / "out", "--judge-model", "stub", "--backoff", 0.01]
        if judge is not None:
            settings += ["--base-url", judge.url]
        return steplm("mtbench", *arguments, *settings, "--device", "cpu", cwd=tmp_path)

    return run


def test_models_are_answered_judged_and_compared(
    mtbench: Make, stub_judge: Make, model_folder: Path, answer_file: Any, tmp_path: Path
) -> None:
    judge = stub_judge(key=KEY)
    arguments = [model_folder, "--answers", answer_file("other"), "--mode", "both", "--max-new-tokens", 8]
    result = mtbench(judge, *arguments)
    assert result.returncode == 0, result.stderr
    assert "5 answers to generate" in result.stderr
    assert "40 requests to stub" in result.stderr  # 2 models x 10 turns, and 10 turns x 2 orders
    assert len(judge.requests) == 40
    assert "turns of tiny ended at a limit (8 new tokens" in result.stderr
    assert "tiny against other" in result.stdout
    out = tmp_path / "out"
    assert {file.name for file in out.iterdir()} == {
        "model_answer", "model_judgment", "replies.jsonl", "tables.md", "scores.csv", "scores.json", "radar.png",
        "mt_bench.tables.json",
    }  # fmt: skip
    singles = _rows(out / "model_judgment/stub_single.jsonl")
    assert Counter(row["model"] for row in singles) == {"tiny": 10, "other": 10}
    assert len(_rows(out / "model_judgment/stub_pair.jsonl")) == 10
    with (out / "scores.csv").open() as stream:
        (row,) = [
            row
            for row in csv.DictReader(stream)
            if (row["kind"], row["model"], row["category"], row["turn"]) == ("score", "tiny", "all", "both")
        ]
    scores = [row["score"] for row in singles if row["model"] == "tiny"]
    assert float(row["mean"]) == pytest.approx(sum(scores) / 10)
    assert (row["judged"], row["expected"]) == ("10", "10")

    again = mtbench(judge, *arguments)
    assert again.stdout == result.stdout
    assert len(judge.requests) == 40, "nothing is asked twice"
    as_json = json.loads(mtbench(judge, *arguments, "--json").stdout)
    assert as_json == json.loads((out / "scores.json").read_text())["scores"]
    without_judge = mtbench(None, *arguments)
    assert without_judge.stdout == result.stdout, "what is whole needs no judge"


def test_a_judge_at_its_own_temperature_is_named_so_beside_its_scores(
    mtbench: Make, stub_judge: Make, answer_file: Any, tmp_path: Path
) -> None:
    judge = stub_judge(refuse_temperature=True, refuse_max_tokens=True)
    arguments = ["--answers", answer_file("one"), "--limit", 1, "--max-judge-tokens", 9000]
    result = mtbench(judge, *arguments)
    assert result.returncode == 0, result.stderr
    assert "note: stub refuses temperature 0" in result.stderr
    out = tmp_path / "out"
    scores = json.loads((out / "scores.json").read_text())
    assert (scores["num_replies_at_its_own_temperature"], scores["max_judge_tokens"]) == (6, 9000)
    assert judge.requests[-1]["max_completion_tokens"] == 9000
    again = mtbench(None, *arguments)
    assert mtbench(judge, *arguments[:-2], "--dry-run").stderr.count("6 requests to stub") == 1, "of another limit"
    for text in (result.stdout, again.stdout, (out / "tables.md").read_text()):
        assert "judged by stub at its own temperature" in text


def test_a_judge_that_thinks_aloud_is_named_and_can_be_read_by_its_last_rating(
    mtbench: Make,
    stub_judge: Make,
    bench_folder: Path,
    answer_file: Any,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from steplm.cli.mtbench import run_mtbench
    from steplm.compare.suite import MtBenchConfig

    judge = stub_judge(reply=lambda messages: "<think>[[2]]?</think> Rating: [[8]]")
    file = answer_file("one")
    result = mtbench(judge, "--answers", file, "--limit", 1)
    assert "note: 6 replies think aloud" in result.stderr
    assert "2.00" in result.stdout
    options = MtBenchConfig(judge_model="stub", data=str(bench_folder), limit=1, rating="last")
    assert run_mtbench([], options, output=tmp_path / "out", answers=[file]) == 0
    printed = capfd.readouterr()
    assert "judged by stub, last rating outside <think>" in printed.out
    assert "8.00" in printed.out
    assert "think aloud" not in printed.err
    assert len(judge.requests) == 6, "what is saved is read anew"
    assert json.loads((tmp_path / "out/scores.json").read_text())["rating"] == "last"


def test_nobody_at_the_address_is_one_line_before_anything_is_generated(mtbench: Make, model_folder: Path) -> None:
    class Nobody:
        url = "http://127.0.0.1:9/v1"

    result = mtbench(Nobody(), model_folder, "--backoff", 60)
    assert result.returncode == 1
    *_, last = result.stderr.splitlines()
    assert last.startswith("JudgeError: nobody answers at http://127.0.0.1:9/v1: the connection failed")
    assert "Traceback" not in result.stderr
    assert "answers of" not in result.stderr


def test_the_key_is_nowhere(mtbench: Make, stub_judge: Make, answer_file: Any, tmp_path: Path) -> None:
    judge = stub_judge(["500"] * 4, forever=False, reply=lambda messages: f"You sent {KEY}. [[5]]")
    results = [mtbench(judge, "--answers", answer_file("one"), "--retries", 0, "--concurrency", 1) for _ in range(2)]
    results.append(mtbench(stub_judge(key="another-secret"), "--answers", answer_file("two")))
    assert [result.returncode for result in results] == [1, 0, 1]
    assert judge.keys == {KEY}
    shown = "".join(result.stdout + result.stderr for result in results)
    saved = "".join(file.read_text(errors="replace") for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert "You sent ***" in saved
    assert KEY not in shown
    assert KEY not in saved


def test_missing_judgments_are_told_and_asked_for_by_the_same_command(
    mtbench: Make, stub_judge: Make, answer_file: Any
) -> None:
    judge = stub_judge(["500", "", "", "429"])
    arguments = ["--answers", answer_file("one"), "--retries", 0, "--concurrency", 1]
    result = mtbench(judge, *arguments)
    assert result.returncode == 1
    assert "8 of 10" in result.stdout
    assert "1 request got no reply: HTTP 500" in result.stderr
    result = mtbench(judge, *arguments)
    assert result.returncode == 0
    assert "2 requests to stub" in result.stderr
    assert "(8 have their reply)" in result.stderr
    assert len(judge.requests) == 12
    assert max(Counter(judge.prompts).values()) == 2


def test_replies_that_cannot_be_read_are_shown_as_such_and_are_no_number(
    mtbench: Make, stub_judge: Make, answer_file: Any, tmp_path: Path
) -> None:
    def reply(messages: list[dict[str, str]]) -> str:
        return "Well." if "says 1" in messages[-1]["content"] else "[[4]]"

    judge = stub_judge(reply=reply)
    result = mtbench(judge, "--answers", answer_file("one"), "--ask-again", 1)
    assert result.returncode == 0
    assert len(judge.requests) == 10 + 2
    table = (tmp_path / "out/tables.md").read_text()
    assert "| **all** | 4.00 (4.00–4.00) | 4.00 (4.00–4.00) | 4.00 (4.00–4.00) | 8 of 10 | 2 |" in table
    scores = [row["score"] for row in _rows(tmp_path / "out/model_judgment/stub_single.jsonl")]
    assert Counter(scores) == {4: 8, -1: 2}, "FastChat's mark"


def test_killed_in_the_middle_of_judging_it_asks_nothing_twice(
    stub_judge: Make, bench_folder: Path, answer_file: Any, tmp_path: Path
) -> None:
    concurrency = 2
    command = [sys.executable, "-m", "steplm", "mtbench", "--mode", "both", "--judge-model", "stub"]
    command += ["--answers", answer_file("one"), "--answers", answer_file("two")]
    command += ["--data", bench_folder, "--output", tmp_path / "out", "--concurrency", concurrency]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENAI_API_KEY": KEY}
    replies = tmp_path / "out/replies.jsonl"

    slow = stub_judge(seconds=0.1)
    process = subprocess.Popen(
        [*map(str, command), "--base-url", slow.url],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (replies.exists() and replies.read_bytes().count(b"\n") >= 7):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    num_saved = replies.read_bytes().count(b"\n")
    assert 7 <= num_saved < 40
    assert len(slow.requests) <= num_saved + concurrency
    with replies.open("ab") as stream:
        stream.write(b'{"key": "to')  # as if torn by the kill

    quick = stub_judge()
    subprocess.run([*map(str, command), "--base-url", quick.url], env=environment, check=True, capture_output=True)
    assert len(quick.requests) == 40 - num_saved
    both = Counter(slow.prompts) + Counter(quick.prompts)
    assert len(both) == 40
    assert sum(both.values()) - 40 <= concurrency, "only what was under way at the kill"
    assert len(_rows(replies)) == 40


def test_a_dry_run_tells_the_cost_and_leaves_no_trace(
    mtbench: Make, stub_judge: Make, model_folder: Path, tmp_path: Path
) -> None:
    judge = stub_judge()
    result = mtbench(judge, model_folder, "--dry-run", "--max-new-tokens", 1000)
    assert result.returncode == 0
    assert "5 answers to generate" in result.stderr
    assert "10 requests to stub" in result.stderr
    assert "if every answer is as long as it may be" in result.stderr
    assert judge.requests == []
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_done_is_said_in_one_message_before_anything_is_spent(
    mtbench: Make,
    stub_judge: Make,
    answer_file: Any,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judge, one = stub_judge(), answer_file("one")
    wrong: list[tuple[list[object], str]] = [
        ([], "nothing to judge"),
        (["--answers", one, "--mode", "pair"], "mode: Input should be 'single', 'pairwise' or 'both' (got 'pair')"),
        (["--answers", one, "--mode", "pairwise"], "needs two models"),
        (["--answers", one, "--answers", one], "two models are called 'one'"),
        ([model_folder, model_folder], "two models are called"),
        ([model_folder, "--name", "a", "--name", "b"], "1 models, but 2 names"),
        ([model_folder, "--name", "../up"], "cannot be the name of a file"),
        (["--answers", one, "--categories", "maths"], "Did you mean 'math'"),
        (["--answers", model_folder / "none.jsonl"], "No such file"),
        (["no/such/folder"], "no/such/folder"),
        (["--answers", one, "--api-key-env", "MY_KEY"], "MY_KEY is not set"),
    ]
    for arguments, message in wrong:
        result = mtbench(judge, *arguments)
        assert result.returncode in (1, 2), arguments
        assert message in result.stderr, arguments
        assert "Traceback" not in result.stderr
    monkeypatch.delenv("OPENAI_API_KEY")
    assert "OPENAI_API_KEY is not set" in mtbench(None, "--answers", one).stderr
    assert judge.requests == []
    assert mtbench(judge, "--answers", one).returncode == 0, "a local server needs no key"
