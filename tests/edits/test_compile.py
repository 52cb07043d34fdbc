"""Edits under `torch.compile`, in a process of its own: the type checker that tests run under cannot be compiled."""

import subprocess
import sys

_SCRIPT = """
import copy, torch
from reftune.edits import make_edit

def train(run, edit):
    optimiser = torch.optim.AdamW(edit.parameters(), lr=1e-2)
    losses = []
    for step in range(6):
        h, target = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(step))
        optimiser.zero_grad()
        loss = (run(h) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    return torch.stack(losses)

torch.set_num_threads(1)
for parametrization in ("cholesky", "householder"):
    eager = make_edit("loreft", 16, 4, init="paper", parametrization=parametrization)
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(train(compiled, other), train(eager, eager), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        h = torch.randn(8, 16)
        torch.testing.assert_close(compiled(h), eager(h), rtol=1e-5, atol=1e-5)
    for name, tensor in other.state_dict().items():
        torch.testing.assert_close(tensor, eager.state_dict()[name], rtol=1e-5, atol=1e-5)
    R = other.rotation.detach().double()
    assert (R @ R.mT - torch.eye(4, dtype=R.dtype)).abs().max() < 1e-6
    other.eval()
    torch.testing.assert_close(compiled(h), eager.eval()(h), rtol=1e-5, atol=1e-5)
"""


def test_a_compiled_edit_trains_as_an_eager_one_does_without_a_graph_break() -> None:
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
