"""Rows that a model has no positions for."""

from typing import Any

import datasets
import pytest
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from reftune.errors import ReftuneError
from reftune.models import limit_to_context, position_table
from reftune.training.row_lengths import check_row_lengths
from tests.data.tiny_tokenizers import chatml_tokenizer
from tests.tiny_models import CAUSAL

_SIZE: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
GPT2 = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1, n_positions=12))
MODELS = [
    (GPT2, 12),
    (OPTForCausalLM(OPTConfig(**_SIZE, ffn_dim=8, word_embed_proj_dim=8, max_position_embeddings=12)), 12),
    (BertForSequenceClassification(BertConfig(**_SIZE, intermediate_size=8, max_position_embeddings=12)), 12),
    (RobertaForSequenceClassification(RobertaConfig(**_SIZE, intermediate_size=8, max_position_embeddings=12)), 10),
]


@pytest.mark.parametrize(("model", "limit"), MODELS, ids=lambda value: type(value).__name__)
def test_a_row_as_long_as_the_table_runs_and_one_token_more_does_not(model: Any, limit: int) -> None:
    tokenizer: PreTrainedTokenizerFast = chatml_tokenizer()
    assert tokenizer.model_max_length > 10**9, "this tokenizer states no limit"
    assert position_table(model) == limit
    limit_to_context(tokenizer, model)
    assert tokenizer.model_max_length == limit
    ids = datasets.Dataset.from_dict({"input_ids": [[3] * limit]}).with_format("torch")
    model(**{"input_ids": ids[:]["input_ids"]})
    with pytest.raises(Exception, match=r"index|size|bound"):  # the control
        model(input_ids=ids[:]["input_ids"].new_full((1, limit + 1), 3))
    check_row_lengths(model, datasets.Dataset.from_dict({"input_ids": [[3] * limit]}))
    with pytest.raises(ReftuneError, match=rf"row 2 has {limit + 1} tokens, and the model has positions for {limit}"):
        check_row_lengths(model, datasets.Dataset.from_dict({"input_ids": [[3], [3] * (limit + 1)]}))


def test_positions_that_are_computed_end_nowhere_but_limit_a_tokenizer_that_states_nothing() -> None:
    model, tokenizer = CAUSAL["llama"](), chatml_tokenizer()
    assert position_table(model) is None
    limit_to_context(tokenizer, model)
    assert tokenizer.model_max_length == model.config.max_position_embeddings
    tokenizer.model_max_length = 10**6
    limit_to_context(tokenizer, model)
    assert tokenizer.model_max_length == 10**6, "what is stated stands"
