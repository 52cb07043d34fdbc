"""Methods by name, a user's own classes, and nested ones made flat."""

import copy
import pickle

import jaxtyping
import pytest
import torch
from torch import Tensor, nn

from reftune.edits import DireftEdit, FlatEdit, LoreftEdit, available_edits, edit_class, make_edit, register_edit
from reftune.errors import ReftuneError

WIDTH, RANK = 8, 2


class Shift(nn.Module):
    """h + v."""

    def __init__(self, width: int, r: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.ones(width))
        self.r = r

    def forward(self, h: Tensor) -> Tensor:
        return h + self.vector


class Gated(nn.Module):
    """h + gate(h) * up(down(h)), with dropout, a counter buffer, a scale that is not saved, and tied weights."""

    def __init__(self, width: int, r: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, r), nn.Tanh(), nn.Linear(r, width))
        self.gate = nn.Linear(width, 1)
        self.tied = self.gate
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("scale", torch.full((), 2.0), persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        self.get_buffer("calls").add_(1)
        return h + self.get_buffer("scale") * torch.sigmoid(self.tied(h)) * self.dropout(self.body(h))


def test_the_librarys_methods_are_known_by_name() -> None:
    names = ["consreft", "direft", "direft_orthogonal", "gated", "lobireft", "loreft", "nodireft", "noreft"]
    assert available_edits() == names
    assert edit_class("loreft") is LoreftEdit and edit_class("nodireft") is DireftEdit


def test_an_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(ReftuneError, match=r"method='lorefft': unknown; known are consreft, .*loreft.*register_edit"):
        make_edit("lorefft", WIDTH, RANK)


def test_a_users_class_becomes_a_method() -> None:
    register_edit("shift")(Shift)
    assert "shift" in available_edits()
    for method in ("shift", Shift):
        edit = make_edit(method, WIDTH, RANK, dropout=0.0, act_fn=None, init="identity", parametrization="cholesky")
        assert isinstance(edit, Shift) and edit.r == RANK
        assert torch.equal(edit(torch.zeros(3, WIDTH)), torch.ones(3, WIDTH))


def test_an_option_that_a_users_class_does_not_take_is_refused_unless_it_asks_for_nothing() -> None:
    with pytest.raises(ReftuneError, match=r"dropout=0.1: Shift takes no dropout"):
        make_edit(Shift, WIDTH, RANK, dropout=0.1)
    assert isinstance(make_edit(Gated, WIDTH, RANK, dropout=0.1), FlatEdit)


def test_a_taken_name_is_refused_and_a_cell_run_twice_is_not() -> None:
    with pytest.raises(ReftuneError, match=r"method 'loreft' is reftune.edits.loreft.LoreftEdit; pick another name"):
        register_edit("loreft")(Shift)
    register_edit("shift")(Shift)
    again = type("Shift", (Shift,), {"__module__": Shift.__module__, "__qualname__": Shift.__qualname__})
    register_edit("shift")(again)
    assert edit_class("shift") is again


@pytest.mark.parametrize("method", [int, torch.sin])
def test_what_is_not_a_module_class_is_refused(method, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users run without the type checker
    with pytest.raises(ReftuneError, match="a class derived from torch.nn.Module"):
        edit_class(method)


def _flat_and_reference(dropout: float = 0.0) -> tuple[FlatEdit, Gated]:
    torch.manual_seed(1)
    reference = Gated(WIDTH, RANK, dropout)
    torch.manual_seed(1)
    flat = make_edit(Gated, WIDTH, RANK, dropout=dropout)
    assert isinstance(flat, FlatEdit)
    return flat, reference


def test_a_nested_edit_is_flattened_and_computes_the_same() -> None:
    flat, reference = _flat_and_reference()
    h = torch.randn(2, 3, WIDTH)
    assert torch.equal(flat(h), reference(h))
    assert list(flat.children()) == []
    assert list(flat.state_dict()) == [name.replace(".", "__") for name in _parameters_first(reference)]
    assert len(list(flat.parameters())) == len(list(reference.parameters()))
    assert flat.get_buffer("calls") == 1


def _parameters_first(module: nn.Module) -> list[str]:
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    return names + [name for name in module.state_dict() if name not in names]


def test_a_flat_edit_learns_as_its_inner_module_would() -> None:
    flat, reference = _flat_and_reference()
    h, target = torch.randn(2, 5, WIDTH)
    for module in (flat, reference):
        optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(3):
            optimiser.zero_grad()
            (module(h) - target).square().mean().backward()
            optimiser.step()
    torch.testing.assert_close(flat(h), reference(h), rtol=0, atol=1e-6)


def test_a_flat_edit_follows_train_and_eval() -> None:
    flat, _ = _flat_and_reference(dropout=0.5)
    h = torch.randn(50, WIDTH)
    assert not torch.equal(flat.train()(h), flat(h))
    assert torch.equal(flat.eval()(h), flat(h))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda edit: pickle.loads(pickle.dumps(edit))])
def test_a_copy_of_a_flat_edit_is_independent(duplicate) -> None:
    flat, _ = _flat_and_reference()
    h = torch.randn(2, WIDTH)
    other = duplicate(flat)
    assert torch.equal(other(h), flat(h))
    with torch.no_grad():
        other.get_parameter("body__0__weight").zero_()
        other.get_parameter("gate__bias").add_(1)
    assert other.get_parameter("tied__bias") is other.get_parameter("gate__bias")
    assert not torch.equal(other(h), flat(h))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_flat_edit_moves_and_computes_in_float32_at_least(dtype: torch.dtype) -> None:
    flat, reference = _flat_and_reference()
    h = torch.randn(4, WIDTH).to(dtype)
    edited = flat(h)
    assert edited.dtype == dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(edited, reference.to(wide)(h.to(wide)).to(dtype))
    assert flat.to(dtype)(h).dtype == dtype
    assert flat.get_parameter("gate__weight").dtype == dtype


def test_a_flat_edit_reloads_to_the_bit() -> None:
    flat, _ = _flat_and_reference()
    other = make_edit(Gated, WIDTH, RANK)
    other.load_state_dict(flat.state_dict())
    h = torch.randn(4, WIDTH)
    assert torch.equal(other(h), flat(h))
    with torch.device("meta"):
        empty = make_edit(Gated, WIDTH, RANK)
    empty.load_state_dict({**flat.state_dict()}, assign=True)
    assert empty.get_parameter("gate__weight").device.type == "cpu"
