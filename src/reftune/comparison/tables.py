"""The report's tables and sentences, as text: HTML and Markdown show the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reftune.comparison.recipe import CompareRecipe
from reftune.comparison.summary import LEAST_ROWS, LEAST_SEEDS, SIGNIFICANT, MethodSummary, shortage
from reftune.evaluation.side_effects import SHOWN


@dataclass(frozen=True)
class Column:
    """A column: its heading, its unit (under the heading), and a cell a method; a cell's second line is `notes`."""

    heading: str
    unit: str
    cells: list[str]
    notes: list[str]
    best: int | None = None


def result_columns(recipe: CompareRecipe, summaries: Sequence[MethodSummary]) -> list[Column]:
    """Quality and cost of each method."""
    losses = [item.loss for item in summaries]
    several = any(len(item.results) > 1 for item in summaries)
    reference = next((item for item in summaries if item.name == recipe.reference), None)
    columns = [
        Column(
            "Held-out loss", "nats a token",
            [f"{item.loss:.4f}" for item in summaries],
            [f"{item.interval.low:.3f} to {item.interval.high:.3f}" for item in summaries],
            losses.index(min(losses)),
        ),
    ]  # fmt: skip
    if several:
        columns.append(
            Column(
                "Seeds", "lowest to highest",
                [_range(item) for item in summaries],
                [f"{len(item.results)} seed{'s' * (len(item.results) != 1)}" for item in summaries],
            )
        )  # fmt: skip
    columns.append(
        Column(
            f"Against {recipe.reference}", "difference in loss",
            [_difference(item) for item in summaries],
            [_sureness(item, reference) for item in summaries],
        )
    )  # fmt: skip
    if any(item.exact_match is not None for item in summaries):
        columns.append(_plain("Exact match", "of answers", [_share(item.exact_match) for item in summaries]))
    if recipe.judge is not None:
        columns.append(_plain("Accepted", "of answers, by the judge", [_share(item.accepted) for item in summaries]))
    for norm, unit in (("acc", "sum of log-likelihoods"), ("acc_norm", "a byte")):
        if any(item.options for item in summaries):
            notes = [
                f"{item.options_interval.low:.1%} to {item.options_interval.high:.1%}"
                if norm == "acc" and item.options_interval
                else ""
                for item in summaries
            ]
            columns.append(Column("Options right", unit, [_share(item.options.get(norm)) for item in summaries], notes))
    for name, (heading, unit, form) in SHOWN.items():
        if any(name in item.side_effects for item in summaries):
            cells = [form.format(item.side_effects[name]) if name in item.side_effects else "–" for item in summaries]
            columns.append(_plain(heading, unit, [cell.replace("-", "\N{MINUS SIGN}") for cell in cells]))
    columns += [
        _plain("Parameters", "trained", [f"{item.parameters:,}" for item in summaries]),
        Column(
            "Training", "seconds",
            [f"{item.seconds:,.1f}" if item.method.trains else "–" for item in summaries],
            [f"{item.epoch_seconds:,.2f} an epoch" if item.method.trains else "" for item in summaries],
        ),
    ]  # fmt: skip
    if any(item.memory is not None for item in summaries):
        columns.append(_plain("Peak memory", "beyond the libraries", [size_text(item.memory) for item in summaries]))
    columns.append(_plain("Adapter", "on disk", [_adapter(item) for item in summaries]))
    return columns


def settings_rows(summaries: Sequence[MethodSummary]) -> list[tuple[str, str, str, str]]:
    """Name, kind, settings, and whether prefixes were reused, of each method."""
    return [
        (item.name, item.method.kind, item.method.summary() or "–", _reuse(item.results[0].prefix_reuse))
        for item in summaries
    ]


def verdict(recipe: CompareRecipe, summaries: Sequence[MethodSummary]) -> list[str]:
    """The outcome in sentences."""
    rivals = [item for item in summaries if item.method.kind != "base"]
    if not rivals:
        return ["Nothing was trained."]
    best = min(rivals, key=lambda item: item.loss)
    sentences = [f"{best.name} has the lowest held-out loss, {best.loss:.4f} nats a token."]
    reference = next((item for item in summaries if item.name == recipe.reference), None)
    if reference is None:
        return sentences
    better, like, worse = (
        f"Better than {reference.name}",
        f"Not told apart from {reference.name} on these rows",
        f"Worse than {reference.name}",
    )
    groups: dict[str, list[str]] = {better: [], like: [], worse: []}
    for item in rivals:
        if item.difference is None:
            continue
        mean, sure = item.difference.mean, item.difference.p_value < SIGNIFICANT
        by = f"by {abs(mean):.3f}, " if sure else ""
        group = like if not sure else better if mean < 0 else worse
        if few := shortage(item, reference):
            by = f"loss {abs(mean):.3f} {'lower' if mean < 0 else 'higher'}, "
            wanted = f"it takes {LEAST_ROWS} held-out rows and {LEAST_SEEDS} seeds"
            group = f"No verdict against {reference.name}: {few}; {wanted}"
        groups.setdefault(group, []).append(
            f"{item.name} ({by}{_parameters(item, reference)}{_times(item, reference)})"
        )
    return [*sentences, *(f"{words}: {'; '.join(items)}." for words, items in groups.items() if items)]


def _parameters(item: MethodSummary, reference: MethodSummary) -> str:
    if not item.parameters:
        return "nothing trained"
    if not reference.parameters:
        return f"{item.parameters:,} parameters"
    ratio = item.parameters / reference.parameters
    if 0.95 < ratio < 1.05:
        return "as many parameters"
    if ratio < 1:
        return f"1/{factor_text(1 / ratio)} of the parameters"
    return f"{factor_text(ratio)} times the parameters"


def factor_text(ratio: float) -> str:
    """A factor of at least 1 as read aloud: 1.5, 3, 13, 1,200."""
    return f"{ratio:.1f}".removesuffix(".0") if ratio < 10 else f"{ratio:,.0f}"


def _times(item: MethodSummary, reference: MethodSummary) -> str:
    if not item.seconds or not reference.seconds:
        return ""
    ratio = item.seconds / reference.seconds
    if 0.95 < ratio < 1.05:
        return ", as long"
    return f", {ratio:.2f} of the time" if ratio < 1 else f", {factor_text(ratio)} times as long"


def fairness(recipe: CompareRecipe, summaries: Sequence[MethodSummary]) -> list[str]:
    """What was the same for all methods, and how each figure was made."""
    results = [result for item in summaries if item.method.trains for result in item.results]
    orders: dict[int, set[str]] = {}
    for result in results:
        orders.setdefault(result.seed, set()).add(result.order)
    same = all(len(found) == 1 for found in orders.values())
    rows = len(summaries[0].results[0].row_tokens)
    epochs = f"{recipe.shared.epochs:g} epoch{'s' * (recipe.shared.epochs != 1)}"
    lines = [
        f"Data: {recipe.shared.train_file}; {rows} held-out rows, the same for every run, "
        f"{sum(summaries[0].results[0].row_tokens):,} supervised tokens.",
        f"Budget: {epochs} of batches of {recipe.shared.batch_size}{_accumulated(recipe)}, "
        f"{results[0].steps if results else 0:,} optimiser steps, for every method.",
        "Order: runs of one seed met the same batches in the same order (their digests are equal)."
        if same
        else "Order: NOT every run of one seed met the same batches in the same order.",
        "Loss: every method, LoRA included, was trained with the same loss: cross-entropy of the completion's tokens "
        "(and of the token that ends it), computed at those positions.",
        f"Judged by the held-out loss {'after the last epoch' if recipe.judge_by == 'final' else 'of the best epoch'}. "
        "The mean is over seeds; the interval is a 95% bootstrap over held-out rows.",
        "Differences are paired by row, on losses averaged over the seeds: their interval and p value (permutation "
        "test) speak of other rows from the same source, not of other seeds. A verdict wants "
        f"{LEAST_ROWS} held-out rows and {LEAST_SEEDS} seeds at least.",
        "Learning rates are as the recipe sets them: a method whose rate was not searched may do better with another.",
        *_prompt_lines(recipe),
        *([f"Accepted: the share of greedy answers that {recipe.judge} accepts."] if recipe.judge else []),
        *_side_effect_lines(recipe),
        "Seconds are of training alone; loading, evaluation and saving are not counted. What prefix reuse spares is in "
        "them, and its first computation too.",
    ]
    return [*lines, *_memory_line(summaries), *_reuse_lines(summaries)]


def _prompt_lines(recipe: CompareRecipe) -> list[str]:
    kinds = {method.kind for method in recipe.methods}
    lines = {
        "prompted": "An instructed base reads its instruction before every prompt, and nothing is trained; the loss is "
        "of the same tokens as every method's.",
        "few-shot": "A few-shot base reads rows of training, with their answers, before every prompt: the same for "
        "every row, others for each seed. Nothing is trained; the loss is of the same tokens as every method's.",
    }
    return [line for kind, line in lines.items() if kind in kinds]


def _side_effect_lines(recipe: CompareRecipe) -> list[str]:
    if not recipe.side_effects:
        return []
    return [
        f"Side effects on {recipe.neutral_file or 'plain questions and answers that come with reftune'}: forgetting "
        "is the rise of these answers' loss against the base, KL the mean divergence from the base at their tokens; "
        "repetition is the mean share of an answer's runs of four tokens that stood in it before, in greedy answers to "
        f"the same prompts{_refusal_words(recipe)}.",
    ]


def _refusal_words(recipe: CompareRecipe) -> str:
    return "" if recipe.refusal_file is None else f"; refusals are answers to {recipe.refusal_file} that begin like one"


def _accumulated(recipe: CompareRecipe) -> str:
    times = recipe.shared.gradient_accumulation
    return f" by {times} accumulated" if times > 1 else ""


def _memory_line(summaries: Sequence[MethodSummary]) -> list[str]:
    if all(item.memory is None for item in summaries):
        return ["Peak memory was not measured: the runs shared a process."]
    return [
        "Peak memory is the largest of the seeds: tensors on the GPU; on the CPU what the run's own process held "
        "beyond the libraries, the model included."
    ]


def _reuse_lines(summaries: Sequence[MethodSummary]) -> list[str]:
    threads = {result.threads for item in summaries for result in item.results}
    lines = [f"CPU threads a run: {', '.join(map(str, sorted(threads)))}."]
    if any(result.shared_prefixes for item in summaries for result in item.results):
        lines.append(
            "Some edits took prefixes from a store that earlier runs had filled: their seconds are less than those of "
            "a lone run."
        )
    return lines


def size_text(size: int | None) -> str:
    """Bytes as people read them, in powers of 1,024."""
    if size is None:
        return "–"
    if size < 1024:
        return f"{size} B"
    value, units = size / 1024, ["KiB", "MiB", "GiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if value >= 100 else f"{value:.1f} {units[0]}"


def p_text(p: float) -> str:
    """A p value in two digits."""
    return "0.0001" if p < 0.00015 else f"{p:.2g}"


def _p_sign(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p_text(p)}"


def _plain(heading: str, unit: str, cells: list[str]) -> Column:
    return Column(heading, unit, cells, [""] * len(cells))


def _range(item: MethodSummary) -> str:
    if len(item.results) < 2:
        return "–"
    return f"{item.seed_range.low:.3f} to {item.seed_range.high:.3f}"


def _difference(item: MethodSummary) -> str:
    return "–" if item.difference is None else f"{item.difference.mean:+.4f}".replace("-", "\N{MINUS SIGN}")


def _sureness(item: MethodSummary, reference: MethodSummary | None) -> str:
    if item.difference is None or reference is None:
        return "reference"
    word = "" if item.difference.p_value < SIGNIFICANT else "not told apart"
    return ", ".join(filter(None, [f"p {_p_sign(item.difference.p_value)}", shortage(item, reference) or word]))


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _adapter(item: MethodSummary) -> str:
    if not item.method.trains:
        return "–"
    return size_text(item.adapter_bytes) + (" (not saved)" if item.method.kind == "full" else "")


def _reuse(status: str) -> str:
    return "on" if status == "on" else "–" if status.startswith("off: not an edit") or status == "off" else status
