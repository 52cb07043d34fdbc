"""Tokens and seconds are those of training alone."""

import time
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from reftune.training.throughput import ThroughputCallback, peak_memory_bytes

EVENT: Any = (TrainingArguments(use_cpu=True), TrainerState(), TrainerControl())


def test_attended_tokens_are_counted_padding_is_not() -> None:
    meter = ThroughputCallback()
    meter.count({"attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]]), "input_ids": torch.zeros(2, 3)})
    meter.count({"input_ids": torch.zeros(1, 4)})
    assert meter.tokens == 7 and meter.tokens_per_second == 0


def test_evaluation_and_saving_take_no_training_time() -> None:
    meter = ThroughputCallback()
    meter.begin()
    with meter.paused():
        pass  # before training too
    meter.on_epoch_begin(*EVENT)
    with meter.paused():
        time.sleep(0.2)
    with pytest.raises(ValueError), meter.paused():
        raise ValueError
    time.sleep(0.05)
    meter.on_epoch_end(*EVENT)
    assert len(meter.epoch_seconds) == 1 and 0.05 <= meter.epoch_seconds[0] < 0.2


def test_a_record_is_taken_up() -> None:
    meter = ThroughputCallback()
    record = {"tokens": 40, "epoch_seconds": [2.0], "running_epoch": 2.0}
    meter.begin(record)
    assert meter.tokens_per_second == 10 and meter.epoch_seconds == [2.0]
    meter.begin(record, epoch_is_over=True)
    assert meter.tokens_per_second == 10 and meter.epoch_seconds == [2.0, 2.0]
    assert meter.record() == {"tokens": 40, "epoch_seconds": [2.0, 2.0], "running_epoch": 0.0}


def test_peak_memory_is_this_process_s() -> None:
    before = peak_memory_bytes()
    held = bytearray(before + (64 << 20))
    assert peak_memory_bytes() > before + (32 << 20)
    del held
