from hypothesis import given
from hypothesis import strategies as st

from reftune.serving.api.writing import Choice
from reftune.serving.requests import Token
from tests.cli.tiny_folder import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def write(text: bytes, stops: list[str], sizes: list[int]) -> tuple[str, Choice]:
    ids = [TOKENIZER.convert_tokens_to_ids(symbol) for symbol in symbols(text)]
    choice, sent = Choice(0, TOKENIZER, stops), ""
    while ids and choice.finish is None:
        size = sizes[len(sent) % len(sizes)] if sizes else 1
        part, ids = ids[:size], ids[size:]
        sent += choice.take([Token(int(token)) for token in part], None if ids else "length").text  # type: ignore[arg-type]
    return sent, choice


def symbols(text: bytes) -> str:
    from tokenizers.pre_tokenizers import ByteLevel

    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = {byte: chr(byte) for byte in kept}
    for number, byte in enumerate(byte for byte in range(256) if byte not in names):
        names[byte] = chr(256 + number)
    assert set(names.values()) == set(ByteLevel.alphabet())
    return "".join(names[byte] for byte in text)


@given(st.text(max_size=30), st.lists(st.integers(1, 5), max_size=3))
def test_pieces_of_any_size_join_to_the_text(text: str, sizes: list[int]) -> None:
    sent, choice = write(text.encode(), [], sizes)
    assert sent == choice.text == text


@given(st.text("abx", max_size=30), st.lists(st.text("abx", min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_text_ends_before_the_first_stop_string_and_nothing_behind_is_ever_sent(
    text: str, stops: list[str]
) -> None:
    sent, choice = write(text.encode(), stops, [1])
    ends = [len(text[:end]) for end in range(len(text) + 1) if any(stop in text[:end] for stop in stops)]
    if ends:
        seen = text[: ends[0]]
        wanted = seen[: min(seen.find(stop) for stop in stops if stop in seen)]
        assert choice.finish == "stop" and sent == wanted
    else:
        assert sent == text


def test_bytes_of_a_character_that_was_never_finished_are_told() -> None:
    sent, _ = write("né".encode()[:2], [], [1])
    assert sent == "n\N{REPLACEMENT CHARACTER}"


def test_a_token_that_closes_turns_ends_the_answer() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("yes<|im_start|>no").input_ids
    choice = Choice(0, tokenizer, ends=[tokenizer.convert_tokens_to_ids("<|im_start|>")])  # type: ignore[list-item]
    piece = choice.take([Token(token) for token in ids], None)
    assert (piece.text, piece.finish) == ("yes", "stop")
