import pytest
import torch
from torch import nn

from reftune.causal.accuracy import interchange_accuracy, random_model
from reftune.causal.aligned import Aligned, AlignedRuns
from reftune.causal.alignment import BoundlessDas, Das, SigmoidMask
from reftune.causal.counterfactuals import counterfactuals
from reftune.causal.interchange import Run, run, swap
from reftune.causal.interchange_data import InterchangeData, encode_counterfactuals
from reftune.causal.locations import Location
from reftune.causal.model import CausalModel, Variable
from reftune.causal.search import search
from reftune.causal.training import AlignOptions, align, align_cells
from reftune.errors import ReftuneError
from tests.causal.networks import Mlp
from tests.tiny_models import TINY

BIT = (0, 1)
TWO_BITS = CausalModel(
    [
        Variable("a", values=BIT),
        Variable("b", values=BIT),
        Variable("p", lambda a: a, ("a",), BIT),
        Variable("q", lambda b: b, ("b",), BIT),
        Variable("code", lambda p, q: 2 * p + q, ("p", "q"), (0, 1, 2, 3)),
    ]
)


class TwoBits(nn.Module):
    """Keeps the bit a in one direction of its hidden state and b in another, and reads both out: (batch, 2) to 4 classes."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(width, width)).Q
        self.directions = rotation[:2]
        self.hidden = nn.Linear(2, width, bias=False)
        self.copy = nn.Identity()
        self.head = nn.Linear(width, 4)
        read = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
        with torch.no_grad():
            self.hidden.weight.copy_(rotation[:2].T)
            self.head.weight.copy_(4 * read @ rotation[:2])
            self.head.bias.zero_()

    def forward(self, bits: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(2 * bits - 1))


def data(count: int, seed: int, **options) -> InterchangeData:
    examples = counterfactuals(TWO_BITS, count, ["p", "q"], seed=seed, **options)

    def encode(settings):
        return torch.tensor([[s["a"], s["b"]] for s in settings]).float()

    return encode_counterfactuals(examples, ["p", "q"], encode, lambda s: s["code"])


AT = Location("hidden")
OPTIONS = AlignOptions(epochs=12, batch_size=32, lr=0.03, mask_lr=0.05)


def test_das_finds_the_directions_that_carry_the_variables():
    model = TwoBits()
    aligned = Aligned(AT, Das({"p": 1, "q": 1}, 8))
    before = interchange_accuracy(model, aligned, data(200, 1)).overall
    history = align(model, aligned, data(400, 0), OPTIONS)
    after = interchange_accuracy(model, aligned, data(200, 1))
    assert history.losses[-1] < history.losses[0]
    assert before < 0.8 and after.overall == 1 and set(after.by_variables) == {"p", "q", "p+q"}
    found = aligned.alignment.subspace("p").rotation @ model.directions[0]
    assert abs(float(found)) > 0.9 and abs(float(aligned.alignment.subspace("q").rotation @ model.directions[0])) < 0.3
    rotation = aligned.alignment.rotation
    assert rotation is not None
    product = rotation @ rotation.T
    torch.testing.assert_close(product, torch.eye(2), atol=1e-6, rtol=0)


def test_boundless_das_finds_how_many_directions_are_enough():
    model = TwoBits(16)
    alignment = BoundlessDas(["p", "q"], 16, start=0.9)
    assert sum(alignment.directions().values()) >= 14
    align(model, Aligned(AT, alignment), data(600, 0), AlignOptions(epochs=20, batch_size=32, lr=0.03, penalty=0.3))
    assert interchange_accuracy(model, Aligned(AT, alignment), data(200, 1)).overall == 1
    counts = alignment.directions()
    assert all(count >= 1 for count in counts.values()) and sum(counts.values()) <= 8
    assert alignment.subspace("p").rotation.shape == (counts["p"], 16)


def test_a_sigmoid_mask_finds_the_neurons_that_carry_a_variable():
    model = TwoBits()
    with torch.no_grad():  # the bits in neurons 2 and 5
        for weight in (model.hidden.weight.T, model.head.weight):
            read = weight @ model.directions.T
            weight.copy_(torch.zeros_like(weight).index_copy(1, torch.tensor([2, 5]), read))
    alignment = SigmoidMask(["p", "q"], 8)
    align(model, Aligned(AT, alignment), data(400, 0), OPTIONS)
    assert interchange_accuracy(model, Aligned(AT, alignment), data(200, 1)).overall == 1
    masks = alignment.hard_masks().bool()
    assert masks[0, 2] and masks[1, 5] and not masks[1, 2] and not masks[0, 5]


def test_a_masked_rotation_learns_as_well():
    model, alignment = TwoBits(), SigmoidMask(["p"], 8, rotate=True)
    one = data(300, 0, keep=lambda example: set(example.sources) == {"p"})
    align(model, Aligned(AT, alignment), one, AlignOptions(epochs=25, batch_size=32, lr=0.03, mask_lr=0.1))
    assert interchange_accuracy(model, Aligned(AT, alignment), one).overall > 0.95


def test_controls_do_not_reach_what_the_network_does():
    model = TwoBits()
    for network, train in ((model, data(400, 0).with_random_labels()), (random_model(model), data(400, 0))):
        aligned = Aligned(AT, Das({"p": 1, "q": 1}, 8))
        align(network, aligned, train, OPTIONS)
        held_out = data(300, 1).with_random_labels() if network is model else data(300, 1)
        found = interchange_accuracy(network, aligned, held_out)
        assert found.overall < 0.6 and found.majority < 0.4


def test_cells_train_side_by_side_as_they_do_alone():
    model, train = TwoBits(), data(200, 0)

    def fresh(seed):
        torch.manual_seed(seed)
        return [Aligned(AT, Das({"p": 1, "q": 1}, 8))]

    together, alone = [fresh(1), fresh(2)], [fresh(1), fresh(2)]
    side_by_side = align_cells(model, together, train, OPTIONS)
    for cell, single, history in zip(together, alone, side_by_side, strict=True):
        assert align(model, single, train, OPTIONS).losses == pytest.approx(history.losses, rel=1e-3)
        torch.testing.assert_close(cell[0].alignment.rotation, single[0].alignment.rotation, atol=1e-3, rtol=1e-3)
    with pytest.raises(ReftuneError, match="in two cells"):
        align_cells(model, [together[0], together[0]], train)


def test_an_alignment_in_a_transformer_is_the_swap_that_it_stands_for():
    """Reused layers, chunks and cells change nothing: rows agree with plain interventions, one by one."""
    model = TINY["llama"]().eval()
    torch.manual_seed(0)
    rows, names = 70, ("u", "v")
    inputs = {name: {"input_ids": torch.randint(3, 96, (rows, 5))} for name in ("base", *names)}
    active = torch.rand(rows, 2) < 0.6
    where = torch.randint(0, 5, (rows,))
    made = InterchangeData(names, inputs["base"], {n: inputs[n] for n in names}, active, torch.zeros(rows).long())
    cells = [
        [Aligned(Location("block_output", 1, where), Das({"u": 2, "v": 3}, 32).eval())],
        [
            Aligned(Location("block_output", 0, -1), Das({"u": 4}, 32).eval()),
            Aligned(Location("mlp_output", 2, 3), Das({"v": 4}, 32).eval()),
        ],
    ]
    index = torch.tensor([69, 3, 64, 10])
    with torch.no_grad():
        found = AlignedRuns(model, cells, made).logits(index)
        for number, cell in enumerate(cells):
            for place, row in enumerate(index.tolist()):
                swaps = []
                for aligned in cell:
                    at = aligned.location
                    own = at.at(int(where[row])) if isinstance(at.positions, torch.Tensor) else at
                    for name in aligned.alignment.variables:
                        if active[row, names.index(name)]:
                            source = {"input_ids": inputs[name]["input_ids"][row : row + 1]}
                            swaps.append(swap(own, source, subspace=aligned.alignment.subspace(name)))
                alone = run(model, Run({"input_ids": inputs["base"]["input_ids"][row : row + 1]}, tuple(swaps)))
                torch.testing.assert_close(found[number, place], alone.logits[0, -1], atol=2e-5, rtol=1e-4)


def test_a_search_maps_accuracy_by_layer_and_position(tmp_path):
    torch.manual_seed(1)
    model = TINY["gpt2"]()
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        inputs = {"input_ids": torch.randint(3, 96, (40, 4))}
        labels = torch.randint(0, 2, (40,))
        made.append(InterchangeData(("v",), inputs, {"v": inputs}, torch.ones(40, 1).bool(), labels))
    found = search(
        model, lambda width: Das({"v": 2}, width), *made, layers=[0, 2], positions=[0, -1],
        options=AlignOptions(epochs=1), choices=[5, 6],
    )  # fmt: skip
    assert found.heat_map.values.shape == (2, 2) and found.heat_map.columns == ["0", "-1"]
    assert set(found.aligned) == {(0, "0"), (0, "-1"), (2, "0"), (2, "-1")}
    assert found.best()[1].overall == pytest.approx(float(found.heat_map.values.max()))
    found.heat_map.plot(tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 1000


def test_a_search_goes_through_the_modules_of_a_sequential():
    """Its ReLU is one of them, whose width no type tells."""
    network = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4))
    made = data(16, 0), data(16, 1)
    options = AlignOptions(epochs=1)
    found = search(network, lambda width: Das({"p": 1}, width), *made, component="{layer}", options=options)
    assert found.heat_map.rows == ["0", "1", "2"]
    relu = found.aligned[1, "None"]
    assert relu.location.component == "{layer}" and relu.alignment.width == 8
    alone = search(network, lambda width: Das({"p": 1}, width), *made, component="1", options=options)
    assert list(alone.aligned) == [(0, "None")] and alone.aligned[0, "None"].alignment.width == 8


def test_training_leaves_the_network_as_it_was():
    model = Mlp(2, 8, 2, 4).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    align(model, Aligned(Location("blocks.{layer}", 0), Das({"p": 2, "q": 2}, 8)), data(64, 0), AlignOptions(epochs=1))
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_an_alignment_survives_saving(tmp_path):
    first, second = Das({"p": 2, "q": 1}, 8), Das({"p": 2, "q": 1}, 8)
    second.load_state_dict(first.state_dict())
    h, s = torch.randn(3, 8), torch.randn(3, 2, 8)
    assert torch.equal(first(h, s), second(h, s))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Das({"p": 5, "q": 4}, 8), "9 directions does not fit a hidden size of 8"),
        (lambda: Das({"p": 0}, 8), r"sizes=\{'p': 0\}"),
        (lambda: BoundlessDas([], 8), "at least one variable"),
        (lambda: BoundlessDas(["p"], 8, start=0.0), "start=0"),
        (lambda: Das({"p": 1}, 8).subspace("z"), "'z' is not aligned here"),
        (lambda: align(TwoBits(), Aligned(AT, Das({"z": 1}, 8)), data(8, 0)), r"no sources for \['z'\]"),
        (lambda: align(TwoBits(), Aligned(AT, Das({"p": 1}, 9)), data(8, 0)), "width 9 does not fit 'hidden' of width 8"),
        (lambda: AlignOptions(epochs=0), "epochs=0"),
        (lambda: AlignOptions(temperature=(1.0, 0.0)), "temperature"),
        (lambda: data(8, 0).__class__(("p",), torch.ones(3, 2), {}, torch.ones(3, 1).bool(), torch.ones(3).long()), "no sources"),
        (lambda: InterchangeData(("p",), torch.ones(3, 2), {"p": torch.ones(2, 2)}, torch.ones(3, 1).bool(), torch.ones(3).long()), "p: 2 rows of inputs, and 3 labels"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ReftuneError, match=message):
        call()
