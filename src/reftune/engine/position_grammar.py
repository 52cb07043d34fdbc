"""How positions are written, and how many tokens they ask for; without torch, for a command line's sake.

Grammar (``parse_positions``): ``fN`` the first N prompt tokens, ``lN`` the last N, ``fA+lB`` both, ``prompt`` every
prompt token, ``generated`` every token after the prompt, ``all`` the prompt and those after it. ``+generated`` goes
with any of them: ``l1+generated`` are exactly the tokens that predict the completion. A prompt of n tokens gives
``fA+lB`` the prefix ``min(A, n // 2)`` and the suffix ``min(B, n - prefix)``; one side alone takes ``min(N, n)``. So no
token is edited twice by one edit, and no response token is ever edited by a prompt position. (ReFT paper, arXiv
2404.03592, section 3.3, with the short-prompt rule made exact; ``generated`` is ours.)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from reftune.errors import ReftuneError


@dataclass(frozen=True)
class Positions:
    """A parsed position string.

    Attributes:
        text: the string as given, normalised (``"f7+l7"``).
        prefix: number of tokens asked for at the prompt's start (0: none).
        suffix: number of tokens asked for at the prompt's end (0: none).
        prompt: every prompt token.
        generated: every token after the prompt.
    """

    text: str
    prefix: int = 0
    suffix: int = 0
    prompt: bool = False
    generated: bool = False

    @property
    def everywhere(self) -> bool:
        """Whether every token is edited, so that the prompt's end need not be known."""
        return self.prompt and self.generated

    @property
    def spares_beginning(self) -> bool:
        """Whether a prompt's beginning is never edited (but for prompts as short as the suffix)."""
        return not self.prompt and self.prefix == 0

    @property
    def has_two_ends(self) -> bool:
        """Whether there is a prefix and a suffix, which may then have an edit each (``share_weights=False``)."""
        return self.prefix > 0 and self.suffix > 0

    def counts(self, prompt_length: Any) -> tuple[Any, Any]:
        """Prefix and suffix sizes that prompts of these lengths give (the module docstring's short-prompt rule).

        Args:
            prompt_length: a tensor of integers, of any shape; both results have it too.
        """
        prefix = (prompt_length // 2 if self.has_two_ends else prompt_length).clamp(max=self.prefix)
        suffix = (prompt_length - prefix).clamp(max=self.suffix)
        return prefix, suffix

    def ordinals(self, prompt_length: int, total: int | None = None) -> set[int]:
        """The edited ordinals of one row of ``total`` attended tokens, for display and for tests."""
        import torch

        total = prompt_length if total is None else total
        after = set(range(prompt_length, total)) if self.generated else set()
        if self.prompt:
            return set(range(prompt_length)) | after
        prefix, suffix = (int(count) for count in self.counts(torch.tensor(prompt_length)))
        return set(range(prefix)) | set(range(prompt_length - suffix, prompt_length)) | after


_GRAMMAR = re.compile(
    r"(?:(?P<prompt>prompt)|(?:f(?P<prefix>0*[1-9]\d*))?(?:(?:^|(?<=\d)\+)l(?P<suffix>0*[1-9]\d*))?)"
    r"(?P<generated>(?:^|(?<=.)\+)generated)?"
)


def parse_positions(text: str) -> Positions:
    """Read a position string.

    Args:
        text: ``"fN"``, ``"lN"``, ``"fA+lB"``, ``"prompt"``, ``"generated"``, one of these ``"+generated"``, or
            ``"all"``; spaces, capitals do not matter.

    Raises:
        ReftuneError: the string does not parse, or asks for zero tokens.
    """
    if isinstance(text, Positions):
        return text
    compact = re.sub(r"\s+", "", str(text)).lower()
    if compact in ("all", "prompt+generated"):
        return Positions("all", prompt=True, generated=True)
    match = _GRAMMAR.fullmatch(compact)
    if not compact or not match:
        raise ReftuneError(
            f"positions={text!r} does not parse. Write fN (the first N prompt tokens), lN (the last N), fA+lB (both), "
            "prompt (every prompt token), generated (those after it), any of these +generated, or all; for example "
            "'l1', 'f7+l7' or 'l1+generated'."
        )
    if any(len(match[name] or "") > 9 for name in ("prefix", "suffix")):
        raise ReftuneError(f"positions={text!r}: no prompt has so many tokens; write all, or a smaller number.")
    prefix, suffix = int(match["prefix"] or 0), int(match["suffix"] or 0)
    return Positions(compact, prefix, suffix, bool(match["prompt"]), bool(match["generated"]))
