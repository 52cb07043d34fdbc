"""What a server is told: which base, where it listens, what it takes on: the flags of `reftune serve`."""

from __future__ import annotations

from dataclasses import dataclass

from reftune.errors import ReftuneError
from reftune.runs.recipe_values import option

SERVING, LISTENING, LIMITS = "Serving", "Listening", "Limits"
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
KEYS = "REFTUNE_API_KEYS"
"""Environment variable: API keys, where no file names them."""


@dataclass(frozen=True)
class ServerSettings:
    """How to serve; validated when made.

    Raises:
        ReftuneError: naming the field, its value and the way out.
    """

    base_name: str | None = option(None, SERVING, "What requests call the base model; default: its own name.")
    dtype: str | None = option(None, SERVING, "Data type of the base; default: bfloat16 on CUDA, else float32.")
    device: str | None = option(None, SERVING, "cpu, cuda, ...; default: the best there is.")
    host: str = option("127.0.0.1", LISTENING, "Address to listen on; any but this machine's own needs API keys.")
    port: int = option(8000, LISTENING, "Port to listen on; 0: a free one.")
    api_keys: str | None = option(
        None,
        LISTENING,
        "File with a key a line: KEY [adapters=NAME,PATTERN*,...] [admin]; default: the variable REFTUNE_API_KEYS.",
        "file",
    )
    ui: bool = option(True, LISTENING, "A page at / to chat beside the base, train from a file, and look inside.")
    max_model_len: int | None = option(
        None, LIMITS, "Most tokens of prompt and answer together; default: the model's.", "tokens"
    )
    max_prompt_tokens: int | None = option(None, LIMITS, "Most tokens of a prompt; default: as they fit.", "tokens")
    max_new_tokens: int = option(4096, LIMITS, "Most tokens of an answer.", "tokens")
    max_requests: int = option(256, LIMITS, "Answers written or waiting at once; more are told 429.", "answers")
    timeout: float = option(600.0, LIMITS, "Longest time for one request.", "seconds")
    max_body: int = option(2048, LIMITS, "Largest body of a request.", "KiB")
    cache_tokens: int = option(16_384, LIMITS, "Tokens whose keys and values are kept, over all requests.", "tokens")
    batch_tokens: int = option(2048, LIMITS, "Most tokens of one forward; longer prompts are read in parts.", "tokens")
    adapter_memory: int = option(1024, LIMITS, "Adapters kept ready; others are read when they are asked for.", "MiB")

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ReftuneError(f"port={self.port}: must lie between 0 and 65535.")
        if not 0 < self.timeout <= 1e9:
            raise ReftuneError(f"timeout={self.timeout}: must be above 0 and at most 1,000,000,000 seconds.")
        least = {"max_model_len": 2, "cache_tokens": 256, "batch_tokens": 16}
        for name in ("max_prompt_tokens", "max_new_tokens", "max_requests", "max_body", "adapter_memory", *least):
            value, lowest = getattr(self, name), least.get(name, 1)
            if value is not None and not lowest <= value < 2**31:
                raise ReftuneError(f"{name}={value}: must be at least {lowest}, and below 2**31.")
        if not self.host:
            raise ReftuneError("host='': name an address, such as 127.0.0.1.")
