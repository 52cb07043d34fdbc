"""Settings that every test runs under: offline, one thread, a fixed seed.

Nothing of reftune is imported here, so that the jaxtyping hook (TYPED in the Makefile) sees every module first.
"""

import os
import signal

# Before transformers, datasets or the Hub client are imported: they read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("WANDB_MODE", "disabled")

import hypothesis
import pytest
import torch

torch.set_num_threads(1)

hypothesis.settings.register_profile("slow machine", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("slow machine")

# A shell starts what it runs in the background with Ctrl-C ignored, and tests of Ctrl-C would wait for nothing.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Each test starts from the same random state, whatever ran before it in the same worker."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that a test registers goes with it."""
    from reftune.edits import registry

    monkeypatch.setattr(registry, "_EDITS", dict(registry._EDITS))
