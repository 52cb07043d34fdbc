"""Expressions over adapters: the grammar, and models that are told by it."""

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model

import reftune
from reftune.adapter.expression import parse_expression
from reftune.errors import ReftuneError
from reftune.serving.engine import EmbeddedEngine
from tests.serving.answers import CONFIGS, NEW, generated, save_all, text
from tests.tiny_models import CAUSAL, tiny_inputs


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("pirate", [("pirate", 1.0)]),
        ("0.5*pirate + 0.3*formal - terse", [("pirate", 0.5), ("formal", 0.3), ("terse", -1.0)]),
        ("-my-pirate-v2", [("my-pirate-v2", -1.0)]),
        ("- 2 * a  +  .5*b", [("a", -2.0), ("b", 0.5)]),
        ("  a - -.5e-1*b  ", [("a", 1.0), ("b", 0.05)]),
        ("2*dir/my poet + ./other", [("dir/my poet", 2.0), ("./other", 1.0)]),
        ("3.", [("3.", 1.0)]),
    ],
)
def test_terms_and_strengths(text: str, terms: list[tuple[str, float]]) -> None:
    assert parse_expression(text) == terms


@pytest.mark.parametrize(
    ("text", "at", "words"),
    [
        ("", 1, "no term"), (" ", 2, "no term"), ("+", 1, "no term"), ("2*", 1, "no term"), ("*a", 1, "no finite"),
        ("a + ", 5, "no term"), ("a -", 4, "no term"), ("a + + ", 5, "no term"), ("2*3*a", 1, "no term"), ("a * b", 1, "'a' of 'b'"),
        ("a - nan*b", 5, "'nan'"), ("inf*a", 1, "'inf'"), ("1" * 400 + "*a", 1, "no finite"), ("1_0*a", 1, "'1_0'"),
        ("b + 1e999*a", 5, "no finite"), ("a + 0.5*a", 9, "'a' stands here for the second time"),
        ("a - 2*nobody", 7, "no adapter 'nobody'; there are 'a', 'b'"),
    ],
)  # fmt: skip
def test_what_is_no_expression_names_its_character(text: str, at: int, words: str) -> None:
    with pytest.raises(ReftuneError, match=rf"adapter expression .*, character {at}: .*{words}"):
        parse_expression(text, ["a", "b"])


def test_a_seventeenth_adapter_is_one_too_many() -> None:
    names = [f"n{number}" for number in range(17)]
    assert len(parse_expression(" + ".join(names[:16]))) == 16
    with pytest.raises(ReftuneError, match="character 87: more than 16"):
        parse_expression(" + ".join(names))


@given(st.text(alphabet="ab.*+- 01e/", max_size=14))
def test_any_text_is_an_expression_or_one_error(text: str) -> None:
    try:
        terms = parse_expression(text)
    except ReftuneError as error:
        assert "adapter expression" in str(error)
        return
    names = [name for name, _ in terms]
    assert terms and len(set(names)) == len(names) and all(math.isfinite(weight) for _, weight in terms)
    again = " + ".join(f"{weight!r}*{name}" for name, weight in terms)
    assert parse_expression(again) == terms


@given(
    st.dictionaries(
        st.from_regex(r"[a-z][a-z0-9._-]{0,9}", fullmatch=True), st.integers(-99, 99), min_size=1, max_size=8
    )
)
def test_what_is_written_is_read(terms: dict[str, int]) -> None:
    text = " + ".join(f"{weight}*{name}" for name, weight in terms.items())
    assert parse_expression(text) == [(name, float(weight)) for name, weight in terms.items()]


def two_adapters(positions: str = "l1+generated") -> Any:
    """Adapters a and b of other ranks, layers and methods, both moved off their start."""
    config = {"init": "paper", "positions": positions, "task_type": "CAUSAL_LM"}
    first = reftune.ReftConfig(r=2, layers_to_transform=[0, 1], **config)  # type: ignore[arg-type]
    model: Any = get_peft_model(CAUSAL["llama"](), first, "a")
    model.add_adapter("b", reftune.ReftConfig(r=3, method="direft", layers_to_transform=[1, 2], **config))  # type: ignore[arg-type]
    return model.eval()


def hidden(model: Any) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return model(**tiny_inputs("llama"), output_hidden_states=True).hidden_states


def test_a_mixture_edits_one_after_the_other_and_leaves_the_model_as_it_was() -> None:
    model = two_adapters()
    model.base_model.set_scale("b", 3.0)
    before, trained = hidden(model), {name: p.requires_grad for name, p in model.named_parameters()}
    a, b = (model.base_model.engine.edits(name) for name in "ab")

    def one(edit: Any, h: torch.Tensor, weight: float) -> torch.Tensor:
        return h + weight * edit.delta(h)

    with reftune.mixture(model, "0.5*b - a"), model.disable_adapter():
        base = hidden(model)
    with reftune.mixture(model, "0.5*b - a"):
        mixed = hidden(model)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    expected = one(a["model.layers.0"], base[1][:, -1], -1.0)
    torch.testing.assert_close(mixed[1][:, -1], expected, rtol=1e-4, atol=1e-5)
    handles = []

    def by_hand(layer: int) -> Any:
        path = f"model.layers.{layer}"

        def hook(_module: Any, _args: Any, output: Any) -> Any:
            h = (output[0] if isinstance(output, tuple) else output).clone()
            for edits, weight in ((b, 1.5), (a, -1.0)):  # b twice: its own scale times the expression's
                if path in edits:
                    h[:, -1] = one(edits[path], h[:, -1], weight)
            return (h, *output[1:]) if isinstance(output, tuple) else h

        return hook

    with model.disable_adapter():
        for layer in range(3):
            handles.append(
                model.get_submodule(f"base_model.model.model.layers.{layer}").register_forward_hook(by_hand(layer))
            )
        wanted = hidden(model)[-1]
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(mixed[-1], wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted, before[-1], atol=1e-3)
    assert all(map(torch.equal, hidden(model), before)) and model.active_adapter == "a"
    with pytest.raises(ZeroDivisionError), reftune.mixture(model, "b"):
        raise ZeroDivisionError
    assert all(map(torch.equal, hidden(model), before))


def test_what_a_model_cannot_mix_is_refused_and_changes_nothing() -> None:
    model = two_adapters()
    before = hidden(model)
    for expression, words in (("a + nobody", "character 5: there is no adapter 'nobody'"), ("a + a", "second time")):
        with pytest.raises(ReftuneError, match=words), reftune.mixture(model, expression):
            pass
    with pytest.raises(ReftuneError, match="no ReFT adapters"), reftune.mixture(CAUSAL["llama"](), "a"):
        pass
    model.add_adapter("head", reftune.ReftConfig(layers_to_transform=[0], modules_to_save=["lm_head"]))
    with pytest.raises(ReftuneError, match="'head' replaces weights"), reftune.mixture(model, "a + head"):
        pass
    assert all(map(torch.equal, hidden(model), before))


def test_attached_edits_mix_by_their_names() -> None:
    model = CAUSAL["llama"]().eval()
    plain = hidden(model)
    for name in ("one", "two"):
        reftune.attach(model, method="lobireft", r=1, layers_to_transform=[2], positions="all", init="paper", name=name)
    both = hidden(model)
    with reftune.mixture(model, "one - 2*two"):
        mixed = hidden(model)
    with reftune.mixture(model, "0*one"):
        torch.testing.assert_close(hidden(model)[-1], plain[-1])
    with reftune.mixture(model, "one + two"):
        torch.testing.assert_close(hidden(model)[-1], both[-1])
    assert not torch.allclose(mixed[-1], both[-1])


def test_answers_are_the_servers_to_the_same_expression(tmp_path: Path) -> None:
    llama = CAUSAL["llama"]()
    llama.generation_config.eos_token_id = None
    configs = {"last": CONFIGS["last at all layers"], "answer": CONFIGS["answer"], "ends": CONFIGS["ends"]}
    folders = save_all(llama, tmp_path, configs)
    prompts = [tuple(text()[:length]) for length in (2, 9, 21)]
    terms = parse_expression("0.5*last - 1.5*answer + 0.25*ends")
    model: Any = PeftModel.from_pretrained(llama, str(folders["last"]), adapter_name="last").eval()
    for name in ("answer", "ends"):
        model.load_adapter(str(folders[name]), adapter_name=name)
    with reftune.mixture(model.eval(), "0.5*last - 1.5*answer + 0.25*ends"):
        mixed = [generated(model, prompt) for prompt in prompts]
    plain = [generated(model, prompt) for prompt in prompts]
    model.unload()

    async def served(engine: EmbeddedEngine) -> list[list[int]]:
        found = []
        for prompt in prompts:
            adapters = [(folders[name], weight) for name, weight in terms]
            async with await engine.submit(list(prompt), adapters=adapters, max_new_tokens=NEW) as stream:
                found.append([token.id async for tokens, _ in stream for token in tokens])
        return found

    with EmbeddedEngine(llama, None, page_tokens=8) as engine:
        assert asyncio.run(served(engine)) == mixed
    assert mixed != plain
