"""A conversation: what the model is given, what is cut, and what the commands do."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from steplm.data.tokenizer import train_tokenizer
from steplm.errors import ConfigError
from steplm.eval.chat import ChatModel, Message

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
TEXTS = ["<user> The small model grows. <assistant> New layers stand between old ones. <system> Be brief."] * 3


@pytest.fixture(scope="module")
def path(save_tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = train_tokenizer(TEXTS, 320)
    tokenizer.chat_template = TEMPLATE
    return save_tiny_model(tmp_path_factory.mktemp("chat"), tokenizer, max_position_embeddings=64)


@pytest.fixture(scope="module")
def chat(path: Path) -> ChatModel:
    return ChatModel(path, device="cpu")


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def test_an_answer_is_the_likeliest_tokens_after_the_templates_prompt(chat: ChatModel) -> None:
    ids = chat.tokenizer("<user> The small model <assistant> ").input_ids
    prompt_length = len(ids)
    with torch.no_grad():
        for _ in range(8):
            ids.append(int(chat.model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == chat.tokenizer.eos_token_id:
                break
    expected = chat.tokenizer.decode(ids[prompt_length:], skip_special_tokens=True).strip()
    assert chat.reply([user("The small model")], max_new_tokens=8, temperature=0).text == expected


def test_the_streamed_pieces_are_the_answer_and_the_seed_decides_it(chat: ChatModel) -> None:
    pieces: list[str] = []
    state = torch.get_rng_state()
    replies = [
        chat.reply([user("New layers")], max_new_tokens=20, temperature=1.5, seed=seed, on_text=pieces.append)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert replies[0] == replies[1] != replies[2]
    assert len(pieces) > 3
    assert "".join("".join(pieces).split()) == "".join("".join(reply.text for reply in replies).split())


def test_an_answer_ends_at_every_token_that_the_folder_says_ends_one(path: Path, tmp_path: Path) -> None:
    first = ChatModel(path, device="cpu").reply([user("New layers")], max_new_tokens=5, temperature=0)
    assert (first.num_tokens, first.ended) == (5, False)
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    chat = ChatModel(path, device="cpu")
    with torch.no_grad():
        said = int(chat.model(torch.tensor([chat.prompt_ids([user("New layers")])])).logits[0, -1].argmax())
    GenerationConfig(eos_token_id=[0, said]).save_pretrained(tmp_path)
    reply = ChatModel(tmp_path, device="cpu").reply([user("New layers")], max_new_tokens=5, temperature=0)
    assert (reply.num_tokens, reply.ended) == (1, True)
    (tmp_path / "generation_config.json").unlink()
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": [0, said]}))
    reply = ChatModel(tmp_path, device="cpu").reply([user("New layers")], max_new_tokens=5, temperature=0)
    assert (reply.num_tokens, reply.ended) == (1, True)


def test_ctrl_c_ends_the_answer_and_keeps_what_was_said(chat: ChatModel) -> None:
    pieces: list[str] = []

    def interrupt(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    whole = chat.reply([user("New layers")], max_new_tokens=30, temperature=0)
    cut = chat.reply([user("New layers")], max_new_tokens=30, temperature=0, on_text=interrupt)
    assert not cut.ended
    assert 0 < cut.num_tokens < whole.num_tokens
    assert whole.text.startswith(cut.text)


def test_the_oldest_turns_are_left_out_but_neither_system_nor_the_last_message(chat: ChatModel) -> None:
    system: Message = {"role": "system", "content": "Be brief."}
    turns = [user("The small model grows."), assistant("New layers stand."), user("old ones"), assistant("grows")]
    last = user("stand between")
    ids, num_left_out = chat.fitted([system, *turns * 3, last], 16)
    assert num_left_out in (2, 4, 6, 8, 10)
    kept = [system, *(turns * 3)[num_left_out:], last]
    assert kept[1]["role"] == "user"
    assert ids == chat.prompt_ids(kept)
    assert len(ids) + 16 <= 64 < len(chat.prompt_ids([system, *(turns * 3)[num_left_out - 2 :], last])) + 16
    assert chat.fitted([system, last], 16) == (chat.prompt_ids([system, last]), 0)
    assert chat.reply([system, *turns * 3, last], max_new_tokens=16).num_messages_left_out == num_left_out
    with pytest.raises(ConfigError, match="64 positions"):
        chat.fitted([user("stand between " * 40)], 16)


def test_an_answer_never_leaves_the_context(chat: ChatModel) -> None:
    reply = chat.reply([user("grows")], max_new_tokens=1000, temperature=0)
    assert reply.num_tokens + len(chat.prompt_ids([user("grows")])) <= 64


@pytest.fixture
def talk(steplm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    def run(folder: Path, lines: str, *options: str) -> Any:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        return steplm("chat", folder, *options, "--device", "cpu", "--max-new-tokens", "6", cwd=tmp_path)

    return run


def test_piped_lines_are_answered_one_by_one_until_the_input_ends(
    path: Path, chat: ChatModel, talk: Callable[..., Any]
) -> None:
    ended = talk(path, "New layers\n\nold ones\n", "--temperature", "0")
    first = chat.reply([user("New layers")], max_new_tokens=6, temperature=0)
    history = [user("New layers"), assistant(first.text), user("old ones")]
    second = chat.reply(history, max_new_tokens=6, temperature=0)
    assert ended.returncode == 0
    assert "".join(ended.stdout.split()) == "".join((first.text + second.text).split())
    assert "cut off after 6 tokens" in ended.stderr


def test_reset_forgets_system_begins_anew_and_quit_ends(
    path: Path, chat: ChatModel, talk: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[list[Message]] = []
    reply = ChatModel.reply

    def noting(self: ChatModel, messages: list[Message], **options: Any) -> Any:
        given.append([*messages])
        return reply(self, messages, **options)

    monkeypatch.setattr(ChatModel, "reply", noting)
    lines = ["a", "b", "/reset", "c", "/system Be brief.", "d", "/reset", "e", "/nonsense", "/quit", "f"]
    ended = talk(path, "\n".join(lines))
    roles = [[message["role"] for message in messages] for messages in given]
    assert roles == [["user"], ["user", "assistant", "user"], ["user"], ["system", "user"], ["system", "user"]]
    assert [messages[-1]["content"] for messages in given] == ["a", "b", "c", "d", "e"]
    assert given[3][0]["content"] == "Be brief."
    assert "no command /nonsense" in ended.stderr


def test_a_line_that_is_not_utf_8_is_refused_and_the_next_one_answered(
    path: Path, steplm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\nold\n"), encoding="utf-8"))
    ended = steplm("chat", path, "--device", "cpu", "--max-new-tokens", "6", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("(a message is not valid Unicode") == 1
    assert len(ended.stdout.splitlines()) >= 1


def test_a_full_context_is_told_and_a_message_too_long_ends_nothing(path: Path, talk: Callable[..., Any]) -> None:
    lines = ["New layers stand between old ones."] * 4 + ["grows " * 90, "old"]
    ended = talk(path, "\n".join(lines))
    assert ended.returncode == 0
    assert "messages are forgotten" in ended.stderr
    assert "64 positions" in ended.stderr


def test_a_model_without_a_template_says_what_to_do_and_takes_one(
    path: Path, tmp_path: Path, talk: Callable[..., Any]
) -> None:
    for file in path.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ended = talk(tmp_path, "a\n")
    assert ended.returncode == 2
    assert "steplm sft" in ended.stderr
    assert "--chat-template FILE" in ended.stderr
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    assert talk(tmp_path, "a\n", "--chat-template", str(tmp_path / "template.jinja")).returncode == 0


@pytest.mark.parametrize("options", [("--temperature", "-1"), ("--top-p", "2")])
def test_numbers_out_of_range_are_refused_at_once(
    path: Path, talk: Callable[..., Any], options: tuple[str, ...]
) -> None:
    assert talk(path, "a\n", *options).returncode == 2
