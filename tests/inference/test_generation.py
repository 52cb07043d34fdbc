from __future__ import annotations

import pytest
import torch

from reftune.errors import ReftuneError
from reftune.inference.generation import GenerationSettings, generate_answers, left_padded, stop_tokens
from reftune.inference.loading import EditedModel
from tests.inference.edited import tiny_edited

PROMPTS = ["hi", "a much longer prompt than the first one", "who?", "x"]
SETTINGS = GenerationSettings(max_new_tokens=8, batch_size=3)


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> EditedModel:
    return tiny_edited(tmp_path_factory.mktemp("model"))


def test_a_batch_answers_as_each_prompt_alone(edited: EditedModel) -> None:
    together = list(generate_answers(edited, PROMPTS, SETTINGS))
    alone = [next(generate_answers(edited, [prompt], SETTINGS)) for prompt in PROMPTS]
    assert together == alone


def test_the_edit_changes_answers_and_base_takes_it_away(edited: EditedModel) -> None:
    with_edit = [answer.text for answer in generate_answers(edited, PROMPTS, SETTINGS)]
    without = [answer.text for answer in generate_answers(edited, PROMPTS, SETTINGS, base=True)]
    assert with_edit != without
    prompt = torch.tensor([edited.encoding.prompt_ids(["hi"])[0]])
    with edited.model.disable_adapter():
        plain = edited.model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False)
    text = edited.tokenizer.decode(plain[0, prompt.shape[1] :], skip_special_tokens=True)
    assert without[0] == str(text).strip()


def test_sampling_depends_on_the_seed_alone(edited: EditedModel) -> None:
    def sampled(seed: int) -> list[str]:
        settings = GenerationSettings(max_new_tokens=8, temperature=1.5, seed=seed)
        return [answer.text for answer in generate_answers(edited, PROMPTS, settings)]

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_an_answer_ends_at_the_token_that_closed_completions(edited: EditedModel) -> None:
    end = edited.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in stop_tokens(edited)
    head = edited.model.get_output_embeddings()
    answer = next(generate_answers(edited, ["hi"], SETTINGS))
    assert answer.hit_limit and answer.tokens == 8
    with torch.no_grad():
        kept = head.weight[end].clone()
        hidden = edited.model(
            torch.tensor(edited.encoding.prompt_ids(["hi"])), output_hidden_states=True
        ).hidden_states[-1][0, -1]
        head.weight[end] = hidden * 100  # now the likeliest token
        ended = next(generate_answers(edited, ["hi"], SETTINGS))
        head.weight[end] = kept
    assert ended.text == "" and ended.tokens == 0 and not ended.hit_limit


def test_a_prompt_without_room_is_refused_before_anything_is_generated(edited: EditedModel) -> None:
    with pytest.raises(ReftuneError, match=r"prompt 2 of 2 has \d+ tokens.*256"):
        generate_answers(edited, ["hi", "word " * 60], SETTINGS)


def test_padding_stands_on_the_left() -> None:
    batch = left_padded([[5], [6, 7, 8]], 0, "cpu")
    assert batch["input_ids"].tolist() == [[0, 0, 5], [6, 7, 8]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize("name", ["max_new_tokens", "batch_size", "temperature", "top_p", "repetition_penalty"])
def test_settings_out_of_range_are_refused(name: str) -> None:
    value = -1 if name in ("max_new_tokens", "batch_size") else -1.0
    with pytest.raises(ReftuneError, match=name):
        GenerationSettings(**{name: value})  # type: ignore[arg-type]
