"""Each edit against its equation, written a second time, one row at a time, in float64."""

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from reftune.edits import Edit, available_edits, make_edit
from reftune.errors import ReftuneError

WIDTH, RANK = 12, 3
ACTIVATIONS = {None: lambda x: x, "linear": lambda x: x, "relu": lambda x: x.clamp_min(0), "tanh": torch.tanh}
ROTATED = ["consreft", "direft_orthogonal", "gated", "lobireft", "loreft"]
IDENTITIES = ["direft", "direft_orthogonal", "gated", "lobireft", "loreft", "nodireft", "noreft"]


def _expected(method: str, t: dict[str, Tensor], h: Tensor, a) -> Tensor:
    """The edited row, by explicit sums over the r directions."""
    out = h.clone()
    for i in range(RANK):
        R = t.get("rotation", t.get("projection"))
        assert R is not None
        if method in ("loreft", "noreft"):
            coordinate = a(t["weight"][i] @ h + t["bias"][i]) - R[i] @ h
            coordinate = coordinate - t["offset"][i] if "offset" in t else coordinate
        elif method in ("direft", "nodireft", "direft_orthogonal", "gated"):
            coordinate = a(t["weight"][i] @ h + t["bias"][i])
            coordinate = coordinate * float(t.get("probe", h) @ h > t.get("threshold", -1))
        elif method == "consreft":
            coordinate = t["bias"][i] - R[i] @ h
        else:
            coordinate = t["bias"][i]
        out = out + coordinate * R[i]
    return out


def _cases() -> list[tuple[str, str | None, dict[str, bool]]]:
    cases: list[tuple[str, str | None, dict[str, bool]]] = [(m, None, {}) for m in available_edits()]
    activated = ("loreft", "direft", "noreft", "direft_orthogonal", "gated")
    cases += [(method, act_fn, {}) for method in activated for act_fn in ("linear", "relu", "tanh")]
    return [*cases, ("noreft", None, {"add_bias": True}), ("noreft", "tanh", {"add_bias": True})]


def _built(method: str, **options) -> Edit:
    edit = make_edit(method, WIDTH, RANK, **{"init": "paper", **options})
    assert isinstance(edit, Edit)
    return edit


@pytest.mark.parametrize(("method", "act_fn", "options"), _cases())
def test_an_edit_equals_its_equation(method: str, act_fn: str | None, options: dict[str, bool]) -> None:
    edit = _built(method, act_fn=act_fn, **options).double()
    for buffer in edit.buffers():  # a gate that shuts on some
        buffer.normal_()
    h = torch.randn(2, 4, WIDTH, dtype=torch.float64)
    edited = edit(h)
    tensors = {name: tensor.detach() for name, tensor in edit.state_dict().items()}
    for batch in range(2):
        for position in range(4):
            row = _expected(method, tensors, h[batch, position], ACTIVATIONS[act_fn])
            torch.testing.assert_close(edited[batch, position], row, rtol=0, atol=1e-12)
    torch.testing.assert_close(edit.delta(h), edited - h, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("method", "act_fn", "options"), [c for c in _cases() if _built(c[0], act_fn=c[1]).folds])
def test_folding_changes_nothing_but_the_form(method: str, act_fn: str | None, options: dict[str, bool]) -> None:
    edit = _built(method, act_fn=act_fn, **options).double()
    h = torch.randn(5, WIDTH, dtype=torch.float64)
    folded = edit.fold()
    assert (folded.A.shape, folded.b.shape, folded.B.shape) == ((WIDTH, RANK), (RANK,), (RANK, WIDTH))
    assert not any(tensor.requires_grad for tensor in (folded.A, folded.b, folded.B))
    torch.testing.assert_close(folded(h), edit(h), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["loreft", "direft", "noreft", "direft_orthogonal"])
def test_an_edit_with_an_activation_refuses_to_fold(method: str) -> None:
    with pytest.raises(ReftuneError, match=r"act_fn='tanh'.*only a linear edit folds"):
        _built(method, act_fn="tanh").fold()


@pytest.mark.parametrize("method", IDENTITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_an_identity_start_changes_no_bit(method: str, dtype: torch.dtype) -> None:
    h = torch.randn(7, WIDTH).to(dtype)
    assert torch.equal(_built(method, init="identity")(h), h)


@pytest.mark.parametrize(
    ("method", "act_fn"),
    [(m, None) for m in IDENTITIES] + [("direft", "relu"), ("noreft", "relu"), ("direft_orthogonal", "tanh")],
)
def test_an_identity_start_is_the_identity_and_can_learn(method: str, act_fn: str | None) -> None:
    edit = _built(method, init="identity", act_fn=act_fn)
    h = torch.randn(7, WIDTH)
    edited = edit(h)
    assert torch.equal(edited, h)
    (edited * torch.randn(7, WIDTH)).sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 1e-3 for p in edit.parameters())


@pytest.mark.parametrize(
    ("method", "act_fn"),
    [("loreft", "gelu"), ("consreft", None), ("direft_orthogonal", "sigmoid"), ("direft_orthogonal", "relu")],
)
def test_an_impossible_identity_start_says_the_way_out(method: str, act_fn: str | None) -> None:
    with pytest.raises(ReftuneError, match=r"init='identity'.*init='paper'"):
        _built(method, init="identity", act_fn=act_fn)


@pytest.mark.parametrize("method", available_edits())
def test_the_papers_start_is_not_the_identity(method: str) -> None:
    h = torch.randn(7, WIDTH)
    assert (_built(method)(h) - h).abs().max() > 1e-2


def test_rank_4_loreft_of_width_576_has_4612_parameters() -> None:
    edit = make_edit("loreft", 576, 4)
    assert sum(p.numel() for p in edit.parameters()) == 4612
    assert sum(t.numel() for t in edit.state_dict().values()) == 4612


@pytest.mark.parametrize("method", available_edits())
def test_tensors_sit_directly_on_the_edit_under_names_that_cannot_be_confused(method: str) -> None:
    edit = _built(method, **({"add_bias": True} if method == "noreft" else {}))
    names = [name for name, _ in (*edit.named_parameters(), *edit.named_buffers())]
    assert names == list(edit.state_dict())
    assert list(edit.children()) == [] and all(p.dtype == torch.float32 for p in edit.parameters())
    for name in names:
        assert "." not in name and name not in "intervention" and name not in "reft_edits"
        assert not any(name in other for other in names if other != name)


@given(
    method=st.sampled_from(available_edits()),
    width=st.integers(1, 24),
    data=st.data(),
    shape=st.lists(st.integers(0, 3), min_size=0, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_any_width_rank_shape_and_dtype_comes_back_in_kind(method, width, data, shape, dtype) -> None:
    r = data.draw(st.integers(1, width))
    edit = make_edit(method, width, r, init="paper").eval()
    assert isinstance(edit, Edit)
    h = torch.randn(*shape, width).to(dtype)
    edited = edit(h)
    assert edited.dtype == dtype and edited.shape == h.shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert edit.delta(h).dtype == wide
    assert torch.equal(edited, (h.to(wide) + edit.delta(h)).to(dtype))  # computed in float32, rounded once
    if not edit.folds:
        return
    folded = edit.fold()(h)
    assert folded.dtype == dtype
    coarse = dtype.itemsize == 2
    torch.testing.assert_close(folded, edited, rtol=2e-2 if coarse else 1e-4, atol=1e-2 if coarse else 1e-5)


@pytest.mark.parametrize("method", available_edits())
def test_autocast_does_not_lower_the_precision_of_an_edit(method: str) -> None:
    edit = _built(method)
    h = torch.randn(5, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = edit(h)
    assert torch.equal(under_autocast, edit(h))


@pytest.mark.parametrize("method", available_edits())
def test_dropout_drops_elements_of_the_change_alone_and_only_in_training(method: str) -> None:
    edit = _built(method, dropout=0.5)
    h = torch.randn(400, WIDTH)
    delta = edit.delta(h)
    dropped = edit.train()(h) - h
    kept = dropped.abs() > 1e-7
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(dropped[kept], 2 * delta[kept], rtol=0, atol=1e-5)
    assert torch.equal(edit.eval()(h), h + delta)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, r"r=0: .*between 1 and .*12"),
        ({"r": 13}, r"r=13: .*between 1 and .*12"),
        ({"dropout": 1.0}, r"dropout=1.0: "),
        ({"init": "zero"}, r"init='zero': .*identity, paper"),
        ({"act_fn": "rleu", "init": "paper"}, r"act_fn='rleu': .*relu"),
        ({"act_fn": "prelu", "init": "paper"}, r"act_fn='prelu': .*parameters of its own"),
        ({"parametrization": "qr"}, r"parametrization='qr': .*cholesky, householder"),
        ({"rank": 3}, r"rank=3: LoreftEdit takes no rank"),
    ],
)
def test_a_bad_option_is_refused_by_name_and_value(options, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users run without the type checker
    with pytest.raises(ReftuneError, match=message):
        make_edit("loreft", WIDTH, **{"r": RANK, **options})


@pytest.mark.parametrize("method", ["consreft", "lobireft"])
def test_an_edit_without_a_pre_activation_takes_no_activation(method: str) -> None:
    with pytest.raises(ReftuneError, match=rf"act_fn='relu': {method} has nothing to activate"):
        _built(method, act_fn="relu")


@pytest.mark.parametrize("method", ROTATED)
def test_a_new_rotation_is_orthonormal(method: str) -> None:
    R = _built(method).state_dict()["rotation"]
    torch.testing.assert_close(R @ R.mT, torch.eye(RANK), rtol=0, atol=1e-6)


def test_the_papers_weights_are_drawn_as_a_linear_layers_are() -> None:
    weight = _built("loreft").state_dict()["weight"]
    bound = nn.Linear(WIDTH, RANK).weight.detach().abs().max().item()
    assert 0.2 < weight.abs().max() <= WIDTH**-0.5 and bound <= WIDTH**-0.5


@pytest.mark.parametrize("method", ["loreft", "direft", "nodireft", "lobireft"])
@pytest.mark.parametrize("parametrization", ["cholesky", "householder"])
def test_a_start_at_a_vector_adds_it_to_every_state_and_trains_from_there(method: str, parametrization: str) -> None:
    options = {"parametrization": parametrization} if "loreft" in method or "lobireft" in method else {}
    edit = make_edit(method, 16, 3, **options)
    vector, h = 4 * torch.randn(16), torch.randn(5, 16)
    edit.start_at(vector)  # type: ignore[operator]
    for training in (False, True):
        edit.train(training)
        assert torch.allclose(edit(h), h + vector, atol=1e-5)
    edit(h).pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in edit.parameters())
    assert any(p.grad.abs().sum() > 0 for p in edit.parameters())  # type: ignore[union-attr]


def test_a_method_that_adds_no_constant_cannot_start_at_a_vector() -> None:
    with pytest.raises(ReftuneError, match="ConsreftEdit"):
        make_edit("consreft", 16, 2, init="paper").start_at(torch.ones(16))  # type: ignore[operator]
