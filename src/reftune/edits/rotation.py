"""Keeping r rows orthonormal: retraction after a step, the exact gradient, and torch's Householder map for parity.

A rotation is a plain `r x width` tensor P. A step of any optimiser pushes it off orthonormality; `retract_` brings it
back to Q, where P = LQ with L lower triangular and a positive diagonal (Gram-Schmidt over the rows). Training therefore
minimises loss(Q(P)), and `orthonormal` gives that function's gradient at an orthonormal point, where L is the identity:

    dL = Phi(dP P^T + P dP^T),   Phi: strictly lower triangle + half the diagonal,      dQ = dP - dL P
    dloss/dP = G - T P,          G = dloss/dQ, M = G P^T, T = tril(M, -1) + tril(M, -1)^T + diag(M)
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


@torch.no_grad()
def retract_(P: Float[Tensor, "*batch r width"]) -> None:
    """**Replaces `P` in place** by Gram-Schmidt over its rows, computed in float64 and rounded back.

    Does nothing, to the bit, where the rows are orthonormal already within rounding (8 eps of the dtype), so that it is
    idempotent and a reloaded rotation stays what it was. Rows without an orthonormal basis (NaN, linearly dependent)
    are left as they are: nothing is raised, and nothing waits for the device. The version counter does not move,
    because a second forward may retract between another's forward and backward, and finds nothing to do.

    Method: shifted CholeskyQR followed by CholeskyQR2 (Fukaya et al., 2020), as it needs matrix products alone.
    """
    if P.is_meta or P.ndim < 2:  # fewer dimensions: a piece of a rotation (see training.sharding)
        return
    if isinstance(P, DTensor):  # a shard of FSDP 2
        whole = P.full_tensor()
        retract_(whole)
        P.data.copy_(distribute_tensor(whole, P.device_mesh, P.placements))
        return
    compiling = torch.compiler.is_compiling()
    wide = torch.float32 if P.device.type == "mps" else torch.float64
    X = P.to(wide)
    tolerance = max(8.0 * torch.finfo(P.dtype).eps, 1e-12)
    done = _distance_from_orthonormal(X) <= tolerance
    if P.device.type == "cpu" and not compiling and bool(done.all()):
        return
    Q = _orthonormalise(X)
    usable = _distance_from_orthonormal(Q) <= 1e3 * torch.finfo(wide).eps * P.shape[-1]
    target = P.detach() if compiling else P.data
    target.copy_(torch.where(done | ~usable, P, Q.to(P.dtype)))


def orthonormal(P: Float[Tensor, "*batch r width"]) -> Float[Tensor, "*batch r width"]:
    """`P` itself, which must have been retracted, with the gradient of loss(Q(P)): see this module's docstring.

    First derivatives only. Works under `torch.func` and `torch.compile`.
    """
    return _Orthonormal.apply(P) if torch.is_grad_enabled() else P  # pyright: ignore[reportReturnType]


class _Orthonormal(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(P: Tensor) -> Tensor:
        return P.view_as(P)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (P,) = ctx.saved_tensors
        (G,) = grad_outputs
        M = G @ P.mT
        T = M.tril() + M.tril(-1).mT
        return G - T @ P


def householder(reflectors: Float[Tensor, "width r"], basis: Float[Tensor, "width width"]) -> Float[Tensor, "r width"]:
    """The rotation that torch's `orthogonal(..., "householder", use_trivialization=True)` makes of its parameter.

    The columns below the diagonal are Householder vectors, whose product is applied to `basis`. torch also multiplies
    by the integer part of the diagonal, which starts at -1 and has no gradient; here it is -1 for good, as weight decay
    turns torch's to zero, and the rotation with it.
    """
    vectors = reflectors.tril(-1)
    tau = 2.0 / (1.0 + (vectors * vectors).sum(dim=-2))
    return (basis @ -torch.linalg.householder_product(vectors, tau)).mT


@torch.no_grad()
def complete_basis(rotation: Float[Tensor, "r width"]) -> Float[Tensor, "width width"]:
    """An orthonormal basis whose first r columns are the rows of `rotation`, bit for bit."""
    basis = torch.linalg.qr(rotation.mT.double(), mode="complete").Q.to(rotation.dtype)
    basis[:, : rotation.shape[0]] = rotation.mT
    return basis


def identity_reflectors(rotation: Float[Tensor, "r width"]) -> Float[Tensor, "width r"]:
    """The parameter at which `householder` returns the first r columns of the basis, bit for bit."""
    return -torch.eye(rotation.shape[1], rotation.shape[0], dtype=rotation.dtype, device=rotation.device)


def _distance_from_orthonormal(X: Tensor) -> Tensor:
    identity = torch.eye(X.shape[-2], dtype=X.dtype, device=X.device)
    return (X @ X.mT - identity).abs().amax(dim=(-2, -1), keepdim=True)


def _orthonormalise(X: Tensor) -> Tensor:
    # Scaling the rows first is free (L absorbs it) and keeps a step of any length within range. The shift makes the
    # first Cholesky succeed up to a condition number of 1e15; the two passes without one remove what it left.
    r, width = X.shape[-2:]
    X = X / torch.linalg.vector_norm(X, dim=-1, keepdim=True)
    identity = torch.eye(r, dtype=X.dtype, device=X.device)
    shift = 11.0 * (width * r + r * (r + 1)) * torch.finfo(X.dtype).eps
    for diagonal in (shift, 0.0, 0.0):
        L, _ = torch.linalg.cholesky_ex(X @ X.mT + diagonal * identity)
        X = torch.linalg.solve_triangular(L, X, upper=False)
    return X
