import pytest
import torch

# Without this, a failed assert of the contract would not show its values.
pytest.register_assert_rewrite("tests.contract")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
