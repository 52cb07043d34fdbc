"""The retraction, its gradient, and the rotation's life under optimisers, checkpoints, copies and compilation."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from reftune.edits import LoreftEdit, RotatedEdit, make_edit
from reftune.edits.rotation import householder, orthonormal, retract_
from reftune.errors import ReftuneError

WIDTH, RANK = 16, 4
ROTATED = ["consreft", "direft_orthogonal", "gated", "lobireft", "loreft"]


def _gram_error(R: Tensor) -> float:
    return (R.double() @ R.double().mT - torch.eye(R.shape[0], dtype=torch.float64)).abs().max().item()


def _gram_schmidt(P: Tensor) -> Tensor:
    """Row by row, in float64: what the retraction must equal."""
    rows: list[Tensor] = []
    for row in P.double():
        for _ in range(2):
            for other in rows:
                row = row - (row @ other) * other
        rows.append(row / row.norm())
    return torch.stack(rows)


def _edit(method: str = "loreft", **options) -> RotatedEdit:
    edit = make_edit(method, WIDTH, RANK, **{"init": "paper", **options})
    assert isinstance(edit, RotatedEdit)
    return edit


def _loss(edit: Callable[..., Any], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    h, target = torch.randn(2, 8, WIDTH, generator=generator)
    return (edit(h) - target).square().mean()


def _train(edit: Callable[..., Any], optimiser: torch.optim.Optimizer, steps: range) -> list[Tensor]:
    losses = []
    for step in steps:
        optimiser.zero_grad()
        loss = _loss(edit, step)
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    return losses


@given(
    width=st.integers(1, 40),
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    seed=st.integers(0, 1000),
)
def test_retraction_makes_any_rows_orthonormal_and_is_idempotent(width, data, dtype, scale, seed) -> None:
    r = data.draw(st.integers(1, width))
    generator = torch.Generator().manual_seed(seed)
    P = (scale * torch.randn(r, width, generator=generator, dtype=torch.float64)).to(dtype)
    retract_(P)
    assert _gram_error(P) < (1e-6 if dtype == torch.float32 else 1e-12)
    again = P.clone()
    retract_(again)
    assert torch.equal(again, P)


def test_retraction_equals_gram_schmidt_row_by_row() -> None:
    P = torch.randn(RANK, WIDTH, dtype=torch.float64)
    expected = _gram_schmidt(P)
    retract_(P)
    torch.testing.assert_close(P, expected, rtol=0, atol=1e-13)


def test_retraction_survives_nearly_dependent_rows() -> None:
    P = torch.randn(1, 512, dtype=torch.float64).expand(8, 512) + 1e-6 * torch.randn(8, 512, dtype=torch.float64)
    P = P.contiguous()
    retract_(P)
    assert _gram_error(P) < 1e-12


@pytest.mark.parametrize("spoil", [torch.nan, torch.inf])
def test_retraction_of_what_has_no_basis_leaves_it_and_raises_nothing(spoil: float) -> None:
    P = torch.randn(RANK, WIDTH)
    P[1, 2] = spoil
    before = P.clone()
    retract_(P)
    assert torch.equal(P.nan_to_num(7.0), before.nan_to_num(7.0))
    zero_row = torch.randn(RANK, WIDTH)
    zero_row[2] = 0
    before = zero_row.clone()
    retract_(zero_row)
    assert torch.equal(zero_row, before)


def test_retraction_takes_a_batch_of_rotations() -> None:
    P = torch.randn(3, RANK, WIDTH)
    one_by_one = P.clone()
    retract_(P)
    for single, batched in zip(one_by_one, P, strict=True):
        retract_(single)
        torch.testing.assert_close(single, batched, rtol=0, atol=1e-7)


def test_the_gradient_is_that_of_gram_schmidt_at_an_orthonormal_point() -> None:
    P = _gram_schmidt(torch.randn(RANK, WIDTH)).requires_grad_()
    G = torch.randn(RANK, WIDTH, dtype=torch.float64)
    (ours,) = torch.autograd.grad((orthonormal(P) * G).sum(), P)
    (autograds,) = torch.autograd.grad((_gram_schmidt(P) * G).sum(), P)
    torch.testing.assert_close(ours, autograds, rtol=0, atol=1e-12)
    for _ in range(5):  # and by central differences of the retraction itself
        direction, eps = torch.randn_like(P), 1e-6
        values = []
        for sign in (1, -1):
            moved = P.detach() + sign * eps * direction
            retract_(moved)
            values.append((moved * G).sum())
        torch.testing.assert_close((values[0] - values[1]) / (2 * eps), (ours * direction).sum(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", ROTATED)
def test_gradients_through_an_edit_agree_with_finite_differences(method: str) -> None:
    edit = _edit(method).double()
    h, weights = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    h.requires_grad_()
    (torch.tanh(edit(h)) * weights).sum().backward()
    tensors = {**dict(edit.named_parameters()), "h": h}
    for name, tensor in tensors.items():
        assert tensor.grad is not None
        for _ in range(3):
            direction, eps, values = torch.randn_like(tensor), 1e-6, []
            start = tensor.detach().clone()
            for sign in (1, -1):
                with torch.no_grad():
                    tensor.copy_(start + sign * eps * direction)
                    values.append((torch.tanh(edit(h)) * weights).sum())  # forward retracts what was moved
                    tensor.copy_(start)
            slope = (values[0] - values[1]) / (2 * eps)
            torch.testing.assert_close(slope, (tensor.grad * direction).sum(), rtol=1e-5, atol=1e-7, msg=name)


def test_the_gradient_has_the_tangent_part_of_torchs_parametrization() -> None:
    """Both charts of the manifold must give d loss / dQ the same effect along every tangent direction."""
    edit: Any = _edit().double()
    h, target = torch.randn(2, 6, WIDTH, dtype=torch.float64)
    (edit(h) - target).square().sum().backward()
    Q = edit.rotation.detach()

    chart: Any = nn.Linear(RANK, WIDTH, bias=False, dtype=torch.float64)  # parametrize changes its class
    with torch.no_grad():
        chart.weight.copy_(Q.mT)
    chart = parametrizations.orthogonal(chart, "weight", orthogonal_map="householder")
    R = chart.weight.mT
    R.retain_grad()
    W, b = edit.weight.detach(), edit.bias.detach()
    (h + (h @ W.mT + b - h @ R.mT) @ R - target).square().sum().backward()
    original = chart.parametrizations.weight.original
    assert edit.rotation.grad is not None and R.grad is not None and original.grad is not None
    torch.testing.assert_close(R.detach(), Q, rtol=0, atol=1e-12)

    def tangent(G: Tensor) -> Tensor:
        S = G @ Q.mT
        return G - 0.5 * (S + S.mT) @ Q

    # Ours maps G to G - T Q, T symmetric, which the projection removes: the tangent parts must be equal.
    torch.testing.assert_close(tangent(edit.rotation.grad), tangent(R.grad), rtol=0, atol=1e-10)
    # And along the curve that torch's own parameter draws, both predict the same change of the loss.
    for _ in range(3):
        step = torch.randn_like(original)
        moved = torch.func.jvp(lambda X: chart.parametrizations.weight[0](X).mT, (original.detach(),), (step,))[1]
        predicted = (edit.rotation.grad * moved).sum()
        torch.testing.assert_close((original.grad * step).sum(), predicted, rtol=1e-8, atol=1e-10)


OPTIMISERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=3e-2),
    "sgd with a large step": lambda m: torch.optim.SGD(m.parameters(), lr=5.0, weight_decay=0.1),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.9),
}


@pytest.mark.parametrize("method", ROTATED)
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_the_rotation_is_orthonormal_after_every_step_of_any_optimiser(method: str, optimiser: str) -> None:
    edit = _edit(method)
    stepper = OPTIMISERS[optimiser](edit)
    for step in range(15):
        _train(edit, stepper, range(step, step + 1))
        torch.nn.utils.clip_grad_norm_(edit.parameters(), 1.0)
        with torch.no_grad():
            edit(torch.randn(1, WIDTH))
        assert _gram_error(edit.rotation) < 1e-6
        assert edit.rotation.isfinite().all()


def test_an_optimiser_that_leaves_no_trace_is_noticed_too() -> None:
    edit = _edit()
    edit.train()(torch.randn(1, WIDTH))
    edit.rotation.data.add_(0.1)  # as bitsandbytes' kernels do: no version counter moves
    edit(torch.randn(1, WIDTH))
    assert _gram_error(edit.rotation) < 1e-6
    edit.rotation.data.add_(0.1)
    edit.eval()(torch.randn(1, WIDTH))
    assert _gram_error(edit.rotation) < 1e-6
    edit.rotation.data.add_(0.1)
    assert _gram_error(edit.state_dict()["rotation"]) < 1e-6


def test_evaluation_uses_an_orthonormal_rotation_as_stored() -> None:
    edit = _edit().eval()
    before = edit.rotation.detach().clone()
    edit(torch.randn(3, WIDTH))
    assert torch.equal(edit.rotation, before)


def test_two_forwards_before_one_backward_differentiate_both() -> None:
    edit = _edit()
    stepper = OPTIMISERS["adamw"](edit)
    _train(edit, stepper, range(2))
    edit.zero_grad()
    (_loss(edit, 10) + _loss(edit, 11)).backward()
    together = [p.grad.clone() for p in edit.parameters() if p.grad is not None]
    edit.zero_grad()
    _loss(edit, 10).backward()
    _loss(edit, 11).backward()
    for ours, apart in zip(together, edit.parameters(), strict=True):
        torch.testing.assert_close(ours, apart.grad, rtol=1e-5, atol=1e-7)


def test_resuming_from_a_checkpoint_repeats_the_uninterrupted_run_bit_for_bit() -> None:
    whole = _edit(dropout=0.0)
    interrupted = copy.deepcopy(whole)
    losses = _train(whole, OPTIMISERS["adamw"](whole), range(10))

    optimiser = OPTIMISERS["adamw"](interrupted)
    first = _train(interrupted, optimiser, range(5))
    file = io.BytesIO()
    torch.save({"edit": interrupted.state_dict(), "optimiser": optimiser.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    resumed = _edit()
    resumed.load_state_dict(saved["edit"])
    optimiser = OPTIMISERS["adamw"](resumed)
    optimiser.load_state_dict(saved["optimiser"])
    second = _train(resumed, optimiser, range(5, 10))
    assert torch.equal(torch.stack(losses), torch.stack(first + second))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.parametrize("parametrization", ["cholesky", "householder"])
@pytest.mark.parametrize(("assign", "meta"), [(False, False), (True, False), (True, True)])
def test_a_loaded_rotation_is_the_saved_one_to_the_bit(parametrization: str, assign: bool, meta: bool) -> None:
    trained = _edit(parametrization=parametrization)
    _train(trained, OPTIMISERS["adamw"](trained), range(5))
    saved = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    assert sorted(saved) == ["bias", "rotation", "weight"] and _gram_error(saved["rotation"]) < 1e-6
    with torch.device("meta" if meta else "cpu"):
        loaded = _edit(parametrization=parametrization)
    loaded.load_state_dict(saved, assign=assign)
    h = torch.randn(3, WIDTH)
    for edit in (loaded.eval(), loaded.train()):
        edit(h)
        for name, tensor in edit.state_dict().items():
            assert torch.equal(tensor, saved[name]), name
    torch.testing.assert_close(loaded.eval()(h), trained.eval()(h), rtol=0, atol=1e-5)


@pytest.mark.parametrize("parametrization", ["cholesky", "householder"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda edit: pickle.loads(pickle.dumps(edit))])
def test_a_copy_in_mid_training_continues_as_the_original_does(parametrization: str, duplicate) -> None:
    edit = _edit(parametrization=parametrization, act_fn="tanh")
    _train(edit, torch.optim.SGD(edit.parameters(), lr=0.1), range(3))
    other = duplicate(edit)
    assert other.rotation is not edit.rotation
    losses = [_train(e, torch.optim.SGD(e.parameters(), lr=0.1), range(3, 6)) for e in (edit, other)]
    assert torch.equal(torch.stack(losses[0]), torch.stack(losses[1]))


@pytest.mark.parametrize("parametrization", ["cholesky", "householder"])
def test_moving_between_dtypes_keeps_what_was_learned(parametrization: str) -> None:
    edit = _edit(parametrization=parametrization)
    _train(edit, OPTIMISERS["adamw"](edit), range(3))
    h = torch.randn(3, WIDTH)
    before = edit.eval()(h)
    torch.testing.assert_close(edit.double()(h), before, rtol=0, atol=1e-6)
    torch.testing.assert_close(edit.float()(h), before, rtol=0, atol=1e-6)
    torch.testing.assert_close(edit.bfloat16()(h), before, rtol=0, atol=0.1)


def test_the_householder_option_follows_torchs_training_curve() -> None:
    edit = _edit(parametrization="householder")
    assert isinstance(edit, LoreftEdit)
    theirs: Any = nn.Linear(RANK, WIDTH, bias=False)  # parametrize changes its class
    theirs = parametrizations.orthogonal(theirs, "weight", orthogonal_map="householder")
    with torch.no_grad():  # the same rotation, and the same completion of it to a basis
        base = theirs.parametrizations.weight[0].base
        edit.load_state_dict({**edit.state_dict(), "rotation": base[:, :RANK].mT.clone()})
        edit(torch.zeros(1, WIDTH))
        edit.basis.copy_(base)
    W, b = (nn.Parameter(t.detach().clone()) for t in (edit.weight, edit.bias))

    class Reference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias, self.rotation = W, b, theirs

        def forward(self, h: Tensor) -> Tensor:
            R = self.rotation.weight.mT
            return h + (h @ self.weight.mT + self.bias - h @ R.mT) @ R

    reference = Reference()
    curves = [
        _train(m, torch.optim.AdamW(m.parameters(), lr=2e-2, weight_decay=0.0), range(20)) for m in (edit, reference)
    ]
    torch.testing.assert_close(torch.stack(curves[0]), torch.stack(curves[1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(edit.state_dict()["rotation"], theirs.weight.detach().mT, rtol=0, atol=1e-4)
    assert (curves[0][0] - curves[0][-1]).abs() > 1e-2


def test_weight_decay_does_not_destroy_a_householder_rotation() -> None:
    edit = _edit(parametrization="householder")
    _train(edit, torch.optim.AdamW(edit.parameters(), lr=1e-2, weight_decay=0.1), range(5))
    assert _gram_error(edit.state_dict()["rotation"]) < 1e-5


def test_householder_at_its_start_returns_the_basis_it_was_given() -> None:
    edit = _edit(parametrization="householder")
    R = householder(edit.reflectors, edit.basis)
    assert torch.equal(R, edit.rotation)


def test_torch_func_differentiates_and_maps_an_edit() -> None:
    edit = _edit()
    tensors = {name: p.detach() for name, p in edit.named_parameters()}
    rows = torch.randn(6, WIDTH)

    def loss(tensors: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(edit, tensors, (row,)).square().sum()

    per_row = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(tensors, rows)
    edit(rows).square().sum().backward()
    for name, parameter in edit.named_parameters():
        torch.testing.assert_close(per_row[name].sum(0), parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parametrization", ["cholesky", "householder"])
@pytest.mark.parametrize("source", ["trained", "loaded", "averaged"])
@pytest.mark.parametrize("training", [False, True])
def test_equal_parameters_are_the_same_function_however_they_were_copied(parametrization, source, training) -> None:
    edit, target = (_edit(parametrization=parametrization) for _ in range(2))
    _train(edit, OPTIMISERS["adamw"](edit), range(5))
    if source == "loaded":  # and not used since
        saved, edit = edit.state_dict(), _edit(parametrization=parametrization)
        edit.load_state_dict(saved)
    if source == "averaged" and parametrization == "cholesky":
        for parameter in edit.parameters():
            parameter.data.mul_(0.9).add_(torch.randn_like(parameter), alpha=0.1)  # not orthonormal any more
    h = torch.randn(3, WIDTH)
    for one in (edit, target):
        one.train(training)
    with torch.no_grad():
        target(h)  # whatever it keeps of its own parameters
        for name, parameter in edit.named_parameters():  # as TRL's reference adapter is made, and averages are put in
            target.get_parameter(name).data.copy_(parameter.data)
        torch.testing.assert_close(target(h), edit(h), rtol=0, atol=1e-6)
        torch.testing.assert_close(target.state_dict()["rotation"], edit.state_dict()["rotation"], rtol=0, atol=1e-6)
        for name, value in edit.state_dict().items():
            assert target.state_dict()[name].shape == value.shape


@pytest.mark.parametrize("parametrization", ["cholesky", "householder"])
def test_a_silent_write_in_evaluation_is_seen(parametrization: str) -> None:
    edit = _edit(parametrization=parametrization).eval()
    h = torch.randn(3, WIDTH)
    with torch.no_grad():
        before = edit(h)
        for parameter in edit.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
        after = edit(h)
        saved = {name: tensor.clone() for name, tensor in edit.state_dict().items()}
    fresh = _edit(parametrization=parametrization)
    fresh.load_state_dict(saved)
    assert not torch.allclose(before, after)
    assert _gram_error(saved["rotation"]) < 1e-6
    torch.testing.assert_close(fresh.eval()(h), after, rtol=0, atol=1e-5)


def _averaged(edit: RotatedEdit) -> tuple[torch.optim.swa_utils.AveragedModel, nn.Module]:
    """torch's average over a model, which copies buffers beside parameters, before training and the model after it."""
    model = nn.Sequential(edit)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    _train(edit, OPTIMISERS["adamw"](edit), range(5))
    return averaged, model


def test_a_buffer_copied_beside_householder_parameters_is_refused_where_it_says_otherwise() -> None:
    h, edit = torch.randn(3, WIDTH), _edit(parametrization="householder")
    averaged, model = _averaged(edit)
    averaged.update_parameters(model)
    with pytest.raises(ReftuneError, match="cholesky"):
        averaged(h)
    with torch.no_grad():
        edit.rotation.copy_(_edit().rotation)  # as DistributedDataParallel broadcasts it
    with pytest.raises(ReftuneError, match="cholesky"):
        edit(h)
    averaged, model = _averaged(_edit(parametrization="householder"))
    model.state_dict()  # brings the buffer up to date
    averaged.update_parameters(model)
    torch.testing.assert_close(averaged(h), model(h), rtol=0, atol=1e-5)
    averaged, model = _averaged(_edit())
    averaged.update_parameters(model)
    torch.testing.assert_close(averaged(h), model(h), rtol=0, atol=1e-5)


def test_a_householder_basis_is_never_trained_nor_counted_nor_saved() -> None:
    edit = _edit(parametrization="householder").requires_grad_(True)
    assert not edit.basis.requires_grad
    assert all(p is not edit.basis for p in edit.parameters())
    assert "basis" in dict(edit.named_parameters()) and "basis" not in edit.state_dict()
