"""What `steer` found, as a picture and as the adapter's card."""

from __future__ import annotations

import math
from operator import itemgetter
from pathlib import Path
from typing import Any

from reftune.models import public_name
from reftune.output.documents import markdown_table
from reftune.output.pictures import new_figure, save_figure

PICTURE_FILE, CARD_FILE = "steer.png", "README.md"


def draw(found: dict[str, Any], path: Path) -> None:
    """How well each layer tells the sides apart, and the held-out loss by layer and strength; **replaces the file**.

    Of a file of vectors nothing is known that could be drawn.
    """
    if not found["by layer"]:
        return
    if found["tried"]:
        figure, (left, right) = new_figure((8.5, 3.4), panels=2)
        figure.colorbar(_draw_tried(found["tried"], right), ax=right)
    else:
        figure, left = new_figure((5, 3.4))
    _draw_layers(found, left)
    save_figure(figure, path)


def _draw_layers(found: dict[str, Any], axes: Any) -> None:
    layers = found["by layer"]
    colours = ["#b45309" if item["layer"] in found["layers"] else "#94a3b8" for item in layers]
    axes.bar([item["layer"] for item in layers], [item["deviations"] for item in layers], color=colours, width=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="layer (brown: edited)", ylabel="distance of the held-out sides,\nstandard deviations")


def _draw_tried(tried: list[dict[str, float]], axes: Any) -> Any:
    rows, columns = (
        {item[name]: None for item in sorted(tried, key=itemgetter(name))} for name in ("layer", "strength")
    )
    losses = {(item["layer"], item["strength"]): item["loss"] for item in tried}
    values = [[losses.get((row, column), math.nan) for column in columns] for row in rows]
    image = axes.imshow(values, aspect="auto", origin="lower", cmap="viridis_r")
    axes.set_xticks(range(len(columns)), [f"{value:g}" for value in columns])
    axes.set_yticks(range(len(rows)), [f"{value:.0f}" for value in rows])
    axes.set(xlabel="strength", ylabel="layer", title="held-out loss, nats a token (blank: not tried)")
    middle = (min(losses.values()) + max(losses.values())) / 2
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            if (loss := losses.get((row, column))) is not None:
                ink = "white" if loss > middle else "#1f2937"
                axes.text(x, y, f"{loss:.2f}", ha="center", va="center", fontsize=7, color=ink)
    axes.title.set_fontsize(9)
    return image


def lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What was found, as rows of a table: a name and a value with its unit."""
    before, after, settings = found["held-out loss, base"], found["held-out loss, steered"], found["settings"]
    apart = ", ".join(f"{value:.2f}" for value in _separations(found).values())
    told = [
        ("direction of", found["from"]),
        ("edit", f"{found['method']}, rank {settings['rank']}, at {settings['positions']}"),
        ("layers", ", ".join(map(str, found["layers"]))),
    ]
    if apart:
        told.append(("separation", f"{apart} (1: all held-out rows told apart; 0.5: by luck)"))
    if not settings["remove"]:
        told.append(("strength", f"{found['strength']:.3g} times the distance of the two sides"))
    for side in before:
        told.append((f"held-out loss, {side}", f"{before[side]:.3f} to {after[side]:.3f} nats a token"))
    if (ratio := found["log-likelihood ratio, nats a token"]) is not None:
        told.append(("gain of positive on negative", f"{ratio:.3f} nats a token"))
    for gate in found["gates"]:
        told.append(
            (
                f"gate of layer {gate['layer']:.0f}",
                f"tells {gate['held-out accuracy']:.0%} of held-out tokens apart (50%: by luck); open on "
                f"{gate['neutral tokens']:.0%} of neutral tokens, in {gate['neutral prompts']:.0%} of neutral prompts",
            )
        )
    told.append(("KL from the base", _divergence(found)))
    if (behind := found["kl behind the gate, nats a token"]) is not None:
        told.append(("KL behind the gate", f"{behind:.3f} nats a token (all else is measured with the gate open)"))
    if "accepted, base" in found:
        before_share, after_share = found["accepted, base"], found["accepted, steered"]
        count = found["judged answers"]
        told.append(("accepted by the judge", f"{before_share:.1%} to {after_share:.1%} of {count} greedy answers"))
    neutral = found["neutral loss, base"], found["neutral loss, steered"]
    return [*told, ("loss on neutral text", f"{neutral[0]:.3f} to {neutral[1]:.3f} nats a token")]


def _divergence(found: dict[str, Any]) -> str:
    """The divergence, what of it may be by chance, and how well a strength holds on rows that did not find it."""
    error, asked, kl = found["standard error of kl"], found["settings"]["kl"], f"{found['kl, nats a token']:.3g}"
    if error is None:
        return f"{kl} nats a token, of one neutral answer" + ("" if asked is None else f" (asked: {asked:g})")
    said = f"{kl} \N{PLUS-MINUS SIGN} {error:.2g} nats a token, mean and standard error of "
    said += f"{found['neutral rows']} neutral answers"
    if asked is None:
        return said
    halves = ", ".join(f"{kl:.3g}" for kl in found["kl of each half at the other's strength"])
    return f"{said} (asked: {asked:g}; each half of them at the strength found on the other: {halves})"


def warnings(found: dict[str, Any]) -> list[str]:
    """What should not be overlooked."""
    said = []
    weak = [layer for layer, value in _separations(found).items() if value < 0.7]
    if weak:
        said.append(
            f"Layer {', '.join(map(str, weak))} hardly tells the held-out sides apart: this direction may be noise. "
            "Give more rows, or rows that differ in nothing else."
        )
    if dull := [f"{gate['layer']:.0f}" for gate in found["gates"] if gate["held-out accuracy"] < 0.7]:
        said.append(
            f"Layer {', '.join(dull)}: the gate hardly tells where to act from where not to. Give more prompts, or "
            "another layer (--layers)."
        )
    before, after = found["held-out loss, base"], found["held-out loss, steered"]
    side = "positive" if found["strength"] > 0 and not found["settings"]["remove"] else "negative"
    if before and after[side] >= before[side]:
        said.append(f"The edit makes the held-out {side} answers no likelier: a trained edit may (reftune train).")
    return said


def card(found: dict[str, Any], model: str) -> str:
    """The adapter folder's README."""
    head = f"---\nlibrary_name: peft\nbase_model: {public_name(model)}\ntags:\n- reft\n- reftune\n- steering\n---\n"
    table = markdown_table(["", ""], [[name, value] for name, value in lines(found)])
    use = [
        "from peft import PeftModel", "import reftune", "",
        f'base, tokenizer = reftune.models.load("{model}")', 'model = PeftModel.from_pretrained(base, "FOLDER")',
    ]  # fmt: skip
    picture = f"![Layers and strengths]({PICTURE_FILE})\n\n" if found["by layer"] else ""
    code = "\n".join(["```python", *use, "```"])
    return f"{head}\n# A steering direction\n\n{table}\n\n{picture}{code}\n"


def _separations(found: dict[str, Any]) -> dict[int, float]:
    """How well each edited layer tells the held-out sides apart; nothing of a file of vectors."""
    known = {int(item["layer"]): item["separation"] for item in found["by layer"]}
    return {layer: known[layer] for layer in found["layers"] if layer in known}
