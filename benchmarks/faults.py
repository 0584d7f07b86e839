"""Break tiny runs in every known way, start the same command again, and compare the result with an unbroken run.

    python benchmarks/faults.py --kills 200 --output results/faults/faults.json
    python benchmarks/faults.py --kills 20 --world-size 2 --kinds kill,terminate,flip

A run is ``steplm train RUN.yaml`` with two stages, LoRA, a model of 7,000 parameters, a checkpoint every second step,
and its own text and token shards. The seed determines what is broken and where; when also depends on the clock.

With one process, three steps of every run, drawn from the seed, have a loss of NaN; they are the same steps in the
unbroken run. A slow disk is simulated by a delay before every write of tensors.

In the end, every run must have the same exported weights, validation loss and log as the unbroken run, except for
times and speeds. With one process they must be bitwise equal; with several, every number in the log must agree within
1e-5. Otherwise the exit code is 1, and the directory of the run is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fault_runs import (
    MOMENTS,
    NUM_STEPS,
    STEP,
    STEP_TOKENS,
    Attempt,
    Moment,
    Subject,
    Wrong,
    can_mount,
    contents,
    mount,
    progress_of,
    require,
    write_text,
)
from rich.console import Console
from rich.table import Table

from steplm.checkpoint.folder import MARKER
from steplm.training.environment import environment
from steplm.training.metrics import read_metrics

# The kinds of faults. After each, the same command must be able to finish the run.


def _reach(subject: Subject, attempt: Attempt, moment: Moment | None) -> bool:
    """Wait for a random time within ``moment``, or within the whole run if None; return False if the run ends first."""
    if not subject.wait_until_begun(attempt):
        return False
    if moment is None:
        subject.sleep(0.95)
    else:
        wanted, seen = subject.generator.randint(1, moment.num_sights), set()

        def is_reached() -> bool:
            seen.add(moment.sight(subject))
            return len(seen - {None}) >= wanted

        if not subject.wait_for(attempt, is_reached):
            return False
        subject.sleep(moment.share)
    return attempt.poll() is None


def _killing(moment: Moment | None, disk_seconds: float = 0.0) -> Callable[[Subject], None]:
    def kill(subject: Subject) -> None:
        for _ in range(subject.generator.randint(1, subject.max_faults)):
            attempt = subject.start(disk_seconds=disk_seconds)
            if not _reach(subject, attempt, moment):
                attempt.wait()
                break
            attempt.kill(subject.generator)
            if attempt.wait() == 0:  # the run finished first
                break
            subject.note_fault(subject.where())

    return kill


def terminate(subject: Subject) -> None:
    """SIGTERM: the step in progress is saved and the exit code is 143; before training, nothing is saved."""
    for _ in range(subject.generator.randint(1, subject.max_faults)):
        attempt = subject.start()
        if not _reach(subject, attempt, subject.generator.choice([None, *MOMENTS.values()])):
            attempt.wait()
            return
        os.kill(attempt.pid, signal.SIGTERM)
        code = attempt.wait()
        if code == 0:
            return
        subject.note_fault(subject.where())
        subject.check_speech(attempt)
        if subject.world_size == 1:
            require(code in (-signal.SIGTERM, 128 + signal.SIGTERM), f"exit code {code} after SIGTERM")
            is_said = "run the same command again to resume" in attempt.output
            require(is_said if code > 0 else not STEP.search(attempt.output), f"it did not save:\n{attempt.output}")
        for event in read_metrics(subject.run_dir / "metrics.jsonl", "train")[-1:]:
            last = event["stage"], event["step"]
            is_saved = bool(subject.checkpoints) and progress_of(subject.checkpoints[-1]) >= last
            require(is_saved, f"it stopped after stage {last[0]}, step {last[1]}, and did not save:\n{attempt.output}")


def fill_disk(subject: Subject) -> None:
    """Give the run too little disk space, once or more; each time it prints one message and keeps what is saved."""
    mount(subject.disk, 0)
    for share in sorted(subject.generator.uniform(0.02, 0.95) for _ in range(subject.max_faults)):
        mount(subject.disk, int(share * subject.num_bytes), "remount")
        subject.refused(subject.start(), "no space left", str(subject.disk), "free some space")
        subject.note_fault(subject.where())
    mount(subject.disk, 100 * subject.num_bytes, "remount")


def _damaging(how: str) -> Callable[[Subject], None]:
    def damage(subject: Subject) -> None:
        """Damage one file of the newest checkpoint; the run must name it and use the previous checkpoint."""
        if not subject.stop_after(2):
            return
        newest = subject.checkpoints[-1]
        file = subject.generator.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
        content = bytearray(file.read_bytes())
        where = subject.generator.randrange(len(content))
        if how == "truncate":
            del content[where:]
        else:
            content[where] ^= 1 << subject.generator.randrange(8)
        file.write_bytes(content)
        subject.note_fault(f"{file.name} of a checkpoint")
        output = subject.finish().output
        require(f"passing over {newest.name}" in output, f"{how} of {file} at byte {where} was not found:\n{output}")
        # If the marker itself is damaged, the run cannot know which file is.
        require(file.name == MARKER or str(file) in output, f"the message does not name {file}:\n{output}")

    return damage


REFUSED_CHANGES: dict[str, Any] = {
    "seed": 1,
    "model.hidden_size": 16,
    "data.validation_fraction": 0.2,
    "data.shard_tokens": 5000,
    "plan.total_tokens": 30 * 64,
    "growth.operator": "stack",
    "pet.rank": 4,
    "pet.alpha": 3.0,
    "optim.name": "galore",
    "train.precision": "bf16",
    "train.sequence_length": 8,
    "train.save_stepz": 3,
}
ALLOWED_CHANGES: dict[str, Any] = {
    "data.num_workers": 2,
    "plan.budget": "8GiB",
    "train.save_steps": 3,
    "train.save_total_limit": 1,
    "memory.reserve": "1MiB",
    "log.progress": "none",
}


def change_refused(subject: Subject) -> None:
    """Change the configuration of a started run; it must be rejected, naming the key, and write nothing."""
    if not subject.stop_after(subject.generator.randint(1, 2)):
        return
    before = contents(subject.disk)
    for key in subject.generator.sample(sorted(REFUSED_CHANGES), subject.max_faults):
        subject.configure(**{key: REFUSED_CHANGES[key]})
        subject.refused(subject.start(), key.rpartition(".")[2], exit_code=2 if key == "train.save_stepz" else 1)
        require(contents(subject.disk) == before, f"the refused change of {key} changed the run directory")
        subject.note_fault(key)
    subject.configure()


def change_allowed(subject: Subject) -> None:
    """Change keys that do not affect results; the run must accept them and give the same numbers."""
    if not subject.stop_after(subject.generator.randint(1, 2)):
        return
    keys = subject.generator.sample(sorted(ALLOWED_CHANGES), subject.max_faults)
    subject.configure(**{key: ALLOWED_CHANGES[key] for key in keys})
    subject.note_fault(", ".join(keys))


def delete_shard(subject: Subject) -> None:
    """Delete a file of a token shard; the run must name it, and continue after the data are prepared again."""
    if not subject.stop_after(subject.generator.randint(1, 2)):
        return
    files = [file for suffix in ("bin", "npy") for file in subject.prepared_dir.glob(f"*/shard-*.{suffix}")]
    file = subject.generator.choice(sorted(files))
    file.unlink()
    subject.refused(subject.start(), f"{file} is missing", "steplm prepare")
    subject.note_fault(f"{file.parent.name} shard")
    shutil.rmtree(subject.prepared_dir)
    require(subject.start("prepare").wait() == 0, "the data could not be prepared again")


def forbid(subject: Subject) -> None:
    """Make a folder unreadable; the run must name it, and lose no checkpoint."""
    if not subject.stop_after(subject.generator.randint(1, 2)):
        return
    checkpoints = subject.checkpoints
    folder = subject.generator.choice(
        [subject.run_dir, checkpoints[-1].parent, checkpoints[-1], subject.prepared_dir, subject.prepared_dir / "train"]
    )
    mode = folder.stat().st_mode
    folder.chmod(0)
    try:
        attempt = subject.start(obey_permissions=True)
        subject.refused(attempt, "permission denied", str(folder))
    finally:
        folder.chmod(mode)
    require(subject.checkpoints == checkpoints, "checkpoints were lost")
    subject.note_fault(str(folder.relative_to(subject.disk)))


def start_twice(subject: Subject) -> None:
    """Start two processes in one directory; one must train undisturbed, and the other must be rejected."""
    first = subject.start()
    if subject.generator.random() < 0.5:
        subject.wait_until_begun(first)
        subject.sleep(0.5)
    where = subject.where()
    if first.poll() is not None:  # the first process finished too early
        return
    second = subject.start()
    refused, done = sorted((first, second), key=lambda attempt: attempt.wait() == 0)
    if refused.wait() == 0 and "is finished already" in second.output:  # likewise
        return
    require(done.wait() == 0, f"both were refused:\n{first.output}\n{second.output}")
    subject.refused(refused, "another process trains in", str(subject.run_dir))
    subject.note_fault(where)


KILLS: dict[str, Callable[[Subject], None]] = {
    "kill": _killing(None),
    **{f"kill {name}": _killing(moment) for name, moment in MOMENTS.items()},
}
OTHERS: dict[str, Callable[[Subject], None]] = {
    # With a slow disk, a save continues in the background for several steps.
    "slow disk": _killing(MOMENTS["saving"], disk_seconds=0.01),
    "terminate": terminate,
    "full disk": fill_disk,
    "truncate": _damaging("truncate"),
    "flip": _damaging("flip"),
    "change refused": change_refused,
    "change allowed": change_allowed,
    "delete shard": delete_shard,
    "forbid": forbid,
    "twice": start_twice,
}
KINDS = KILLS | OTHERS


# The command.


@dataclass
class Outcome:
    """The outcome of one kind of fault."""

    tries: int = 0  # faults that hit a run
    resumed: int = 0  # tries that left a checkpoint to resume from
    runs: int = 0  # each is broken up to three times
    equal: int = 0  # runs whose result equals that of the unbroken run
    seconds: float = 0.0
    landed: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def add(self, subject: Subject, problem: str | None) -> None:
        self.tries += subject.faults
        self.resumed += subject.resumed
        self.runs += 1
        self.equal += problem is None
        self.landed += subject.landed
        self.problems += [] if problem is None else [problem]


class Workshop:
    """A directory with the broken runs and the unbroken one."""

    def __init__(self, root: Path, world_size: int, seed: int) -> None:
        self.root, self.world_size, self.seed = root, world_size, seed
        # The same steps in every run. Only forked processes can be patched, not those that torchrun executes.
        steps = random.Random(seed).sample(range(NUM_STEPS), 3) if world_size == 1 else []
        self.spoilt = frozenset(step * STEP_TOKENS for step in steps)
        self.text = root / "text.jsonl"
        write_text(self.text)
        self.unbroken = self.subject("unbroken", 0)
        attempt = self.unbroken.start()
        self.unbroken.wait_until_begun(attempt)
        started = time.monotonic()
        require(attempt.wait() == 0, f"the unbroken run failed:\n{attempt.output}")
        self.unbroken.seconds = time.monotonic() - started
        sizes = (len(content) for content in contents(self.unbroken.disk).values())
        self.unbroken.num_bytes = sum(-(-size // 4096) * 4096 for size in sizes)  # in pages, as tmpfs counts

    def subject(self, kind: str, number: int, like: Subject | None = None, **options: Any) -> Subject:
        if like is not None:
            options |= {"seconds": like.seconds, "num_bytes": like.num_bytes}
        name = f"{kind} {number}"
        return Subject(
            root=self.root / name.replace(" ", "-"),
            text=self.text,
            spoilt=self.spoilt,
            world_size=self.world_size,
            generator=random.Random(f"{self.seed} {name}"),
            **options,
        )

    def break_runs(
        self, kind: str, tries: int, *, first: int = 0, on_progress: Callable[[Outcome], None] = lambda outcome: None
    ) -> Outcome:
        """Break runs in one way until there are ``tries`` faults; finish each run and compare it.

        Runs are numbered from ``first``.
        """
        outcome = Outcome()
        started = time.monotonic()
        while outcome.tries < tries and outcome.runs < 2 * tries + 3:  # some runs finish before their fault
            number = first + outcome.runs
            subject = self.subject(kind, number, self.unbroken, max_faults=min(3, tries - outcome.tries))
            problem = self._problem(kind, subject)
            outcome.add(subject, problem and f"{kind}, run {number}: {problem}")
            outcome.seconds = time.monotonic() - started
            if problem is None:
                shutil.rmtree(subject.root)
            on_progress(outcome)
        return outcome

    def _problem(self, kind: str, subject: Subject) -> str | None:
        try:
            KINDS[kind](subject)
            if not subject.is_finished:
                subject.finish()
            return subject.difference(self.unbroken)
        except Wrong as error:
            return str(error)
        finally:
            subject.end()


def shares(kinds: Iterable[str], kills: int) -> Counter[str]:
    """The number of kills of each kind: every second one is at a random time, and the moments share the others."""
    anywhere = [kind for kind in kinds if kind == "kill"]
    aimed = [kind for kind in kinds if kind in KILLS and kind != "kill"]
    turns = [anywhere, aimed] if anywhere and aimed else [anywhere or aimed]
    order = (turns[number % len(turns)] for number in range(kills))
    return Counter(kinds[number // len(turns) % len(kinds)] for number, kinds in enumerate(order) if kinds)


def table(outcomes: dict[str, Outcome]) -> Table:
    made = Table("fault", "tries", "resumed", "runs", "equal", "seconds")
    for column in made.columns[1:]:
        column.justify = "right"
    for kind, outcome in outcomes.items():
        equal = f"{outcome.equal}" if outcome.equal == outcome.runs else f"[red]{outcome.equal}[/red]"
        numbers = outcome.tries, outcome.resumed, outcome.runs, equal, f"{outcome.seconds:.0f}"
        made.add_row(kind, *map(str, numbers))
    return made


def document(outcomes: dict[str, Outcome], workshop: Workshop, skipped: dict[str, str]) -> dict[str, Any]:
    totals = {name: sum(getattr(outcome, name) for outcome in outcomes.values()) for name in ("tries", "runs", "equal")}
    return {
        "seed": workshop.seed,
        "world_size": workshop.world_size,
        "kills": sum(outcome.tries for kind, outcome in outcomes.items() if kind in KILLS),
        **totals,
        "unbroken_seconds": workshop.unbroken.seconds,
        "kinds": {kind: vars(outcome) for kind, outcome in outcomes.items()},
        "skipped": skipped,
        "environment": environment(torch.device("cpu")),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs: half at any instant, half at a chosen moment")
    parser.add_argument("--others", type=int, default=10, help="tries of every other kind of fault")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of: {', '.join(KINDS)}")
    parser.add_argument("--world-size", type=int, default=1, help="processes, under torchrun")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    kinds = arguments.kinds.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        parser.error(f"no such kind: {', '.join(unknown)}. There are: {', '.join(KINDS)}")
    skipped = {} if can_mount() else {"full disk": "a small file system cannot be mounted here"}

    console = Console()
    root = Path(tempfile.mkdtemp(prefix="steplm-faults-"))
    workshop = Workshop(root, arguments.world_size, arguments.seed)
    console.print(f"an unbroken run takes {workshop.unbroken.seconds:.1f} s")
    kills, outcomes = shares(kinds, arguments.kills), {}
    for kind in kinds:
        if kind in skipped or (kind in KILLS and not kills[kind]):
            continue

        def show(outcome: Outcome, kind: str = kind) -> None:
            if console.is_terminal:
                console.print(f"{kind}: {outcome.tries} tries, {outcome.equal} of {outcome.runs} runs equal ", end="\r")

        tries = kills[kind] if kind in KILLS else arguments.others
        outcomes[kind] = workshop.break_runs(kind, tries, on_progress=show)
        for problem in outcomes[kind].problems:
            console.print(problem, style="red", markup=False, highlight=False, soft_wrap=True)
        if arguments.output is not None:  # written after each kind, because the whole benchmark takes long
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(document(outcomes, workshop, skipped), indent=1) + "\n")
    console.print(table(outcomes))
    for kind, reason in skipped.items():
        console.print(f"left out: {kind}: {reason}")
    if any(outcome.problems for outcome in outcomes.values()):
        console.print(f"the runs that are not equal are kept in {root}")
        return 1
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
