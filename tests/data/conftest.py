"""Tokenizers for the data tests, built once a session."""

import pytest
from transformers import PreTrainedTokenizerFast

from tests.data.tiny_tokenizers import BOS_CHAT, bos_tokenizer, chatml_tokenizer


@pytest.fixture(scope="session")
def chatml() -> PreTrainedTokenizerFast:
    return chatml_tokenizer()


@pytest.fixture(scope="session")
def raw_bos() -> PreTrainedTokenizerFast:
    return bos_tokenizer()


@pytest.fixture(scope="session")
def chat_bos() -> PreTrainedTokenizerFast:
    return bos_tokenizer(BOS_CHAT)
