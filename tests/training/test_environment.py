"""What is told of the machine while a run goes on."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from steplm.config import RunConfig
from steplm.training import loop
from steplm.training.display import Display, make_display
from steplm.training.environment import crowded_processors
from steplm.training.run import train


@pytest.mark.parametrize(("threads", "advice"), [(1, "Leave other work for later."), (2, "train.num_threads=1")])
def test_slow_steps_under_a_high_load_name_the_setting(
    monkeypatch: pytest.MonkeyPatch, threads: int, advice: str
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(os, "getloadavg", lambda: (6.34, 1.0, 1.0))
    note = crowded_processors(122.0, 9000.0)
    assert note is not None
    assert f"122 tok/s after 9k: {threads} thread" in note
    assert "2 processors with other work (load 6.3)" in note
    assert advice in note
    monkeypatch.setattr(os, "getloadavg", lambda: (1.9, 9.0, 9.0))
    assert crowded_processors(122.0, 9000.0) is None


def test_a_run_that_becomes_slow_under_load_says_so_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object, tiny_run: Callable[..., RunConfig]
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(loop, "crowded_processors", lambda speed, before: "slow" if speed < before else None)
    monkeypatch.setattr(loop, "FAR_SLOWER", 1)
    monkeypatch.setattr(Display, "note", lambda self, text: notes.append(text))
    config = tiny_run(tmp_path, "plan.num_stages=1", "log.logging_steps=1")
    train(config, display=make_display("none"))
    assert notes.count("slow") == 1
