"""Zero-shot tasks: local copies against lm_eval's own tasks, what is reused, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steplm.data.tokenizer import load_tokenizer, train_tokenizer
from steplm.errors import CheckpointError, ConfigError, DataError, HubUnavailable
from steplm.eval.fingerprint import model_fingerprint
from steplm.eval.local_sets import hellaswag_query
from steplm.eval.scores import TaskResult
from steplm.eval.task_list import TaskFolders, load_tasks
from steplm.eval.zero_shot import ZeroShotResults, evaluate_tasks
from steplm.models.folder import load_pretrained

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'steplm[eval]'")
harness = pytest.importorskip("steplm.eval.harness", reason="lm_eval cannot score Hugging Face models here")

TASKS = ("lambada_openai", "piqa", "arc_easy", "winogrande", "hellaswag")

# --- our own items, as the local files have them, and as the sets on the hub do -----------------------------

LAMBADA = [
    ("The cat sat by the door and waited for its", "dinner"),
    ('"Who is there?" she asked.\n\n"It is only me," said', "Tom's\n\n\"friend"),
    ("He counted the sheep, one by one, and fell", "asleep"),
]
PIQA = [
    ("open a jar", ["turn the lid", "turn the jar's table over"], 0),
    ("dry a towel\nquickly", ["put it in water", "hang it in the sun"], 1),
    ("cut bread", ["use a spoon", "use a knife"], 1),
]
ARC = [
    ("What does a plant need?", ["light", "a hat", "sand", "noise"], 0),
    ("Which of these melts first?", ["iron", "ice", "stone", "glass"], 1),
    ("How many legs has a spider?", ["two", "four", "six", "eight"], 3),
]
WINOGRANDE = [
    ("The ball broke the window because", "the window", "the ball", "was made of steel.", 1),
    ("Ann asked Beth, but", "Ann", "Beth", "'s answer was no.", 1),
    ("The cup would not fit the box as", "the cup", "the box", "was too large", 0),
]
HELLASWAG = [
    ("Doors", "A man walks to a door.", "he", ["opens it.", "eats it.", "sings [note] to it.", "is a  door."], 0),
    ("Health", "Rest well. [title] Drink water.", "", ["Then sleep.", "Then rain.", "Cars.", "[step] Blue."], 1),
    ("Cooking", "Two women stand in a kitchen. They talk.", "one of them", ["flies.", "cooks.", "is.", "sea."], 1),
]
COPA = [
    ("The grass was wet.", "It rained.", "It snowed.", "cause", 0),
    ("He dropped the cup. ", "It flew.", "Broken glass lay there.", "effect", 1),
    ("She opened the window.", "It was warm.", "it was cold.", "cause", 0),
]
BOOLQ = [
    ("Ice -- Ice is water that is frozen.", "is ice made of water", True),
    ("A door is made of wood.", "can a door sing", False),
    ("Iron melts.", "does iron melt", True),
]


def native() -> dict[str, str]:
    """The local files, by name."""
    hellaswag = [
        line
        for label, before, half, endings, gold in HELLASWAG
        for line in (f"{label}: {before} {half}".strip().replace(" [title]", ". "), str(gold), *endings)
    ]
    records: dict[str, list[dict[str, Any]]] = {
        "lambada_openai": [{"context": context, "continuation": word} for context, word in LAMBADA],
        "piqa": [{"query": f"Question: {g}\n", "choices": c, "gold": gold} for g, c, gold in PIQA],
        "arc_easy": [{"query": f"Question: {q}", "choices": c, "gold": gold} for q, c, gold in ARC],
        "winogrande": [
            {"context_options": [f"{start} {a}", f"{start} {b}"], "continuation": end, "gold": gold}
            for start, a, b, end, gold in WINOGRANDE
        ],
    }
    files = {f"{name}.jsonl": "".join(json.dumps(r) + "\n" for r in found) for name, found in records.items()}
    return {**files, "hellaswag_val_full.txt": "\n".join(hellaswag) + "\n"}


def as_on_the_hub(task: str) -> list[dict[str, Any]]:
    if task == "openbookqa":
        return [
            {"question_stem": q, "choices": {"text": c, "label": list("ABCD")}, "answerKey": "ABCD"[gold]}
            for q, c, gold in ARC
        ]
    if task == "copa":
        names = ("premise", "choice1", "choice2", "question", "label")
        return [dict(zip(names, item, strict=True)) for item in COPA]
    if task == "boolq":
        return [{"passage": text, "question": q, "label": int(answer)} for text, q, answer in BOOLQ]
    if task == "lambada_openai":
        return [{"text": f"{context} {word}"} for context, word in LAMBADA]
    if task == "piqa":
        return [{"goal": goal, "sol1": c[0], "sol2": c[1], "label": gold} for goal, c, gold in PIQA]
    if task in ("arc_easy", "arc_challenge"):
        return [
            {"question": q, "choices": {"text": c, "label": list("ABCD")}, "answerKey": "ABCD"[gold]}
            for q, c, gold in ARC
        ]
    if task == "winogrande":
        return [
            {"sentence": f"{start} _ {end}", "option1": a, "option2": b, "answer": str(gold + 1)}
            for start, a, b, end, gold in WINOGRANDE
        ]
    return [
        {"activity_label": label, "ctx_a": before, "ctx_b": half, "endings": endings, "label": str(gold)}
        for label, before, half, endings, gold in HELLASWAG
    ]


OWN_FILES = {
    "lambada_openai": "lambada/lambada_openai.yaml",
    "piqa": "piqa/piqa.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "copa": "super_glue/copa/default.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "winogrande": "winogrande/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
}


def own_task(name: str, records: list[dict[str, Any]]) -> Any:
    """lm_eval's task as it ships it, on records in the hub's schema."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / OWN_FILES[name])
    assert config["task"] == name
    config.pop("tag", None)
    rows = Dataset.from_list(records)
    config["custom_dataset"] = lambda **_: {"train": rows, "validation": rows, "test": rows}
    task = ConfigurableTask(config=config)
    task.set_config("num_fewshot", 0)
    return task


# --- models -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def save_model(save_tiny_model: Callable[..., Path]) -> Callable[[Path, int], Path]:
    texts = ["Question: What does a man need to open a door?\nAnswer: He turns the lid of the jar."] * 3
    tokenizer = train_tokenizer(texts, 320)
    return lambda folder, seed: save_tiny_model(folder, tokenizer, seed=seed, max_position_embeddings=192)


@pytest.fixture(scope="module")
def models(save_model: Callable[[Path, int], Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("models")
    return [str(save_model(root / name / "export", seed)) for seed, name in enumerate(("vanilla", "step"))]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    for name, text in native().items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def scorer(models: list[str]) -> Any:
    return harness.scorer(load_pretrained(models[0]).eval(), load_tokenizer(models[0]), 2)


@pytest.fixture(scope="module")
def both(models: list[str], sets: Path) -> ZeroShotResults:
    return evaluate_tasks(models, TASKS, tasks_data=sets, device="cpu")


class Recorder:
    """Progress that remembers, and can be told to be interrupted at a task."""

    def __init__(self, stop_at: str = "") -> None:
        self.stop_at = stop_at
        self.reused: list[bool] = []
        self.advanced: list[tuple[int, int]] = []

    def begin(self, model: str, task: str) -> None:
        if task == self.stop_at:
            raise KeyboardInterrupt

    def advance(self, done: int, total: int) -> None:
        self.advanced.append((done, total))

    def finish(self, result: TaskResult, reused: bool) -> None:
        self.reused.append(reused)


# --- against lm_eval's own --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_a_local_copy_scores_every_item_as_lm_evals_own_task(name: str, sets: Path, scorer: Any) -> None:
    (task,) = load_tasks([name], TaskFolders(data=sets)).values()
    local = harness.score(scorer, name, task, None)
    own = harness.score(scorer, name, own_task(name, as_on_the_hub(name)), None)
    assert local.num_items == 3
    assert local.item_ids == own.item_ids  # the same words
    assert local.loglikelihoods == own.loglikelihoods
    assert local.item_scores == own.item_scores
    assert local.metrics == own.metrics
    assert set(local.metrics) == ({"perplexity", "acc"} if name == "lambada_openai" else set(own.metrics))
    assert ("acc_norm" in local.metrics) == (name in ("piqa", "arc_easy", "hellaswag"))
    assert local.chance == own.chance == {"piqa": 0.5, "winogrande": 0.5, "lambada_openai": None}.get(name, 0.25)


# The file of each set as it is published, and what its records look like where they differ from those on the hub.
PUBLISHED_FILES = {
    "lambada_openai": "lambada_openai.jsonl",
    "piqa": "piqa.jsonl",
    "arc_easy": "ARC-Easy-Test.jsonl",
    "arc_challenge": "ARC-Challenge-Test.jsonl",
    "openbookqa": "openbookqa.jsonl",
    "copa": "COPA/val.jsonl",
    "boolq": "BoolQ/val.jsonl",
    "winogrande": "winogrande_1.1/dev.jsonl",
    "hellaswag": "hellaswag_val.jsonl",
}
OTHER_FORMS: dict[str, list[dict[str, Any]]] = {
    "openbookqa": [
        {
            "question": {
                "stem": q,
                "choices": [{"text": text, "label": label} for text, label in zip(c, "ABCD", strict=True)],
            },
            "answerKey": "ABCD"[gold],
        }
        for q, c, gold in ARC
    ],
    "boolq": [{"passage": text, "question": q, "title": "x", "answer": answer} for text, q, answer in BOOLQ],
    "hellaswag": [{**item, "label": int(item["label"])} for item in as_on_the_hub("hellaswag")],
}


FORMS = [*((name, as_on_the_hub(name)) for name in PUBLISHED_FILES), *OTHER_FORMS.items()]


@pytest.mark.parametrize(("name", "records"), FORMS)
def test_a_set_as_it_is_published_is_scored_as_lm_evals_own_task(
    name: str, records: list[dict[str, Any]], scorer: Any, tmp_path: Path
) -> None:
    file = tmp_path / PUBLISHED_FILES[name]
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps({**record, "idx": 7}) + "\n" for record in records))
    (task,) = load_tasks([name], TaskFolders(data=tmp_path)).values()
    local = harness.score(scorer, name, task, None)
    own = harness.score(scorer, name, own_task(name, as_on_the_hub(name)), None)
    assert local.num_items == 3
    assert local.item_ids == own.item_ids  # the same words
    assert local.item_scores == own.item_scores
    assert local.metrics == own.metrics
    assert local.chance == own.chance


def requests_of(task: Any, limit: int) -> list[Any]:
    from steplm.eval.quiet import quiet

    with quiet():
        task.build_all_requests(limit=limit)
    return [instance.args for instance in task.instances]


@pytest.mark.parametrize("name", ["lambada_openai", "piqa", "arc_easy", "winogrande"])
def test_the_real_sets_ask_what_lm_evals_own_tasks_ask(name: str, shared_data: Path) -> None:
    (task,) = load_tasks([name], TaskFolders(data=shared_data / "zero_shot")).values()
    limit = 60
    items = [dict(item) for item, _ in zip(task.eval_docs, range(limit), strict=False)]
    records: list[dict[str, Any]]
    if name == "lambada_openai":
        records = [{"text": f"{i['context']} {i['continuation']}"} for i in items]
    elif name == "piqa":
        records = [
            {"goal": i["query"][10:-1], "sol1": i["choices"][0], "sol2": i["choices"][1], "label": i["gold"]}
            for i in items
        ]
    elif name == "arc_easy":
        records = [
            {
                "question": i["query"][10:],
                "choices": {"text": i["choices"], "label": list("ABCD")},
                "answerKey": "ABCD"[i["gold"]],
            }
            for i in items
        ]
    else:
        records = []
        for item in items:
            first, second = item["context_options"]
            same = next(i for i in range(len(first)) if first[i : i + 1] != second[i : i + 1])
            sentence = f"{first[:same]}_ {item['continuation']}"
            options = {"option1": first[same:], "option2": second[same:], "answer": str(item["gold"] + 1)}
            records.append({"sentence": sentence, **options})
    assert requests_of(task, limit) == requests_of(own_task(name, records), limit)


def test_every_context_of_hellaswag_is_worded_as_lm_eval_words_it(shared_data: Path) -> None:
    import bz2

    from lm_eval.tasks.hellaswag.utils import preprocess

    packed = (shared_data / "zero_shot/hellaswag_val_full.txt.bz2").read_bytes()
    contexts = bz2.decompress(packed).decode().splitlines()[::6]
    captions = [context for context in contexts if not context.endswith(".")]
    assert (len(contexts), len(captions)) == (10042, 3243)
    for context in contexts:
        before, half = context, ""
        if not context.endswith("."):
            cut = max(context.rfind(end) + len(end) for end in (". ", "! ", "? ", '." ', '?" ', '!" ', ".) "))
            before, half = context[: cut - 1], context[cut:]
        assert hellaswag_query(context) == preprocess(f"{before} {half.capitalize()}")


def test_standard_errors_are_lm_evals(both: ZeroShotResults, models: list[str]) -> None:
    from lm_eval.api.metrics import mean_stderr

    for task in TASKS:
        result = both.by_model_and_task[models[1], task]
        for name, metric in result.metrics.items():
            scores = list(result.item_scores[name])
            if metric.aggregation == "mean":
                assert metric.stderr == pytest.approx(mean_stderr(scores), abs=1e-12)
            else:  # a small change of the mean changes the perplexity by itself times the change
                assert metric.stderr == pytest.approx(mean_stderr(scores) * metric.value)


def test_the_batch_size_changes_no_score(both: ZeroShotResults, models: list[str], sets: Path) -> None:
    alone = evaluate_tasks(models[:1], TASKS, tasks_data=sets, batch_size=1, device="cpu")
    for task in TASKS:
        for ours, theirs in zip(alone.of(task)[0].loglikelihoods, both.of(task)[0].loglikelihoods, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-3)


def test_few_shot_examples_are_other_items(sets: Path) -> None:
    (task,) = load_tasks(["piqa"], TaskFolders(data=sets), num_fewshot=2).values()
    task.set_fewshot_seed(1234)
    for (context, _), item in zip(requests_of(task, 3)[::2], PIQA, strict=True):
        assert context.count("Question:") == 3
        assert context.count(item[0]) == 1


# --- several models -----------------------------------------------------------------------------------------


def test_equal_models_differ_by_exactly_zero(models: list[str], sets: Path, tmp_path: Path) -> None:
    copy = str(shutil.copytree(models[0], tmp_path / "copy"))
    results = evaluate_tasks([models[0], copy], TASKS, tasks_data=sets, device="cpu")
    gaps = [results.difference(copy, task, name) for task in TASKS for name in results.of(task)[0].metrics]
    gaps.append(results.average_difference(copy))
    assert [(gap.value, gap.low, gap.high) for gap in gaps if gap is not None] == [(0.0, 0.0, 0.0)] * 10
    assert model_fingerprint(copy) == model_fingerprint(models[0]) != model_fingerprint(models[1])


def test_the_average_counts_each_task_once_by_its_primary_metric(both: ZeroShotResults, models: list[str]) -> None:
    primary = {"hellaswag": "acc_norm", "arc_easy": "acc_norm", "piqa": "acc_norm"}
    assert both.averaged == {task: primary.get(task, "acc") for task in TASKS}
    scores = [both.by_model_and_task[models[1], task].metrics[name] for task, name in both.averaged.items()]
    value, stderr = both.average(models[1])
    assert value == pytest.approx(sum(score.value for score in scores) / 5)
    assert stderr == pytest.approx(sum((score.stderr or 0) ** 2 for score in scores) ** 0.5 / 5)
    gap = both.average_difference(models[1])
    assert gap is not None
    assert gap.value == pytest.approx(value - both.average(models[0])[0])


# --- kept, and used again -----------------------------------------------------------------------------------


def test_a_killed_evaluation_scores_only_what_is_missing(models: list[str], sets: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"tasks_data": sets, "output": tmp_path, "device": "cpu"}
    with pytest.raises(KeyboardInterrupt):
        evaluate_tasks(models, ["piqa", "arc_easy", "winogrande"], progress=Recorder("winogrande"), **how)
    assert len(list(tmp_path.glob("items/*.json"))) == 2
    again = Recorder()
    results = evaluate_tasks(models, ["piqa", "arc_easy", "winogrande"], progress=again, **how)
    assert again.reused == [True, True, False, False, False, False]
    assert again.advanced[0] == (0, 6)
    last = Recorder()
    reused = evaluate_tasks(models, ["piqa", "arc_easy", "winogrande"], progress=last, **how)
    assert last.reused == [True] * 6
    assert reused.by_model_and_task == results.by_model_and_task
    assert reused.as_json() == results.as_json()


def test_only_the_same_model_items_and_limit_are_reused(
    models: list[str], save_model: Callable[[Path, int], Path], sets: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(models[0], tmp_path / "model"))
    data = Path(shutil.copytree(sets, tmp_path / "sets"))

    def is_reused(**more: Any) -> bool:
        seen = Recorder()
        how: dict[str, Any] = {"tasks_data": data, "output": tmp_path, "device": "cpu", "progress": seen, **more}
        evaluate_tasks([own], ["piqa"], **how)
        return seen.reused == [True]

    assert not is_reused()
    assert is_reused()
    assert is_reused(batch_size=3)
    assert not is_reused(dtype="bfloat16")
    assert not is_reused(limit=2)
    assert not is_reused(num_fewshot=1)
    (saved,) = [file for file in tmp_path.glob("items/*") if json.loads(file.read_text())["limit"] == 2]
    saved.write_text(saved.read_text()[:-20])
    assert not is_reused(limit=2)  # damaged
    text = (data / "piqa.jsonl").read_text()
    (data / "piqa.jsonl").write_text(text.replace("a spoon", "two spoons"))
    assert not is_reused()
    (data / "piqa.jsonl").write_text(text)
    assert is_reused()
    save_model(own, 7)
    assert not is_reused()
    tokenizer = json.loads((own / "tokenizer.json").read_text())
    (own / "tokenizer.json").write_text(json.dumps({**tokenizer, "normalizer": {"type": "Lowercase"}}))
    assert not is_reused()


def test_local_sets_need_no_network(models: list[str], sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert evaluate_tasks(models[:1], ["piqa"], tasks_data=sets, device="cpu").of("piqa")[0].num_items == 3


def test_requests_longer_than_the_context_are_counted(models: list[str], tmp_path: Path) -> None:
    records = [{"context": "word " * number, "continuation": "end"} for number in (2, 400)]
    (tmp_path / "lambada_openai.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    results = evaluate_tasks(models[:1], ["lambada_openai"], tasks_data=tmp_path, device="cpu")
    assert results.of("lambada_openai")[0].num_truncated == 1


# --- task files of the user's -------------------------------------------------------------------------------

MINE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: {text}
doc_to_target: gold
doc_to_choice: choices
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def mine(tmp_path: Path, sets: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    file = sets / "piqa.jsonl"
    (folder / "mine.yaml").write_text(MINE.format(name="my_piqa", file=file, text='"{{query}}Answer:"'))
    (folder / "code.yaml").write_text(MINE.format(name="with_code", file=file, text="!function words.text"))
    (folder / "words.py").write_text("import pathlib\npathlib.Path(__file__).with_name('ran').touch()\ntext = str\n")
    (folder / "typo.yaml").write_text(MINE.format(name="typo", file=file, text='"{{question}}"'))
    (folder / "gone.yaml").write_text(MINE.format(name="gone", file="/nowhere/x.jsonl", text="query"))
    (folder / "broken.yaml").write_text("task: [broken\n")
    return folder


def test_a_task_file_of_the_users_is_found_and_no_code_of_its_neighbors_is_run(
    models: list[str], mine: Path, both: ZeroShotResults
) -> None:
    results = evaluate_tasks(models[:1], ["my_piqa"], tasks_path=[mine], device="cpu")
    assert results.of("my_piqa")[0].loglikelihoods == both.of("piqa")[0].loglikelihoods
    assert not (mine / "ran").exists()
    evaluate_tasks(models[:1], ["with_code"], tasks_path=[mine], device="cpu")
    assert (mine / "ran").exists()  # asked for by name, it is


def test_task_files_that_make_no_task_are_named(models: list[str], mine: Path) -> None:
    with pytest.raises(ConfigError, match=r"typo.yaml makes no task 'typo': UndefinedError: 'question' is undefined"):
        evaluate_tasks(models[:1], ["typo"], tasks_path=[mine])
    with pytest.raises(DataError, match=r"cannot read the items of task 'gone' \(.*gone.yaml\): .*/nowhere/x.jsonl"):
        evaluate_tasks(models[:1], ["gone"], tasks_path=[mine])


def test_an_unknown_task_gets_near_names(models: list[str], sets: Path, mine: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown task 'broken'.*cannot be read: .*broken.yaml"):
        evaluate_tasks(models[:1], ["broken"], tasks_path=[mine])
    with pytest.raises(ConfigError, match=r"unknown task 'lambada_openia'. Did you mean 'lambada_openai'") as caught:
        evaluate_tasks(models[:1], ["lambada_openia"], tasks_data=sets)
    known = "arc_challenge, arc_easy, boolq, copa, hellaswag, lambada_openai, openbookqa, piqa, winogrande"
    assert f"Tasks of the folders: {known}." in str(caught.value)


def test_a_set_that_the_hub_does_not_give_is_one_error(models: list[str], sets: Path) -> None:
    known = r"arc_challenge, arc_easy, boolq, copa, hellaswag, lambada_openai, openbookqa, piqa, winogrande;"
    with pytest.raises(
        HubUnavailable, match=rf"task 'sciq' needs allenai/sciq of the hub.*\(--tasks-data\) for {known}"
    ):
        evaluate_tasks(models[:1], ["piqa", "sciq"], tasks_data=sets)


def test_a_mistyped_task_is_told_without_reading_lm_evals_list(
    models: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read() -> Any:
        raise AssertionError("lm_eval's list takes ten seconds")

    monkeypatch.setattr("steplm.eval.task_list._standard_manager", read)
    with pytest.raises(ConfigError, match=r"unknown task 'boolqq'\. Did you mean 'boolq'"):
        evaluate_tasks(models[:1], ["arc_easy", "boolqq"])


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"limit": 0}, ConfigError, "limit is 0, but must be 1 or more"),
        ({"num_fewshot": -1}, ConfigError, "num_fewshot is -1"),
        ({"batch_size": 0}, ConfigError, "batch_size is 0"),
        ({"tasks": []}, ConfigError, "at least one model and one task"),
        ({"tasks_data": "/nowhere"}, ConfigError, "no folder /nowhere of evaluation sets"),
        ({"tasks_path": ["/nowhere"]}, ConfigError, "no folder /nowhere of task files"),
        ({"models": ["./nowhere"]}, CheckpointError, "no folder nowhere"),
        ({"device": "tpu"}, ConfigError, "unknown device"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(
    models: list[str], sets: Path, more: dict[str, Any], error: type[Exception], message: str
) -> None:
    how: dict[str, Any] = {"models": models, "tasks": ["piqa"], "tasks_data": sets, **more}
    with pytest.raises(error, match=message):
        evaluate_tasks(**how)


def test_what_is_missing_in_a_folder_is_named(models: list[str], sets: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="named twice"):
        evaluate_tasks([models[0], models[0]], ["piqa"], tasks_data=sets)
    with pytest.raises(DataError, match=r"no file .*piqa.jsonl"):
        evaluate_tasks(models, ["piqa"], tasks_data=tmp_path)
    bare = Path(shutil.copytree(models[0], tmp_path / "bare"))
    (bare / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"no tokenizer at .*bare"):
        evaluate_tasks([bare], ["piqa"], tasks_data=sets)


def test_without_lm_eval_the_extra_is_named(models: list[str], sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[eval\]'"):
        evaluate_tasks(models, ["piqa"], tasks_data=sets)


# --- the command --------------------------------------------------------------------------------------------


def test_the_command_prints_one_table_and_writes_its_files(
    steplm: Callable[..., Any], models: list[str], sets: Path, tmp_path: Path
) -> None:
    (tmp_path / "held out.txt").write_text("A man opens the door.")
    texts = ["--perplexity", "held_out=held out.txt", "-d", "held out.txt"]
    arguments = ["eval", *models, "--tasks", "piqa,arc_easy", "-t", "lambada_openai", "--tasks-data", sets, "-o", "out"]
    shown = steplm(*arguments, *texts, "--limit", 2, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    for word in ("piqa, acc_norm", "average", "vanilla", "step", "held_out", "first 2 items"):
        assert word in shown.stdout
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "items",
        "texts",
        *(f"zero_shot.{s}" for s in ("md", "csv", "json", "tables.json", "png")),
    }
    assert "| lambada_openai, perplexity | 2 | – |" in (out / "zero_shot.md").read_text()
    document = json.loads((out / "zero_shot.json").read_text())
    assert [model["label"] for model in document["models"]] == ["vanilla", "step"]
    assert [task["task"] for task in document["tasks"]] == ["piqa", "arc_easy", "lambada_openai"]
    assert [score["name"] for score in document["perplexity"]] == ["held_out", ""] * 2
    rows = list(csv.DictReader((out / "zero_shot.csv").open()))
    assert len(rows) == 2 * (2 + 2 + 2 + 1) + 2 * 2 * 2
    assert rows[0]["difference"] == ""
    again = steplm(*arguments, "--limit", 2, "--json", cwd=tmp_path)
    assert again.stderr.count("as saved") == 6
    printed = json.loads(again.stdout)
    assert {**document, "perplexity": []} == printed


def test_the_command_says_what_it_lacks(steplm: Callable[..., Any], models: list[str], tmp_path: Path) -> None:
    nothing = steplm("eval", models[0], cwd=tmp_path)
    assert nothing.returncode == 2
    assert "name tasks (--tasks piqa,arc_easy) or texts (--data FILE)" in nothing.stderr
    assert steplm("eval", models[0], "-d", "x.txt", "--limit", 3, cwd=tmp_path).returncode == 2
