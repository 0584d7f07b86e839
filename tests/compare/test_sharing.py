"""Which run may start: none that would train a stage which another is just training."""

from __future__ import annotations

from steplm.compare.sharing import Start, is_needed, next_start, num_shared

KEYS = {"a": ("1", "2a"), "b": ("1", "2b"), "c": ("1", "2a"), "d": ("9", "2d"), "e": ()}


def _next(
    waiting: str, running: str = "", ends: dict[str, list[int]] | None = None, begun: str = ""
) -> Start[str] | None:
    return next_start(waiting, running, KEYS, ends or {}, begun)


def test_stages_are_shared_from_the_first_on() -> None:
    assert [num_shared(KEYS["a"], KEYS[other]) for other in "abcde"] == [2, 1, 2, 0, 0]


def test_a_run_waits_for_the_stage_that_a_running_one_trains() -> None:
    assert _next("abd") == Start("a")
    assert _next("bd", running="a") == Start("d")
    assert _next("b", running="a") is None
    assert _next("e", running="a") == Start("e")


def test_a_run_branches_off_where_the_common_stage_is_done() -> None:
    assert _next("b", running="a", ends={"a": [1]}) == Start("b", "a", 1)
    assert _next("b", ends={"a": [1, 2]}) == Start("b", "a", 1)
    assert _next("c", ends={"b": [1, 2], "a": [2]}) == Start("c", "a", 2)
    assert _next("c", running="a", ends={"a": [1]}) is None  # the second stage comes too


def test_a_stage_end_that_is_not_there_is_not_branched_off_from() -> None:
    """A run that branched off itself has only the ends of the stages that it trained."""
    assert _next("b", ends={"a": [2]}) == Start("b")


def test_a_run_with_checkpoints_of_its_own_goes_on_from_them() -> None:
    assert _next("b", running="a", begun="b") == Start("b")
    assert _next("b", ends={"a": [1], "b": [1]}, begun="b") == Start("b")


def test_checkpoints_are_needed_while_a_run_to_come_shares_a_stage() -> None:
    assert is_needed("a", "bd", KEYS)
    assert not is_needed("a", "ade", KEYS)
