"""Arguments of the chat template as recipes and commands write them."""

import pytest

from reftune.errors import ReftuneError
from reftune.runs.recipe import TrainRecipe
from tests.data.tiny_tokenizers import chatml_tokenizer


@pytest.mark.parametrize(
    "given",
    ["enable_thinking=false,effort=low,n=3", '{"enable_thinking": false, "effort": "low", "n": 3}',
     {"enable_thinking": False, "effort": "low", "n": 3}],
)  # fmt: skip
def test_every_spelling_is_the_same_and_reaches_the_encoding(given: object) -> None:
    recipe = TrainRecipe(train_file="demo", chat_template_kwargs=given)  # type: ignore[arg-type]
    arguments = recipe.encoding(chatml_tokenizer()).chat_template_kwargs
    assert arguments == {"enable_thinking": False, "effort": "low", "n": 3}
    assert "chat_template_kwargs:\n  enable_thinking: false\n" in recipe.to_yaml()


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(ReftuneError, match="chat_template_kwargs='thinking': write name=value"):
        TrainRecipe(train_file="demo", chat_template_kwargs="thinking")
    with pytest.raises(ReftuneError, match="chat_template_kwargs=.* has no meaning for task='classification'"):
        TrainRecipe(train_file="demo", task="classification", chat_template_kwargs="enable_thinking=false")
