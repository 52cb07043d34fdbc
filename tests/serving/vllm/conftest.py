import pytest

from tests.serving.vllm.cases import Cases, write_cases


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """The cases on disk; needs no vLLM."""
    return write_cases(tmp_path_factory.mktemp("vllm_cases"))


@pytest.fixture(scope="session")
def cases(written: Cases) -> Cases:
    """The cases, for tests that start vLLM."""
    pytest.importorskip("vllm", reason="make test-vllm runs these")
    return written
