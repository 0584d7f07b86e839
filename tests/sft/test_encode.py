"""What has a loss: the answers, and the token that ends each of them; nothing of a prompt."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from steplm.data.tokenizer import train_tokenizer
from steplm.sft.encode import Encoder, Example
from steplm.sft.records import as_conversation
from steplm.sft.templates import set_chat_template

END = "<|endoftext|>"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Say cat."},
    {"role": "assistant", "content": "cat"},
    {"role": "user", "content": "Say dog."},
    {"role": "assistant", "content": "dog"},
]


def learned(tokenizer: PreTrainedTokenizerFast, example: Example) -> list[str]:
    """The runs of tokens that have a loss, as text."""
    runs: list[list[int]] = [[]]
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (token, -100)
        if label == -100:
            runs.append([])
        else:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs if run]


def test_no_token_of_the_prompt_has_a_loss_and_the_answer_with_its_end_has(tokenizer: PreTrainedTokenizerFast) -> None:
    set_chat_template(tokenizer, None)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id  # the trap: who masks the pad token masks the end
    record = {"instruction": "Say cat.", "input": "", "output": "cat"}
    example = Encoder(tokenizer).encode(as_conversation(record))
    assert learned(tokenizer, example) == [f"cat{END}"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say cat."}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert example.input_ids[: len(prompt)] == prompt
    assert example.labels[: len(prompt)] == [-100] * len(prompt)
    assert example.labels[-1] == tokenizer.eos_token_id
    assert example.num_answer_tokens == len(example.input_ids) - len(prompt)


def test_every_answer_of_a_conversation_is_learned_and_nothing_that_follows_its_end(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = CHATML
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    encoder = Encoder(tokenizer)
    example = encoder.encode(as_conversation({"messages": TURNS}))
    assert learned(tokenizer, example) == ["cat<|im_end|>", "dog<|im_end|>"]
    whole = tokenizer.apply_chat_template(TURNS, tokenize=False).rstrip()
    assert example.input_ids == tokenizer(whole, add_special_tokens=False).input_ids
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = [{"from": names[message["role"]], "value": message["content"]} for message in TURNS]
    assert encoder.encode(as_conversation({"conversations": shared})) == example
    # A last word of the user is no lesson, and changes none.
    assert encoder.encode(as_conversation({"messages": [*TURNS, TURNS[1]]})) == example
    # Of prompt and completion only what is in the completion is learned.
    given = encoder.encode(as_conversation({"prompt": TURNS[:4], "completion": TURNS[4:]}))
    assert learned(tokenizer, given) == ["dog<|im_end|>"]
    assert given.input_ids == example.input_ids


def test_an_answer_of_weight_0_is_in_the_prompt_of_the_next_one(tokenizer: PreTrainedTokenizerFast) -> None:
    set_chat_template(tokenizer, None)
    whole = Encoder(tokenizer).encode(as_conversation({"messages": TURNS}))
    masked = [*TURNS[:2], {**TURNS[2], "weight": 0}, *TURNS[3:]]
    example = Encoder(tokenizer).encode(as_conversation({"messages": masked}))
    assert learned(tokenizer, whole) == [f"cat{END}", f"dog{END}"]
    assert learned(tokenizer, example) == [f"dog{END}"]
    assert example.input_ids == whole.input_ids


@pytest.mark.parametrize("role", ["system", "user", "User"])
def test_a_template_that_leaves_out_a_message_is_told(role: str, tokenizer: PreTrainedTokenizerFast) -> None:
    known = ("system", "user", "assistant") if role == "User" else {"system", "user", "assistant"} - {role}
    tokenizer.chat_template = (
        f"{{% for m in messages %}}{{% if m.role in {sorted(known)} %}}{{{{ m.role }}}}: {{{{ m.content }}}}\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    turns = [{**turn, "role": role} if turn["role"] == role.lower() else turn for turn in TURNS]
    with pytest.raises(ValueError, match=f"leaves out the {role} message"):
        Encoder(tokenizer).encode(as_conversation({"messages": turns}))


def test_an_answer_that_the_template_does_not_end_gets_an_end_with_a_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}assistant: {% endif %}"
    example = Encoder(tokenizer).encode(as_conversation({"messages": TURNS}))
    assert learned(tokenizer, example) == ["cat", f"dog{END}"]


def test_a_template_that_hides_earlier_thoughts_teaches_the_last_answer_alone(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content if loop.last or m.role == 'user' else "
        "m.content.split('/think')[-1] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    turns = [
        {**turn, "content": f"hm/think{turn['content']}"} if turn["role"] == "assistant" else turn for turn in TURNS
    ]
    example = Encoder(tokenizer).encode(as_conversation({"messages": turns[1:]}))
    assert learned(tokenizer, example) == [f"hm/thinkdog{END}"]
    assert "assistant: cat" in tokenizer.decode(example.input_ids)


def test_where_a_token_would_reach_over_the_seam_the_prompt_keeps_its_own_tokens() -> None:
    tokenizer = train_tokenizer(["### Response:(a)"] * 9, 300)
    set_chat_template(tokenizer, None)
    prompt_text = tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    prompt = tokenizer(prompt_text).input_ids
    assert tokenizer(prompt_text + "(a)").input_ids[: len(prompt)] != prompt, "the test needs a merge"
    example = Encoder(tokenizer).encode(as_conversation({"prompt": "?", "completion": "(a)"}))
    assert example.input_ids[: len(prompt)] == prompt
    assert learned(tokenizer, example) == [f"(a){END}"]


def test_without_a_template_prompt_and_completion_stand_as_they_are(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tokenizer, uses_template=False)
    example = encoder.encode(as_conversation({"prompt": "Say cat:", "completion": " cat"}))
    assert example.input_ids == tokenizer(f"{END}Say cat: cat{END}").input_ids
    assert learned(tokenizer, example) == [f" cat{END}"]
    with pytest.raises(ValueError, match="in two texts"):
        encoder.encode(as_conversation({"messages": TURNS}))


def test_a_special_token_in_a_message_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    set_chat_template(tokenizer, None)
    record = {"instruction": "Say cat.", "output": f"cat{END}dog"}
    with pytest.raises(ValueError, match="special token"):
        Encoder(tokenizer).encode(as_conversation(record))


def test_a_conversation_that_the_template_refuses_says_why(tokenizer: PreTrainedTokenizerFast) -> None:
    set_chat_template(tokenizer, None)
    turns = [{"role": "tool", "content": "3"}, {"role": "assistant", "content": "three"}]
    with pytest.raises(ValueError, match="not tool"):
        Encoder(tokenizer).encode(as_conversation({"messages": turns}))


def test_the_folder_fixture_has_no_template(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.chat_template is None
    assert not (folder / "chat_template.jinja").exists()


def test_a_template_that_leaves_out_the_answer_is_told(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="leaves out or changes the answer"):
        Encoder(tokenizer).encode(as_conversation({"messages": TURNS[1:3]}))


def test_an_answer_is_learned_as_the_record_has_it_or_not_at_all(tokenizer: PreTrainedTokenizerFast) -> None:
    """Templates of reasoning models drop what comes before </think>, some from every answer."""
    content = "message.content"
    tokenizer.chat_template = CHATML.replace(content, f"{content}.split('</think>')[-1]")
    thought = {"role": "assistant", "content": "<think>miau</think>cat"}
    with pytest.raises(ValueError, match="leaves out or changes the answer"):
        Encoder(tokenizer).encode(as_conversation({"messages": [TURNS[1], thought]}))
    example = Encoder(tokenizer).encode(as_conversation({"messages": [TURNS[1], thought, *TURNS[3:]]}))
    assert (learned(tokenizer, example), example.num_skipped_answers) == ([f"dog<|im_end|>{END}"], 1)
    as_lines = f"{content}.replace('</think>', '\\n</think>\\n\\n')"
    tokenizer.chat_template = CHATML.replace(content, as_lines)
    example = Encoder(tokenizer).encode(as_conversation({"messages": [TURNS[1], thought]}))
    assert learned(tokenizer, example) == [f"<think>miau\n</think>\n\ncat<|im_end|>{END}"]
    tokenizer.chat_template = CHATML.replace(content, f"{content} | trim")
    example = Encoder(tokenizer).encode(as_conversation({"messages": [TURNS[1], {**thought, "content": " cat "}]}))
    assert learned(tokenizer, example) == [f"cat<|im_end|>{END}"]


def test_an_earlier_answer_is_learned_where_the_template_ends_each_conversation(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """As Phi-3's does, by EOS unless it adds a generation prompt."""
    tokenizer.chat_template = f"{CHATML}{{% if not add_generation_prompt %}}{{{{ eos_token }}}}{{% endif %}}"
    example = Encoder(tokenizer).encode(as_conversation({"messages": TURNS}))
    assert learned(tokenizer, example) == ["cat<|im_end|>", f"dog<|im_end|>\n{END}"]


def test_an_unknown_character_does_not_end_an_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Tokenizers without bytes to fall back on have a token for it, which is special but ends nothing."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "cat": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    unknowing = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    record = as_conversation({"prompt": "cat", "completion": "cat dog"})
    assert Encoder(unknowing, uses_template=False).encode(record).labels[-3:] == [2, 0, 1]
