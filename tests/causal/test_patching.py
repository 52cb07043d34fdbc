import subprocess
import sys
from typing import Any

import networkx as nx
import pytest
import torch
from PIL import Image

from reftune.causal.attribution import agreement, attribution_patch
from reftune.causal.heat_map import HeatMap, plot_heat_map
from reftune.causal.interchange import Run, noise, run, swap
from reftune.causal.locations import Location
from reftune.causal.models import hierarchical_equality, natural_logic
from reftune.causal.patching import logit_difference, patch, patch_heads, probability
from reftune.causal.plots import plot_graph, plot_lines
from reftune.causal.sweep import sweep
from reftune.causal.tracing import trace
from reftune.errors import ReftuneError
from tests.tiny_models import TINY


def ids(seed: int, batch: int = 2, length: int = 6) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {"input_ids": torch.randint(3, 96, (batch, length))}


METRIC = logit_difference([5, 9], [7, 11])
COMPONENTS = ["block_output", "mlp_output", "attention_output", "block_input", "query_output", "head_output[1]"]


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt", "gpt_oss"])
def test_a_sweep_gives_what_each_cell_gives_by_itself(name, component):
    model, base, source = TINY[name]().eval(), ids(1), ids(2)
    found = patch(model, base, source, METRIC, component=component, positions=[1, [0, 4]], relative=False, rows=5)
    with torch.no_grad():
        for row, layer in enumerate(found.rows):
            for column, place in enumerate((1, [0, 4])):
                alone = run(model, Run(base, (swap(Location(component, int(layer), place), source),))).logits
                torch.testing.assert_close(found.per_row[row, column], METRIC(alone), atol=2e-5, rtol=1e-4)


def test_layers_below_are_not_computed_again_and_the_model_is_as_before():
    model, base, source = TINY["llama"]().eval(), ids(1), ids(2)
    calls = [0, 0, 0]
    for index, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda *_, i=index: calls.__setitem__(i, calls[i] + 1))
    patch(model, base, source, METRIC, layers=[1], relative=False)
    # The source and the recording end after layer 1; the cells of layer 1 all run together, in layer 2 alone.
    assert calls == [2, 2, 1]
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_base_with_interventions_keeps_them_in_every_cell():
    model, base, source = TINY["llama"]().eval(), ids(1), ids(2)
    own = (swap(Location("block_output", 0, 2), ids(3)), swap(Location("mlp_output", 2, 1), ids(4)))
    found = patch(model, Run(base, own), source, METRIC, positions=[3], relative=False)
    with torch.no_grad():
        for layer in range(3):
            both = (*own, swap(Location("block_output", layer, 3), source))
            alone = METRIC(run(model, Run(base, both)).logits)
            torch.testing.assert_close(found.per_row[layer, 0], alone, atol=1e-5, rtol=1e-5)


def test_relative_values_are_one_where_everything_comes_from_the_source():
    model, base, source = TINY["gpt2"]().eval(), ids(1), ids(2)
    found = patch(model, base, source, METRIC, positions=[list(range(6)), 0])
    torch.testing.assert_close(found.values[:, 0], torch.ones(3), atol=1e-4, rtol=1e-4)
    last = patch(model, base, source, METRIC, layers=[-1], positions=[-1, 0])
    torch.testing.assert_close(last.values, torch.tensor([[1.0, 0.0]]), atol=1e-4, rtol=1e-4)
    assert last.best() == ("2", "-1", pytest.approx(1.0, abs=1e-4))


def test_a_window_puts_in_neighbouring_layers():
    model, base, source = TINY["llama"]().eval(), ids(1), ids(2)
    found = patch(model, base, source, METRIC, component="mlp_output", positions=[-1], window=3, relative=False)
    assert torch.equal(found.values[0], found.values[1]) and torch.equal(found.values[1], found.values[2])
    with pytest.raises(ReftuneError, match="window=0"):
        patch(model, base, source, METRIC, window=0)


def test_heads_are_mapped_by_layer_and_number():
    model, base, source = TINY["llama"]().eval(), ids(1), ids(2)
    found = patch_heads(model, base, source, METRIC, layers=[1, 2], position=-1, relative=False)
    assert found.values.shape == (2, 4)
    with torch.no_grad():
        alone = run(model, Run(base, (swap(Location("head_output[3]", 2, -1), source),))).logits
    torch.testing.assert_close(found.per_row[1, 3], METRIC(alone))


def test_runs_of_unlike_size_and_metrics_without_a_difference_are_refused():
    model, base = TINY["llama"]().eval(), ids(1)
    with pytest.raises(ReftuneError, match="batch of 3, the base one of 2"):
        patch(model, base, ids(2, batch=3), METRIC)
    with pytest.raises(ReftuneError, match="the same in base and source"):
        patch(model, base, base, METRIC)


def test_a_sweep_of_no_intervention_is_the_base():
    model, base = TINY["gpt2"]().eval(), ids(1)
    with torch.no_grad():
        expected = probability([3, 4])(model(**base).logits)
    assert torch.equal(sweep(model, base, [[]], probability([3, 4]))[0], expected)


@pytest.mark.parametrize("component", ["block_output", "mlp_output", "attention_output"])
def test_attribution_is_the_derivative_of_patching(component):
    """Towards a source that is near the base, first order is exact: the two maps agree in shape and size."""
    model, base = TINY["gpt2"]().eval().double(), ids(1)
    near = Run(base, (noise(Location("transformer.wte", positions=[1, 3]), 1e-4, seed=3),))
    exact = patch(model, base, near, METRIC, component=component, relative=False)
    low = sweep(model, base, [[]], METRIC)[0].mean()
    difference = HeatMap(exact.values - low, exact.rows, exact.columns, exact.per_row)
    estimated = attribution_patch(model, base, near, METRIC, component=component, relative=False)
    found = agreement(difference, estimated)
    assert found.pearson > 0.9999 and found.slope == pytest.approx(1, abs=5e-3)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_attribution_of_chosen_positions_is_that_part_of_the_map():
    model, base, source = TINY["llama"]().eval(), ids(1), ids(2)
    whole = attribution_patch(model, base, source, METRIC)
    part = attribution_patch(model, base, source, METRIC, layers=[1], positions=[2, 5])
    torch.testing.assert_close(part.values[0], whole.values[1, [2, 5]])
    assert agreement(whole, whole).top == 1
    with pytest.raises(ReftuneError, match="different places"):
        agreement(whole, part)


def test_tracing_brings_the_clean_answer_back():
    model, inputs = TINY["llama"]().eval(), ids(1)
    found = trace(model, inputs, [5, 9], [1, 2], samples=3, positions=[0, 1, 2, [1, 2], -1])
    assert found.clean != pytest.approx(found.corrupted, rel=1e-3)
    values = found.heat_map.values
    # The last token's last state decides; before the subject nothing was blurred; both subject tokens are all of it.
    assert values[-1, -1] == pytest.approx(found.clean, rel=1e-4)
    torch.testing.assert_close(values[:, 0], torch.full((3,), found.corrupted))
    assert values[0, 3] != pytest.approx(found.corrupted, rel=1e-3)
    with pytest.raises(ReftuneError, match="samples=0"):
        trace(model, inputs, [5, 9], [1], samples=0)


def test_tracing_blurs_the_same_in_every_cell():
    """With layer 0's input put back at the subject nothing is blurred any more, whatever is batched with it."""
    model, inputs = TINY["gpt2"]().eval(), ids(1)
    found = trace(model, inputs, [5, 9], [1, 2], samples=3, component="block_input", layers=[0], positions=[[1, 2], 4])
    assert float(found.heat_map.values[0, 0]) == pytest.approx(found.clean, rel=1e-4)
    assert float(found.heat_map.values[0, 1]) == pytest.approx(found.corrupted, rel=1e-4)


def test_a_text_where_token_ids_belong_is_one_clear_error():
    """In a process of its own, without the type checks of these tests, as a user meets it."""
    code = """
from reftune import ReftuneError, causal
for call in (lambda: causal.patch(None, "a", "b", None), lambda: causal.read(None, "a"),
             lambda: causal.logit_difference("Paris", "Rome"), lambda: causal.probability(["Paris"])):
    try:
        call()
    except ReftuneError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    run, read, difference, probability = done.stdout.splitlines()
    assert run == read and "inputs='a': give what the model's forward takes, such as tokenizer(text" in run
    assert "answer='Paris': give token ids" in difference and "answer=['Paris']: give token ids" in probability


def test_pictures_that_are_compared_have_one_scale_which_the_colour_bar_says(tmp_path):
    def heat_map(*values: float) -> HeatMap:
        found = torch.tensor([values])
        return HeatMap(found, ["0"], list(map(str, range(len(values)))), found[..., None], "t")

    def colours(name: str, limits: tuple[float, float] | None = None) -> list[Any]:
        """Of the least and of the greatest value's cell."""
        maps[name].plot(tmp_path / f"{name}.png", limits)
        figure = drawn.pop()
        (image,) = figure.axes[0].get_images()
        assert figure.axes[1].get_ylabel() == said
        return [image.to_rgba(value, bytes=True)[:3] for value in image.get_array()[0][[0, -1]]]

    maps, drawn = {"weak": heat_map(0.0, 0.25), "strong": heat_map(0.0, 1.0)}, []
    shared = maps["weak"].limits(maps["strong"])
    assert shared == (0.0, 1.0) and maps["weak"].limits() == (0.0, 0.25)
    assert heat_map(-0.5, 1.0).limits(maps["weak"]) == (-1.0, 1.0)  # zero is the middle of the colours
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("reftune.causal.heat_map.save_figure", lambda figure, path: drawn.append(figure))
        said = "0 to 0.25"
        own = colours("weak")
        said = "0 to 1"
        weak, strong = colours("weak", shared), colours("strong", shared)
    assert own[1] == strong[1], "without a common scale the weak one looks as strong"
    assert weak[0] == strong[0] and weak[1] != strong[1]


def test_pictures_are_drawn(tmp_path):
    for both in (False, True):
        values = torch.rand(30, 8) - (0.5 if both else 0.0)
        heat_map = HeatMap(
            values, [str(i) for i in range(30)], [f" token{i}" for i in range(8)], values[..., None], "t"
        )
        plot_heat_map(heat_map, tmp_path / "deep" / "map.png")
        with Image.open(tmp_path / "deep" / "map.png") as picture:
            assert min(picture.size) > 200
    model = hierarchical_equality(4)
    plot_graph(model, tmp_path / "graph.png", model.run(model.sample(0)), {"left": True})
    plot_graph(natural_logic(), tmp_path / "logic.png")
    plot_lines({"a": {"0": 0.1, "1": 0.9}}, tmp_path / "lines.png", "layer", "IIA")
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["graph.png", "lines.png", "logic.png"]
    assert nx.is_directed_acyclic_graph(model.graph)
