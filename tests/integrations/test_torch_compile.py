"""torch.compile around an edited model: the same numbers, and no graph compiled anew for the same shapes."""

import subprocess
import sys
from pathlib import Path


def test_a_compiled_model_gives_the_same_logits_and_gradients():
    script = Path(__file__).with_name("compiled.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "agree" in done.stdout
