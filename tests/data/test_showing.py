import io

from rich.console import Console
from transformers import PreTrainedTokenizerFast

from reftune.data.formats import Example, LabelledText, Message
from reftune.data.showing import show_examples
from reftune.data.tokenising import encode_dataset


def _print(rows: list, tokenizer: PreTrainedTokenizerFast, n: int, colour: bool = False) -> str:
    console = Console(file=io.StringIO(), width=120, force_terminal=colour, color_system="standard" if colour else None)
    show_examples(encode_dataset(rows, tokenizer), tokenizer, lambda prompt, total: {prompt - 1}, n, console)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def _rows(prompt: str, completion: str) -> list[Example]:
    return [Example((Message("user", prompt),), completion)]


def test_edited_and_learnt_tokens_can_be_told_apart_without_colour(chatml: PreTrainedTokenizerFast) -> None:
    shown = _print(_rows("hello [bold]", "world"), chatml, 1)
    assert "<|im_start|>user" in shown and "hello [bold]" in shown
    assert shown.count("⟦") == 2  # the last prompt token and the legend
    assert "⟦↵" in shown
    completion = next(line for line in shown.splitlines() if "completion (" in line)
    assert "world<|im_end|>" in completion
    assert "1 edited" in shown and "edited token" in shown and "learnt token" in shown


def test_colour_marks_both_too(chatml: PreTrainedTokenizerFast) -> None:
    shown = _print(_rows("hello", "world"), chatml, 1, colour=True)
    completion = next(line for line in shown.splitlines() if "completion (" in line)
    assert "\x1b[32m" in completion and "\x1b[7m" not in completion
    assert "\x1b[7m⟦" in shown


def test_characters_of_several_tokens_are_shown_whole(chatml: PreTrainedTokenizerFast) -> None:
    shown = _print(_rows("おはよう", "素敵な朝"), chatml, 1)
    assert "おはよう" in shown and "素敵な朝" in shown and "\ufffd" not in shown


def test_no_more_rows_are_shown_than_exist_and_labels_are_named(chatml: PreTrainedTokenizerFast) -> None:
    assert _print(_rows("hello", "world") * 3, chatml, 2).count("completion (") == 2
    assert _print(_rows("hello", "world"), chatml, 9).count("completion (") == 1
    assert "label" in _print([LabelledText("hello", 1)], chatml, 1)
