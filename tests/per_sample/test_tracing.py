from typing import Any

import pytest
import torch

from dyn_lightning.per_sample import tracing
from dyn_lightning.per_sample.tracing import remembered


class Counting:
    """A function that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        self.calls += 1
        if arguments == ("bad",):
            raise TypeError("bad")
        return (*arguments, "found")


class TestRemembered:
    def test_equal_arguments_are_asked_once(self) -> None:
        function = Counting()
        ask = remembered(function)
        assert [ask(1, (2, 3)) for _ in range(3)] == [(1, (2, 3), "found")] * 3
        assert ask(torch.Size([2]), None) == (torch.Size([2]), None, "found")
        assert function.calls == 2

    def test_what_has_no_hash_is_asked_each_time(self) -> None:
        function = Counting()
        ask = remembered(function)
        assert [ask([1]) for _ in range(2)] == [([1], "found")] * 2
        assert function.calls == 2

    def test_an_error_is_not_remembered(self) -> None:
        function = Counting()
        ask = remembered(function)
        for _ in range(2):
            with pytest.raises(TypeError, match="bad"):
                ask("bad")
        assert function.calls == 2

    def test_it_forgets_before_it_holds_too_much(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tracing, "MOST_REMEMBERED", 3)
        function = Counting()
        ask = remembered(function)
        for argument in (0, 1, 2, 3, 3, 0):
            assert ask(argument) == (argument, "found")
        assert function.calls == 5  # the 0 was forgotten, the 3 was not

    @pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
    def test_a_tracer_s_sizes_are_not_remembered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tracing, "MOST_REMEMBERED", 1)
        function = Counting()
        ask = remembered(function)
        ask("before")
        torch.jit.trace(lambda x: x.reshape(ask(x.shape)[0]), torch.zeros(2, 3), check_trace=False)
        ask("before")  # would have been forgotten for them
        assert function.calls == 2
