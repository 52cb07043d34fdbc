import pytest
from hypothesis import given
from hypothesis import strategies as st

from reftune.errors import ReftuneError
from reftune.serving.expression import parse_expression


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("pirate", [("pirate", 1.0)]),
        ("0.5*pirate + 0.3*formal - terse", [("pirate", 0.5), ("formal", 0.3), ("terse", -1.0)]),
        ("-my-pirate-v2", [("my-pirate-v2", -1.0)]),
        ("- 2 * a  +  .5*b", [("a", -2.0), ("b", 0.5)]),
        ("a + a - 0.5*a", [("a", 1.5)]),
        ("3.", [("3.", 1.0)]),
    ],
)
def test_terms_and_strengths(text: str, terms: list[tuple[str, float]]) -> None:
    assert parse_expression(text) == terms


@pytest.mark.parametrize("text", ["", " ", "a + ", "+", "2*", "*a", "a * b", "2*3*a", "1" * 400 + "*a", "a + + "])
def test_what_is_no_expression(text: str) -> None:
    with pytest.raises(ReftuneError, match="adapter expression"):
        parse_expression(text)


@given(
    st.dictionaries(
        st.from_regex(r"[a-z][a-z0-9._-]{0,9}", fullmatch=True), st.integers(-99, 99), min_size=1, max_size=8
    )
)
def test_what_is_written_is_read(terms: dict[str, int]) -> None:
    text = " + ".join(f"{weight}*{name}" for name, weight in terms.items())
    assert parse_expression(text) == [(name, float(weight)) for name, weight in terms.items()]
