"""The page of architectures is made of the models that the tests edit: `python -m tests.test_architectures_page` writes it."""

from __future__ import annotations

from tests.docs_blocks import ROOT
from tests.tiny_models import CAUSAL, ENCODER_DECODERS, ENCODERS, VISION, VISION_LANGUAGE

PAGE = ROOT / "docs" / "reference" / "architectures.md"
KINDS = {
    "decoder": CAUSAL, "encoder": ENCODERS, "encoder and decoder": ENCODER_DECODERS, "vision": VISION,
    "vision and language": VISION_LANGUAGE,
}  # fmt: skip
HEAD = """# Architectures that are tested

Each of these is built small, with random weights, by the tests, which check that an edit changes the named tokens and no
others, and that taking it off gives back what was there. Others work where a model is a
stack of blocks ([where edits go](../concepts/sites.md)); these are the ones that are known to.

| kind | `model_type` | class of transformers |
|---|---|---|
"""


def page() -> str:
    lines = {
        (order, f"| {kind} | `{model.config.model_type}` | `{type(model).__name__}` |")
        for order, (kind, group) in enumerate(KINDS.items())
        for model in (make() for make in group.values())
    }
    return HEAD + "\n".join(line for _, line in sorted(lines)) + "\n"


def test_the_page_names_the_models_that_are_tested() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.test_architectures_page"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
