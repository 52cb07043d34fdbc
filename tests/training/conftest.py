"""What several test files of training need."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture
def determinism():
    """For runs under ``full_determinism``, which changes the process: everything as it was afterwards."""
    before = dict(os.environ)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    os.environ.clear()
    os.environ.update(before)
