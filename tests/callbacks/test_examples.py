import doctest
import importlib

import pytest


# pytest itself would import these files as a top-level package `callbacks`, which no user ever does.
@pytest.mark.parametrize("name", ["expert_examples", "temperature"])
def test_docstring_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(f"dyn_lightning.callbacks.{name}")).failed == 0
