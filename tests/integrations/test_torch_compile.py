"""torch.compile around an edited model: the same numbers, no graph compiled anew for the same shapes, no graph break."""

import subprocess
import sys
from pathlib import Path


def run(script: str) -> str:
    """Run a script beside this file and give back what it prints."""
    path = Path(__file__).with_name(script)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_compiled_model_gives_the_same_logits_and_gradients():
    assert "agree" in run("compiled.py")


def test_inference_is_one_graph_and_no_step_of_a_loop_is_compiled_anew():
    assert "one graph" in run("compiled_inference.py")
