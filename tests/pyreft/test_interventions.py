"""pyreft's attributes and subclasses with a forward of their own."""

from typing import Any

import pytest
import torch
from torch import Tensor

import reftune.pyreft as pyreft
from reftune.errors import ReftuneError
from tests.tiny_models import TINY

WIDTH = 16


@pytest.mark.parametrize(
    "name", ["LoreftIntervention", "DireftIntervention", "ConsreftIntervention", "LobireftIntervention"]
)
def test_rotate_layer_has_orthonormal_columns_and_reads_coordinates(name: str) -> None:
    layer = getattr(pyreft, name)(embed_dim=WIDTH, low_rank_dimension=3).rotate_layer
    torch.testing.assert_close(layer.weight.mT @ layer.weight, torch.eye(3))
    h = torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(layer(h), h @ layer.weight)


def test_the_formula_written_with_pyrefts_names_is_the_edit() -> None:
    h = torch.randn(4, WIDTH)
    loreft = pyreft.LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=3)
    rotated = loreft.rotate_layer(h)
    torch.testing.assert_close(h + (loreft.learned_source(h) - rotated) @ loreft.rotate_layer.weight.mT, loreft(h))
    noreft = pyreft.NoreftIntervention(embed_dim=WIDTH, low_rank_dimension=3, add_bias=True)
    change = noreft.learned_source(h) - noreft.proj_layer(h)
    torch.testing.assert_close(h + change @ noreft.proj_layer.weight, noreft(h))
    constant = pyreft.ConsreftIntervention(embed_dim=WIDTH, low_rank_dimension=3)
    change = constant.learned_source - constant.rotate_layer(h)
    torch.testing.assert_close(h + change @ constant.rotate_layer.weight.mT, constant(h))
    with pytest.raises(AttributeError, match="rotate_layer"):
        getattr(noreft, "rotate_layer")  # noqa: B009


class Chosen(pyreft.LoreftIntervention):
    """A subclass as pyreft's composition example writes it: each row acts in the directions that it names."""

    def forward(self, base: Any, source: Any = None, subspaces: Any = None) -> Tensor:
        assert subspaces is not None and base.dim() == 3
        difference = self.act_fn(self.learned_source(base)) - self.rotate_layer(base)
        rows = [
            difference[row, :, chosen] @ self.rotate_layer.weight[..., chosen].T for row, chosen in enumerate(subspaces)
        ]
        return self.dropout((base + torch.stack(rows)).to(base.dtype))


def model_with(intervention: Any) -> Any:
    torch.manual_seed(0)
    model = TINY["llama"]()
    width = model.config.hidden_size
    place = {
        "layer": 1,
        "component": "block_output",
        "intervention": intervention(embed_dim=width, low_rank_dimension=4),
    }
    return pyreft.get_reft_model(model, pyreft.ReftConfig(representations=place)).eval()


def test_a_subclass_with_its_own_forward_gets_rows_and_subspaces() -> None:
    ids = {"input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])}
    where = {"sources->base": (None, [[[1, 3], [0, 2]]])}
    own, plain = model_with(Chosen), model_with(pyreft.LoreftIntervention)
    plain.load_state_dict(own.state_dict())
    for subspaces in ([[[0, 1], [2]]], [[[3], [0]]]):
        found = own(ids, unit_locations=where, subspaces=subspaces)[1].logits
        torch.testing.assert_close(found, plain(ids, unit_locations=where, subspaces=subspaces)[1].logits)
    assert not torch.equal(found, plain(ids, unit_locations=where)[1].logits)  # the subspaces matter


def test_a_subclass_with_its_own_forward_trains() -> None:
    model = model_with(Chosen).train()
    ids = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]]), "labels": torch.tensor([[-100, 2, 3], [-100, 5, 6]])}
    model(ids, unit_locations={"sources->base": (None, [[[0], [0]]])}, subspaces=[[[0, 1], [2, 3]]])[1].loss.backward()
    (edit,) = model.interventions.values()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in edit.parameters())


def test_rows_with_unequal_locations_are_named() -> None:
    with pytest.raises(ReftuneError, match="as many locations in each row"):
        model_with(Chosen)(
            {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]])},
            unit_locations={"sources->base": (None, [[[0, 1], [0]]])}, subspaces=[[[0], [0]]],
        )  # fmt: skip


def test_locations_may_be_repeated_for_beams() -> None:
    model = model_with(pyreft.LoreftIntervention)
    ids = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]]), "attention_mask": torch.ones(2, 3, dtype=torch.long)}

    def run(rows: list[list[int]]) -> Tensor:
        where = {"sources->base": (None, [rows])}
        return model.generate(ids, unit_locations=where, intervene_on_prompt=True, num_beams=4, max_new_tokens=3)[1]

    assert torch.equal(run([[2]] * 4 + [[1]] * 4), run([[2], [1]]))
    with pytest.raises(ReftuneError, match="have 8 rows for a batch of 2"):
        run([[2], [1]] * 4)  # not repeated row by row
