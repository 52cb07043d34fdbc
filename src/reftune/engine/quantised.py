"""bitsandbytes' 4-bit layers on a CPU, kept the function that is trained."""

from __future__ import annotations

from torch import nn

from reftune.errors import ReftuneError

_PACKS = "support_avx512bf16_for_cpu"


class Unpacked:
    """From now on 4-bit layers compute in evaluation what they compute in training; **changes the model**.

    On CPUs with AVX512-BF16, the first forward in evaluation mode packs a layer's weights for a faster kernel. That one
    rounds to bfloat16 and has no gradient: a training that went on behind an evaluation would learn from a part of its
    gradient, without a word. What is packed cannot be unpacked (bitsandbytes 0.50 mixes up the scales).

    Args:
        model: any model; one without such layers is left as it is.
    """

    def __init__(self, model: nn.Module):
        self._layers = [module for module in model.modules() if getattr(module, _PACKS, False)]
        for layer in self._layers:
            setattr(layer, _PACKS, False)

    def remove(self) -> None:
        """Let the layers pack their weights again; **changes the model** back."""
        for layer in self._layers:
            setattr(layer, _PACKS, True)


def check_unpacked(model: nn.Module) -> None:
    """Refuse a base whose 4-bit layers are packed already.

    Raises:
        ReftuneError: names one.
    """
    for name, module in model.named_modules():
        if getattr(getattr(getattr(module, "weight", None), "quant_state", None), "packing_format_for_cpu", False):
            raise ReftuneError(
                f"{name} and its like were packed for inference when this 4-bit base was first run (bitsandbytes, on "
                "this CPU), and nothing can be trained through them: load the base again and give it the edits before "
                "it is run, or load it with reftune.models.load(..., quantization='4bit'), which leaves them unpacked."
            )
