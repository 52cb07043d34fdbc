from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.vllm.cases import Cases, Engines, write_cases
from tests.serving.vllm.served import Server


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """The cases on disk; needs no vLLM."""
    return write_cases(tmp_path_factory.mktemp("vllm_cases"))


@pytest.fixture(scope="session")
def cases(written: Cases) -> Cases:
    """The cases, for tests that start vLLM."""
    pytest.importorskip("vllm", reason="make test-vllm runs these")
    return written


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where vLLM keeps what it has found out about model classes, which takes a process that imports it anew."""
    return tmp_path_factory.mktemp("vllm_cache")


@pytest.fixture(scope="session")
def engines(cases: Cases, cache: Path) -> Iterator[Engines]:
    """Starts vLLM engines."""
    engines = Engines(cache)
    yield engines
    engines.close()


@pytest.fixture(scope="session")
def server(cases: Cases, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests; it has ended when the last of them have run."""
    server = Server(cases, tmp_path_factory.mktemp("served"), cache)
    server.start()
    yield server
    if server.process is not None and server.process.poll() is None:
        server.end()
