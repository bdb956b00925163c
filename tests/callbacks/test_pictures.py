import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
from pytorch_lightning import Trainer
from pytorch_lightning.trainer.states import TrainerFn

from dyn_lightning.callbacks import pictures
from dyn_lightning.callbacks.pictures import Pictures
from tests.training import warns_once


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pictures, "time", clock)
    return clock


def trainer(fn: TrainerFn = TrainerFn.FITTING, zero: bool = True, takes: bool = True) -> Trainer:
    loggers = [SimpleNamespace(log_image=print)] if takes else []
    found: Any = SimpleNamespace(is_global_zero=zero, loggers=loggers, state=SimpleNamespace(fn=fn))
    return found


class TestSchedule:
    def test_drawing_takes_its_share_at_most(self, clock: Clock) -> None:
        """An evaluation every 10 s; a drawing takes 2 s, of which 400 s of training leave time for one."""
        drawn, plan = [], Pictures(None)

        def draw(at: float) -> None:
            drawn.append(at)
            clock.now += 2.0

        for second in range(10, 2000, 10):
            clock.now = float(second)
            plan.offer(trainer(), lambda: draw(second))  # noqa: B023 - called at once, or replaced by the next
        # The first is expected to take 1 s, and so comes after 200 s.
        assert drawn == [200, 800, 1200, 1600]

    def test_what_was_not_drawn_is_drawn_at_the_end(self, clock: Clock) -> None:
        drawn: list[int] = []
        plan = Pictures(None)
        for number in range(3):
            plan.offer(trainer(), lambda: drawn.append(number))  # noqa: B023 - the last alone is called
        assert drawn == []
        plan.end()
        plan.end()
        assert drawn == [2]

    def test_a_fixed_plan(self, clock: Clock) -> None:
        drawn: list[int] = []
        plan = Pictures(3)
        for number in range(8):
            plan.offer(trainer(), lambda: drawn.append(number))  # noqa: B023 - called at once, or replaced
        assert drawn == [2, 5]
        plan.begin()
        plan.end()
        assert drawn == [2, 5]  # what was left of an earlier training is forgotten

    @pytest.mark.parametrize("fn", [TrainerFn.VALIDATING, TrainerFn.TESTING])
    def test_outside_of_a_training_at_once(self, fn: TrainerFn, clock: Clock) -> None:
        drawn: list[int] = []
        Pictures(None).offer(trainer(fn), lambda: drawn.append(1))
        assert drawn == [1]

    @pytest.mark.parametrize("kind", [{"zero": False}, {"takes": False}])
    def test_not_where_nobody_looks(self, kind: dict[str, bool], clock: Clock) -> None:
        plan = Pictures(1)
        plan.offer(trainer(**kind), lambda: pytest.fail("drawn"))
        plan.end()


def test_a_drawing_that_fails_is_a_warning() -> None:
    def fails() -> None:
        raise RuntimeError("on purpose")

    with warns_once("a picture could not be drawn: RuntimeError: on purpose"):
        Pictures(1).offer(trainer(), fails)


def test_garbage_collection_is_as_before_and_nothing_is_left() -> None:
    class Node:
        pass

    left: list[weakref.ref] = []

    def draw() -> None:
        assert gc.get_freeze_count() > 0
        node = Node()
        node.itself = node  # type: ignore[attr-defined]
        left.append(weakref.ref(node))

    Pictures(1).offer(trainer(), draw)
    assert gc.get_freeze_count() == 0
    assert left[0]() is None


def test_what_a_user_set_aside_from_garbage_collection_stays_there() -> None:
    gc.freeze()
    try:
        frozen, drawn = gc.get_freeze_count(), []
        Pictures(1).offer(trainer(), lambda: drawn.append(True))
        assert drawn == [True]
        assert gc.get_freeze_count() >= frozen - 100  # some of it ends by itself
    finally:
        gc.unfreeze()
