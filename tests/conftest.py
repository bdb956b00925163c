import os

import pytest
import torch

# Triton asks for it when it is first imported: where there is no GPU, its kernels are tested in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Without this, a failed assert of the contract would not show its values.
pytest.register_assert_rewrite("tests.contract")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
