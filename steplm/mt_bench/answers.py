"""A model's answers to the questions, generated with ``transformers``.

B questions per batch, V vocabulary size.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)

from steplm.errors import ConfigError, DataError
from steplm.eval.chat import load_chat_tokenizer
from steplm.eval.fingerprint import model_fingerprint
from steplm.models.folder import load_for_inference
from steplm.mt_bench.data import NUM_TURNS, Answer, Choice, Question, QuestionId, Turns
from steplm.mt_bench.journal import Journal
from steplm.units import reason

# As published, by question category.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
OTHER_TEMPERATURE = 0.7
LEAST_ANSWER_SHARE = 0.25  # share of the context that a long prompt must leave for the answer


@dataclass(frozen=True)
class AnswerSettings:
    """Settings that an answer depends on, besides the model and the question."""

    max_new_tokens: int = 1024
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """One turn of an answer."""

    text: str
    num_tokens: int
    ended: bool  # at an end token, not at the limit
    num_cut_tokens: int  # dropped from the start of a prompt that left too little room


def answer_questions(
    folder: str | Path,
    model_id: str,
    questions: Sequence[Question],
    file: Path,
    *,
    settings: AnswerSettings,
    batch_size: int = 8,
    device: str = "auto",
    chat_template: Path | None = None,
    on_answers: Callable[[int], None] = lambda n: None,
) -> dict[QuestionId, Turns]:
    """The model's answers to all questions; those in ``file`` are kept, the others are generated and added to it.

    The same seed gives the same answers, however often generation is interrupted.

    Args:
        file: in FastChat's ``model_answer`` format, plus a key ``made_by`` with everything the answer depends on.
        batch_size: questions answered at once.
        on_answers: called with the number of answers that a batch added.

    Raises:
        ConfigError: there is no chat template, the model is not causal, or ``file`` has answers from another model or
            other settings.
        CheckpointError, DataError, HubUnavailable: no model or tokenizer was found.
    """
    with Journal(file, Answer) as journal:
        tokenizer = load_chat_tokenizer(folder, chat_template)
        model_and_template = [model_fingerprint(str(folder)), tokenizer.chat_template]
        made_by = {**asdict(settings), "model": _sha256(model_and_template).hexdigest()[:16]}
        digests = {question.question_id: _sha256(question.turns).hexdigest()[:16] for question in questions}
        for answer in journal.rows:
            _check_origin(file, answer, made_by, digests)
        answers = {answer.question_id: answer.turns for answer in journal.rows}
        missing = {q.question_id for q in questions} - set(answers)
        model: PreTrainedModel | None = None
        for first in range(0, len(questions), batch_size):
            batch = questions[first : first + batch_size]
            new = [question for question in batch if question.question_id in missing]
            if not new:
                continue
            if model is None:
                model = load_for_inference(folder, device)
            # Answer the whole batch again, because padding affects the last bits of its logits.
            completions = _answer_batch(model, tokenizer, batch, settings)
            rows = [
                _row(model_id, question, of_question, {**made_by, "question": digests[question.question_id]})
                for question, of_question in zip(batch, completions, strict=True)
                if question.question_id in missing
            ]
            journal.append(*rows)
            answers.update((row.question_id, row.turns) for row in rows)
            on_answers(len(rows))
    return {question.question_id: answers[question.question_id] for question in questions}


def _answer_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    batch: Sequence[Question],
    settings: AnswerSettings,
) -> list[list[Completion]]:
    completions: list[list[Completion]] = [[] for _ in batch]
    for turn in range(NUM_TURNS):
        asked = [i for i, question in enumerate(batch) if len(question.turns) > turn]
        digests = [_sha256([settings.seed, batch[i].question_id, turn]).digest() for i in asked]
        made = complete(
            model,
            tokenizer,
            [_prompt(tokenizer, batch[i], completions[i]) for i in asked],
            temperatures=[TEMPERATURES.get(batch[i].category, OTHER_TEMPERATURE) for i in asked],
            seeds=[int.from_bytes(digest[:8], "big") >> 1 for digest in digests],  # torch.Generator takes 63 bits
            max_new_tokens=settings.max_new_tokens,
        )
        for i, completion in zip(asked, made, strict=True):
            completions[i].append(completion)
    return completions


def _prompt(tokenizer: PreTrainedTokenizerFast, question: Question, so_far: Sequence[Completion]) -> list[int]:
    messages = []
    for number, said in enumerate(question.turns[: len(so_far) + 1]):
        messages.append({"role": "user", "content": said})
        if number < len(so_far):
            messages.append({"role": "assistant", "content": so_far[number].text})
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template can raise anything
        raise DataError(f"the chat template fails on question {question.question_id!r}: {reason(error)}") from None
    return tokenizer(text, add_special_tokens=False).input_ids  # the template adds them


# --- generation -----------------------------------------------------------------------------------------


@torch.inference_mode()
def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Sequence[int]],
    *,
    temperatures: Sequence[float],
    seeds: Sequence[int],
    max_new_tokens: int,
) -> list[Completion]:
    """Complete B tokenized prompts at once, each with its own temperature and seed.

    Prompt and answer stay within the model's context: the answer ends there, and a prompt that leaves less than
    ``LEAST_ANSWER_SHARE`` of the context for the answer loses its beginning.
    """
    if not prompts:
        return []
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    kept, budgets = zip(*(_fitted(prompt, max_new_tokens, context) for prompt in prompts), strict=True)
    width = max(map(len, kept))
    ends = _end_tokens(model, tokenizer)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    input_ids = torch.full((len(kept), width), padding)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(kept):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, width - len(prompt) :] = 1
    # Otherwise the folder's own defaults (top-k, penalties) would apply to whatever is not set here.
    model.generation_config = GenerationConfig(
        max_new_tokens=max(budgets), do_sample=False, eos_token_id=ends, pad_token_id=padding
    )
    clamp = model.register_forward_pre_hook(_positions_below(context), with_kwargs=True)
    try:
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            logits_processor=LogitsProcessorList([SeededSampling(temperatures, seeds, model.device)]),
            stopping_criteria=StoppingCriteriaList([_Budgets(width, budgets)]),
            use_cache=True,
        ).cpu()
    finally:
        clamp.remove()
    completions = []
    for row, prompt in enumerate(kept):
        tokens = output[row, width : width + budgets[row]].tolist()
        length = next((i for i, token in enumerate(tokens) if token in ends), None)
        text = tokenizer.decode(tokens[:length], skip_special_tokens=True).strip()
        num_tokens = len(tokens) if length is None else length
        completions.append(Completion(text, num_tokens, length is not None, len(prompts[row]) - len(prompt)))
    return completions


class SeededSampling(LogitsProcessor):
    """Sampling that does not depend on the other rows of a batch: greedy choice after adding seeded Gumbel noise.

    The argmax of ``logits / temperature + Gumbel noise`` is a sample from ``softmax(logits / temperature)``
    (Gumbel 1954). A temperature of 0 leaves the logits unchanged.
    """

    def __init__(self, temperatures: Sequence[float], seeds: Sequence[int], device: torch.device | str) -> None:
        self._temperatures = temperatures
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (B, V) logits
        rows = []
        for logits, temperature, generator in zip(scores, self._temperatures, self._generators, strict=True):
            if temperature > 0:
                exponential = torch.empty_like(logits, dtype=torch.float32).exponential_(generator=generator)
                logits = logits.float() / temperature - exponential.clamp_min(1e-38).log()
            rows.append(logits.float())
        return torch.stack(rows)


class _Budgets(StoppingCriteria):
    """Ends each row after its own number of new tokens."""

    def __init__(self, width: int, budgets: Sequence[int]) -> None:
        self._width = width
        self._budgets = torch.tensor(budgets)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:  # (B,) bool
        return (input_ids.shape[1] - self._width >= self._budgets).to(input_ids.device)


def _fitted(prompt: Sequence[int], max_new_tokens: int, context: int | None) -> tuple[list[int], int]:
    """The part of a prompt that is kept, and how many new tokens may follow."""
    if context is None:
        return list(prompt), max_new_tokens
    room = max(1, min(max_new_tokens, int(context * LEAST_ANSWER_SHARE)))
    kept = list(prompt)[-max(context - room, 1) :]
    return kept, min(max_new_tokens, max(context - len(kept), 1))


def _positions_below(context: int | None) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """A hook that clamps position IDs: ended rows continue with their batch, past the end of the position table."""

    def clamp(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if context is not None and kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"].clamp(max=context - 1)
        return args, kwargs

    return clamp


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """End tokens of the model's generation config (a chat model's end of turn), and the tokenizer's end of text."""
    named = model.generation_config.eos_token_id
    ends = named if isinstance(named, list) else [] if named is None else [named]
    return list(dict.fromkeys([*ends, tokenizer.eos_token_id]))


# --- the file -------------------------------------------------------------------------------------------


def _row(model_id: str, question: Question, completions: Sequence[Completion], made_by: dict[str, Any]) -> Answer:
    turns = tuple(completion.text for completion in completions)
    return Answer(
        question_id=question.question_id,
        answer_id=_sha256([model_id, question.question_id, turns]).hexdigest()[:22],
        model_id=model_id,
        choices=(Choice(turns=turns),),
        tstamp=time.time(),
        num_tokens=tuple(completion.num_tokens for completion in completions),
        ended=tuple(completion.ended for completion in completions),
        num_cut_tokens=tuple(completion.num_cut_tokens for completion in completions),
        made_by=made_by,
    )


def _check_origin(file: Path, answer: Answer, made_by: dict[str, Any], digests: dict[QuestionId, str]) -> None:
    found = answer.made_by
    if not found:
        raise DataError(
            f"{file} has answers that were not made here. Judge them as they are with --answers {file}.", path=str(file)
        )
    wanted = {**made_by, "question": digests.get(answer.question_id, found.get("question"))}
    if different := [name for name, value in wanted.items() if found.get(name) != value]:
        name = different[0]
        what = {"model": "by another model", "question": "to other questions"}.get(
            name, f"with {name}={found.get(name)}"
        )
        raise ConfigError(
            f"{file} has answers made {what}. Use another --output or --name, or remove the file.",
            path=str(file),
            different=different,
        )


def _sha256(value: Any) -> hashlib._Hash:
    return hashlib.sha256(json.dumps(value).encode())
