"""Print tokenised examples: which tokens are edited and which are learnt."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

Intervened = Callable[[int, int], set[int]]
"""From a row's prompt length and its length in tokens to the indices of the tokens that are edited."""

_EDITED, _LEARNT = "reverse", "green"
_OPEN, _CLOSE = "\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}", "\N{MATHEMATICAL RIGHT WHITE SQUARE BRACKET}"


def show_examples(
    dataset: Any, tokenizer: PreTrainedTokenizerBase, intervened: Intervened, n: int, console: Console
) -> None:
    """Print the first `n` rows of an encoded dataset to `console`.

    Edited tokens are in reverse video and in white brackets, supervised ones green and on a line of their own, so that
    both can be told apart without colour.

    Args:
        dataset: rows of `encode_dataset`.
        tokenizer: turns ids back into text.
        intervened: which tokens are edited, given (prompt length, length of the row).
        n: how many rows to print; fewer where the dataset is shorter.
        console: where to print.
    """
    for index in range(min(n, len(dataset))):
        row = dataset[index]
        console.print(_table(index, row, tokenizer, intervened))
    legend = Text("legend: ")
    legend.append(f"{_OPEN}edited token{_CLOSE}", _EDITED).append("  ").append("learnt token", _LEARNT)
    console.print(legend)


def _table(index: int, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, intervened: Intervened) -> Table:
    ids, end = list(row["input_ids"]), int(row["prompt_length"])
    edited = intervened(end, len(ids))
    table = Table(
        title=f"example {index + 1}: {len(ids)} tokens, {len(edited)} edited", title_justify="left", show_header=False
    )
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(f"prompt ({end})", _marked(ids, range(end), tokenizer, edited, ""))
    if isinstance(row["labels"], Sequence):
        table.add_row(f"completion ({len(ids) - end})", _marked(ids, range(end, len(ids)), tokenizer, edited, _LEARNT))
    else:
        table.add_row("label", Text(str(row["labels"]), _LEARNT))
    return table


def _marked(ids: list[int], span: range, tokenizer: PreTrainedTokenizerBase, edited: set[int], style: str) -> Text:
    text, pending = Text(), []
    for index in span:
        pending.append(index)
        piece = str(tokenizer.decode([ids[i] for i in pending], clean_up_tokenization_spaces=False))
        # A character may take several tokens: they are shown together once it is whole.
        if piece.endswith("\N{REPLACEMENT CHARACTER}") and index + 1 < span.stop and len(pending) < 8:
            continue
        touched = any(i in edited for i in pending)
        shown = piece.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n")
        text.append(f"{_OPEN}{shown}{_CLOSE}" if touched else shown, f"{style} {_EDITED}".strip() if touched else style)
        pending = []
    return text
