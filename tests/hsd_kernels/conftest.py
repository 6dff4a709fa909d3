import pytest
import torch


@pytest.fixture
def poisoned_memory():
    """torch.empty returns NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
