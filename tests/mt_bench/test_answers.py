"""Answers depend on model, question, turn and seed, and on nothing else."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from steplm.data.tokenizer import load_tokenizer
from steplm.errors import ConfigError, DataError
from steplm.eval.chat import load_chat_tokenizer
from steplm.models.folder import load_pretrained
from steplm.mt_bench.answers import (
    TEMPERATURES,
    AnswerSettings,
    SeededSampling,
    answer_questions,
    complete,
)
from steplm.mt_bench.data import Question, load_answers

QUESTIONS = [
    Question(1, "writing", ("Describe a pond.", "Now without water.")),
    Question(2, "math", ("What is two and three? Think of every step and tell it.", "And twice that?")),
    Question(3, "stem", ("Why?", "Why not?")),
    Question(4, "roleplay", ("You are a lake. Speak.", "Be silent.")),
    Question(5, "writing", ("Only once.",)),
]


def _answer(folder: Path, file: Path, questions: list[Question] = QUESTIONS, **options: Any) -> dict[Any, Any]:
    settings = AnswerSettings(**{"max_new_tokens": 12, **options.pop("settings", {})})
    return answer_questions(folder, "tiny", questions, file, settings=settings, device="cpu", **options)


def test_temperatures_are_the_published_ones() -> None:
    assert {name for name, value in TEMPERATURES.items() if value == 0.7} == {"writing", "roleplay"}
    assert {name for name, value in TEMPERATURES.items() if value == 0.1} == {"stem", "humanities"}
    greedy = {name for name, value in TEMPERATURES.items() if value == 0.0}
    assert greedy == {"extraction", "math", "coding", "reasoning"}


def test_answers_are_the_same_alone_and_in_any_batch_and_are_in_the_published_format(
    model_folder: Path, tmp_path: Path
) -> None:
    alone = _answer(model_folder, tmp_path / "alone.jsonl", batch_size=1)
    together = _answer(model_folder, tmp_path / "together.jsonl", batch_size=4)
    assert alone == together
    assert [len(turns) for turns in alone.values()] == [2, 2, 2, 2, 1]
    assert load_answers(tmp_path / "alone.jsonl") == {"tiny": alone}
    row = json.loads((tmp_path / "alone.jsonl").read_text().splitlines()[0])
    assert list(row)[:5] == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
    other = _answer(model_folder, tmp_path / "other.jsonl", settings={"seed": 1})
    assert other[1] != alone[1], "sampled"
    assert other[2] == alone[2], "greedy"


def test_answers_after_a_kill_at_any_byte_are_those_of_an_unbroken_run(model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    whole = _answer(model_folder, file, batch_size=2)
    content = file.read_bytes()
    for length in (0, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        made: list[int] = []
        assert _answer(model_folder, file, batch_size=2, on_answers=made.append) == whole
        assert sum(made) == 5 - content[:length].count(b"\n")
    made = []
    assert _answer(model_folder, file, batch_size=2, on_answers=made.append) == whole
    assert made == [], "nothing is generated again"


def test_a_greedy_completion_is_that_of_transformers(model_folder: Path) -> None:
    model, tokenizer = load_pretrained(model_folder).eval(), load_tokenizer(model_folder)
    prompts = [tokenizer("user: Describe").input_ids, tokenizer("user: What is a lake, and why? ").input_ids]
    made = complete(model, tokenizer, prompts, temperatures=[0, 0], seeds=[1, 2], max_new_tokens=9)
    for prompt, completion in zip(prompts, made, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False, eos_token_id=0)
        text = tokenizer.decode(expected[0, len(prompt) :], skip_special_tokens=True).strip()
        assert completion.text == text


def test_seeded_sampling_draws_from_the_softmax_at_the_temperature() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    sampling = SeededSampling([0.7], [3], "cpu")
    number = 20_000
    drawn = Counter(int(sampling(torch.zeros(1, 1), logits).argmax()) for _ in range(number))
    for token, share in enumerate((logits[0] / 0.7).softmax(0).tolist()):
        assert drawn[token] / number == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / number))


@pytest.mark.parametrize("family", ["rotary", "table of positions"])
def test_prompt_and_answer_stay_within_the_context(model_folder: Path, tmp_path: Path, family: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    vocab_size = len(load_tokenizer(folder))
    if family == "rotary":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    else:
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=vocab_size, n_embd=16, n_layer=1, n_head=2, n_positions=64, initializer_range=0.5
        )
        GPT2LMHeadModel(config).save_pretrained(folder)
    model, tokenizer = load_pretrained(folder).eval(), load_tokenizer(folder)
    model.generation_config.eos_token_id = None
    prompts = [[5] * 4, [7] * 40, [9] * 200]
    made = complete(model, tokenizer, prompts, temperatures=[0.7] * 3, seeds=[1, 2, 3], max_new_tokens=50)
    for completion, prompt, kept, room in zip(made, prompts, (4, 40, 48), (50, 24, 16), strict=True):
        assert completion.num_cut_tokens == len(prompt) - kept
        assert completion.num_tokens == room or completion.ended
        assert completion.num_tokens <= room


def test_the_folders_own_sampling_defaults_have_no_part(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    defaults = {"top_k": 1, "temperature": 5.0, "do_sample": True, "repetition_penalty": 9.0, "eos_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    assert _answer(folder, tmp_path / "a.jsonl") == _answer(model_folder, tmp_path / "b.jsonl")


def test_a_model_without_a_chat_template_is_refused_and_told_the_way_out(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    template = folder / "chat_template.jinja"
    template.rename(tmp_path / "template.jinja")
    with pytest.raises(ConfigError, match=r"no chat template.*steplm sft.*--chat-template"):
        load_chat_tokenizer(folder)
    given = _answer(folder, tmp_path / "a.jsonl", chat_template=tmp_path / "template.jinja")
    assert given == _answer(model_folder, tmp_path / "b.jsonl")
    with pytest.raises(ConfigError, match="cannot read the chat template"):
        load_chat_tokenizer(folder, tmp_path / "none.jinja")
    (tmp_path / "template.jinja").write_text("{{ messages[0].no.such }}")
    with pytest.raises(DataError, match="chat template fails on question 1"):
        _answer(folder, tmp_path / "c.jsonl", chat_template=tmp_path / "template.jinja")


def test_answers_of_another_model_seed_or_question_are_not_taken(model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    _answer(model_folder, file, QUESTIONS[:1])
    with pytest.raises(ConfigError, match="with seed=0"):
        _answer(model_folder, file, QUESTIONS[:1], settings={"seed": 1})
    with pytest.raises(ConfigError, match="to other questions"):
        _answer(model_folder, file, [Question(1, "writing", ("Else?", "Else."))])
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    assert _answer(folder, file, QUESTIONS[:1]), "a copy is the same model"
    model = load_pretrained(folder)
    model.lm_head.weight.data += 0.1
    model.save_pretrained(folder)
    with pytest.raises(ConfigError, match="by another model"):
        _answer(folder, file, QUESTIONS[:1])
    file.write_text('{"question_id": 1, "model_id": "x", "choices": [{"turns": ["a", "b"]}]}\n')
    with pytest.raises(DataError, match="--answers"):
        _answer(model_folder, file, QUESTIONS[:1])


def test_a_model_that_is_not_causal_is_refused(model_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model_folder, tmp_path / "model"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "is_causal": False}))
    with pytest.raises(ConfigError, match="is not causal"):
        _answer(copy, tmp_path / "answers.jsonl")
