"""`TrainRecipe`: everything that decides a training run. Flags, YAML keys and `run.yaml` are all read off its fields.

To add an option: one field here with its help, and the line in `runs` (or in one of the methods below) that uses it.

Nothing heavy is imported at the top, and values are looked at before torch, transformers and PEFT are asked about them:
`reftune train --help` and a wrong flag answer at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from reftune.data.classification import NUMBER
from reftune.data.glue import GLUE
from reftune.engine.position_grammar import parse_positions
from reftune.errors import ReftuneError
from reftune.models import BUNDLED, BUNDLED_ENCODER
from reftune.runs.known_settings import (
    AUTO,
    DEFAULTS,
    KNOWN,
    STEP_ROWS,
    USUAL_TOKENS,
    affordable_tokens,
    chosen,
    learning_rate,
    learnt_tokens,
    placed,
    rows_of_a_pass,
    told_as_keys,
)
from reftune.runs.recipe_values import (
    also_known_as,
    check_names,
    coerce_fields,
    given,
    merged,
    no_type_check,
    read_chat_template_kwargs,
    read_columns,
    read_factors,
    read_labels,
    read_layers,
    read_names,
    read_yaml,
    told_by_flag,
)
from reftune.runs.recipe_values import option as _option

if TYPE_CHECKING:
    from reftune.adapter.config import ReftConfig
    from reftune.data.tokenising import Encoding

EDITS = ("consreft", "direft", "direft_orthogonal", "gated", "lobireft", "loreft", "nodireft", "noreft")
"""The library's own edits, for the help: `available_edits()` without importing torch."""
BIAS_RATE = 500.0
"""How many times the shared rate the biases take; at 0.5 to 1 a step they did best in `benchmarks/many_users`."""
_NO_EDITS = ("lora", "dora", "ia3", "prefix", "prompt", "full")
LOGGERS = ("tensorboard", "trackio", "wandb")
RUN_FILE = "run.yaml"
DEMO_DATA = "demo"
REWARDED = ("grpo", "rloo")
PREFERENCES = ("dpo", "kto", "orpo", *REWARDED)
"""Objectives of TRL."""
_LIMITS = {
    "rank": (1, 65_536),
    "batch_size": (1, 1_000_000),
    "gradient_accumulation": (1, 1_000_000),
    "limit_rows": (1, 10**12),
    "log_every": (1, 10**9),
    "processes": (1, 100_000),
    "seed": (0, 2**32 - 1),  # what numpy's generator takes
    "show": (0, 1_000_000),
    "warmup_steps": (0, 10**9),
    "weight_decay": (0, 100),
    "max_grad_norm": (0, 10**9),
    "max_length": (2, 10**9),
}
"""Least and most of the numbers that have both."""


def _auto(name: str) -> str:
    """How help says what a field is where nothing is said."""
    default, other = (DEFAULTS[task][name] for task in ("completion", "classification"))
    return f"default: {default}" + ("" if other == default else f", or {other} for classification")


DIALS = tuple(KNOWN)
"""Fields that stand for several others."""
PER_CALL = ("resume", "overwrite", "show", "quiet", *DIALS)
"""Fields that say what one call does, or that others hold when they are read: `run.yaml` leaves them out."""
COURSE = (
    "processes", "max_steps", "eval_steps", "save_steps", "save_total_limit", "report_to", "streaming", "stream_buffer",
)  # fmt: skip
"""Fields that say how a run by itself goes on."""
ALONE = (
    "resume", "show", "quiet", "adapter_column", "share", "bias_lr", "cohort_tokens", "patience", "objective",
    "factors", "reward", "answers", "answer_tokens", "beta", *COURSE,
)  # fmt: skip
"""Fields of a run by itself, which comparisons and sweeps have otherwise or not at all."""
OWN_OF_A_USER = ("train_file", "eval_file", "eval_fraction", "limit_rows", "patience", "init_from")
"""Fields of the run that a store's users come from that say nothing of a user who comes later."""
ADAPTED = (
    "train_file", "eval_file", "eval_fraction", "limit_rows", "patience", "split", "columns", "adapter_column", "dtype",
    "device", "epochs", "batch_size", "lr", "bias_lr", "warmup_ratio", "schedule", "max_grad_norm", "prefix_reuse",
    "seed",
)  # fmt: skip
"""Fields that such a user may have otherwise than the others (`reftune adapt`)."""


@no_type_check  # it takes what YAML and a command line give, and makes it the declared type itself
@dataclass(frozen=True)
class TrainRecipe:
    """What to train, on what, and where to write it; validated when made.

    Raises:
        ReftuneError: naming the field, its value and the way out.
    """

    task: Literal["completion", "classification"] = _option(
        "completion", "Data", "What is learned: a completion of each prompt, or each text's class (or a number)."
    )
    train_file: str = _option(
        "",
        "Data",
        "CSV, TSV, JSON, JSONL or Parquet file, Hub dataset name, or 'demo' (the bundled pirate).",
        aka=("data",),
    )
    eval_file: str | None = _option(None, "Data", "File of held-out rows; the best checkpoint by their loss is kept.")
    eval_fraction: float = _option(0.0, "Data", "Hold out this share of the training rows.", "share, 0 to 1")
    split: str = _option("train", "Data", "Split of a Hub dataset.")
    columns: str | dict[str, str] | None = _option(
        None, "Data", "Names of your columns: prompt=question,completion=answer.", "field=column,..."
    )
    streaming: bool = _option(
        False,
        "Data",
        "Read rows while training, for data larger than memory (.jsonl, .parquet, Hub); give max_steps too.",
    )
    stream_buffer: int = _option(
        1000, "Data", "Rows held while streaming, of which the next one is drawn.", "rows", least=1
    )
    limit_rows: int | None = _option(None, "Data", "Read only the first rows of each file.", "rows", ("max_samples",))
    template: str | None = _option(
        None, "Data", "Text around a prompt, with one %s or {prompt}; default: the tokenizer's chat template."
    )
    system_prompt: str | None = _option(None, "Data", "System message for rows without one.")
    chat_template_kwargs: str | dict[str, Any] | None = _option(
        None, "Data", "Arguments of the chat template: enable_thinking=false.", "name=value,..."
    )
    max_length: int | None = _option(
        None, "Data", "Longest row, prompt and completion; default: the model's limit.", "tokens", ("max_seq_length",)
    )
    long_prompts: Literal["error", "truncate"] = _option(
        "error", "Data", "A prompt that does not fit: 'error' names its row, 'truncate' drops its beginning."
    )
    model: str = _option(
        BUNDLED,
        "Model",
        "Base model: 'smollm2' or 'minilm' (bundled), a local folder, a .gguf file or a Hub name.",
        aka=("base_model",),
    )
    dtype: str | None = _option(
        None, "Model", "float32, bfloat16 or float16; default: bfloat16 on CUDA, else float32.", aka=("torch_dtype",)
    )
    device: str | None = _option(None, "Model", "cpu, cuda, cuda:1, mps; default: the best there is.")
    quantization: Literal["4bit", "8bit"] | None = _option(
        None, "Model", "Load the base in 4 or 8 bits (bitsandbytes; also on a CPU)."
    )
    like: Literal["blog", "paper", "serving"] | None = _option(
        None, "Adapter",
        "Settings that others use: blog (one layer, l1), paper (all layers, f7+l7), serving (nothing at decode steps).",
    )  # fmt: skip
    budget: Literal["tiny", "small", "full"] | None = _option(
        None, "Adapter",
        "Rank, layers, positions at once: tiny (1, one layer, l1), small (1, all, l1+generated), full (8, all, all).",
    )  # fmt: skip
    method: str = _option(
        AUTO, "Adapter", f"The edit: {', '.join(EDITS)}, or a registered name; {_auto('method')}.", aka=("edit",)
    )
    rank: int = _option(
        AUTO, "Adapter", f"Dimensions of the edited subspace; {_auto('rank')}.", "dimensions",
        ("r", "low_rank_dimension"),
    )  # fmt: skip
    layers: str | int | list[int] = _option(
        AUTO, "Adapter",
        f"Layers to edit, from 0: 8, 3,9,18 or all; -1 is the last, 8/32 the one as deep as 8 is of 32; "
        f"{_auto('layers')}.",
        "layer numbers", ("layers_to_transform",),
    )  # fmt: skip
    positions: str = _option(
        AUTO, "Adapter",
        "Tokens to edit: fN first N of the prompt, lN last N, fA+lB both, prompt all of it, all every token; "
        f"+generated adds those after the prompt; {_auto('positions')}.",
        aka=("position",),
    )  # fmt: skip
    component: str = _option(
        "block_output", "Adapter", "Where in the layer: block_output, mlp_output, attention_output, ..."
    )
    share_weights: bool = _option(True, "Adapter", "One edit for the first and the last tokens, or one for each.")
    dropout: float = _option(
        0.0, "Adapter", "Chance that an element of the edit is dropped in training.", "share, 0 to 1"
    )
    act_fn: str | None = _option(None, "Adapter", "Activation inside the edit (relu, gelu, ...); default: linear.")
    init: Literal["identity", "paper"] = _option(
        "identity", "Adapter", "Start as the base model ('identity') or at random as the paper's code ('paper')."
    )
    init_from: str | None = _option(
        None, "Adapter", "Start from the direction of this adapter folder, which `reftune steer` wrote."
    )
    parametrization: Literal["cholesky", "householder"] = _option(
        "cholesky", "Adapter", "How a rotation is kept orthonormal; 'householder' takes pyreft's steps."
    )
    epochs: float = _option(3.0, "Training", "Passes over the training rows.", "epochs", ("num_train_epochs",))
    batch_size: int | Literal["auto"] = _option(
        8, "Training",
        "Rows of one forward pass; auto: as many as memory takes, of steps of 8 rows.",
        "rows", ("per_device_train_batch_size",),
    )  # fmt: skip
    gradient_accumulation: int = _option(
        1, "Training", "Forward passes of one optimiser step.", "passes", ("gradient_accumulation_steps",)
    )
    lr: float | Literal["auto"] = _option(
        AUTO, "Training",
        "Peak learning rate; auto: by the model's width, the number of edited layers and the tokens of a step "
        f"(for classification {DEFAULTS['classification']['lr']:g}).",
        "per step", ("learning_rate",),
    )  # fmt: skip
    warmup_ratio: float = _option(
        0.0, "Training", "Share of the steps in which the learning rate rises.", "share, 0 to 1"
    )
    warmup_steps: int | None = _option(None, "Training", "The same as a number of steps.", "steps")
    weight_decay: float = _option(0.0, "Training", "Weight decay of AdamW.", "per step")
    optimizer: str | None = _option(
        None,
        "Training",
        "adamw_torch, paged_adamw_32bit, ... as transformers names them; default: AdamW.",
        aka=("optim",),
    )
    schedule: str = _option(
        "linear", "Training", "How the learning rate falls: linear, cosine, constant, ...", aka=("lr_scheduler_type",)
    )
    max_grad_norm: float = _option(1.0, "Training", "Clip the gradient to this norm.", "norm")
    gradient_checkpointing: bool = _option(
        False, "Training", "Recompute activations in backward: less memory, more time."
    )
    prefix_reuse: Literal["auto", "on", "off"] = _option(
        "auto", "Training", "Compute what the edit leaves alone once: 'auto' where it is exact, 'on' insists."
    )
    seed: int = _option(42, "Training", "Seed of initialisation, row order, dropout and held-out rows.")
    log_every: int | None = _option(
        None, "Training", "Log the loss so often; default: about 100 times.", "steps", ("logging_steps",)
    )
    max_steps: int | None = _option(
        None, "Training", "Stop after so many optimiser steps, whatever the epochs.", "steps", least=1
    )
    eval_steps: int | None = _option(
        None, "Training", "Evaluate on the held-out rows so often; default: after each epoch.", "steps", least=1
    )
    patience: int | None = _option(
        None, "Training", "Stop after so many evaluations without a lower held-out loss; default: never.", "times",
        ("early_stopping_patience",), least=1,
    )  # fmt: skip
    processes: int = _option(
        1,
        "Training",
        "Processes that train together, each on a GPU of its own, or all on the CPU; a launcher's (torchrun): its own.",
        "processes",
        ("num_processes", "nproc_per_node"),
    )
    objective: Literal["completion", "reps", "reft-r1", "dpo", "kto", "orpo", "grpo", "rloo"] = _option(
        "completion",
        "Objective",
        "What is minimised: the answer's loss; on pairs (columns positive, negative) a preference between the two "
        "answers (reps), or the loss of both under a direction that detects itself (reft-r1); by TRL: preferences on "
        "rows with chosen and rejected (dpo, orpo) or completion and label (kto), or minus the --reward of answers "
        "that the model writes to each prompt (grpo, rloo).",
    )
    reward: str | None = _option(
        None,
        "Objective",
        "grpo, rloo: FILE.py:function, called as TRL does with prompts, completions and the rows' columns, or numeric: "
        "1 where the last number is that of the column answer (the default).",
    )
    answers: int = _option(8, "Objective", "grpo, rloo: answers written to each prompt, which are compared.", least=2)
    answer_tokens: int = _option(128, "Objective", "grpo, rloo: longest answer.", "tokens", least=1)
    beta: float | None = _option(
        None,
        "Objective",
        "dpo, kto, orpo, grpo, rloo: weight of the unedited model; default: TRL's.",
    )
    factors: str | float | list[float] | None = _option(
        None,
        "Objective",
        "reps: strengths of the edit in training, 2,4,6; each step draws one; default: 1.",
        "strengths",
    )
    test_file: str | None = _option(
        None, "Classification", "File of rows to test the best checkpoint on (for MNLI: the mismatched ones)."
    )
    split_eval: bool = _option(
        False, "Classification", "Part of the held-out rows chooses the checkpoint, the rest is the test (GLUE)."
    )
    glue: Literal["mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb"] | None = _option(
        None, "Classification", "The GLUE task whose columns, classes and metrics these are."
    )
    labels: str | list[str] | None = _option(
        None,
        "Classification",
        "Class names in the order of their numbers (no,yes), or 'number'; default: as in the file.",
        "name,name,...",
        ("label_names",),
    )
    metric: Literal["accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman"] | None = _option(
        None, "Classification", "What chooses the checkpoint; default: GLUE's own, accuracy, or correlation."
    )
    adapter_column: str | None = _option(
        None, "Users", "Column that says whose row it is: every user gets an edit, in the store --output.",
        aka=("users", "user_column"),
    )  # fmt: skip
    share: Literal["rotation"] | None = _option(
        None, "Users", "'rotation': learn R and W once, on all users' rows, and then a bias of each user alone."
    )
    bias_lr: float | None = _option(
        None, "Users", f"With --share: peak learning rate of the biases; default: {BIAS_RATE:g} times --lr.", "per step"
    )
    cohort_tokens: int | None = _option(
        None, "Users", "Tokens of a forward, which decide how many users train together; default: 512, on a GPU 8192.",
        "tokens", least=1,
    )  # fmt: skip
    output: str = _option("out", "Output", "Folder of the adapter, its metrics, curve and card.", aka=("output_dir",))
    save_steps: int | None = _option(
        None, "Output", "Save a checkpoint so often; default: after each evaluation, or each epoch.", "steps", least=1
    )
    save_total_limit: int | None = _option(
        None, "Output", "Keep so many of the newest checkpoints, and the best; default: 2.", "checkpoints", least=1
    )
    resume: bool = _option(False, "Output", "Go on from the newest whole checkpoint in the output folder.")
    overwrite: bool = _option(False, "Output", "Start again although the output folder holds an unfinished run.")
    show: int = _option(0, "Output", "Print so many tokenised rows first, edited and learnt tokens marked.", "rows")
    quiet: bool = _option(False, "Output", "Print neither the plan nor the progress.")
    tensorboard: bool = _option(True, "Output", "Write TensorBoard logs to <output>/runs.")
    wandb: bool = _option(False, "Output", "Log to Weights & Biases.")
    report_to: str | list[str] | None = _option(
        None,
        "Output",
        "Log to trackio, wandb, tensorboard, several of them, or none; in place of the two above.",
        "name,name,...",
    )

    def __post_init__(self) -> None:
        coerce_fields(self, {name: AUTO for name in DEFAULTS["completion"]})
        for name, value in chosen("shared" if self.share else self.task, self.like, self.budget).items():
            if getattr(self, name) == AUTO:
                object.__setattr__(self, name, value)
        if self.glue and not self.train_file:
            object.__setattr__(self, "train_file", GLUE[self.glue].source)
        if not self.train_file:
            raise ReftuneError("There is nothing to train on: give --train-file FILE (or the key train_file).")
        object.__setattr__(self, "layers", read_layers(self.layers))
        object.__setattr__(self, "positions", parse_positions(self.positions).text)
        object.__setattr__(self, "columns", read_columns(self.columns))
        object.__setattr__(self, "labels", read_labels(self.labels))
        object.__setattr__(self, "chat_template_kwargs", read_chat_template_kwargs(self.chat_template_kwargs))
        object.__setattr__(self, "factors", read_factors(self.factors))
        object.__setattr__(self, "report_to", read_names("report_to", self.report_to, (*LOGGERS, "none")))
        self._check_task()
        self._check_users()
        self._check_objective()
        for name, (least, most) in _LIMITS.items():
            value = getattr(self, name)
            if value not in (None, AUTO) and not least <= value <= most:
                raise ReftuneError(f"{name}={value}: must be at least {least} and at most {most:,}.")
        for name, most in (("epochs", 1_000_000), ("lr", 100), ("bias_lr", 100_000)):
            if getattr(self, name) not in (None, AUTO) and not 0 < getattr(self, name) <= most:
                raise ReftuneError(f"{name}={getattr(self, name)}: must be above 0 and at most {most:,}.")
        for name in ("eval_fraction", "warmup_ratio", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ReftuneError(f"{name}={getattr(self, name)}: must be at least 0 and below 1.")
        if self.eval_file and self.eval_fraction:
            raise ReftuneError("eval_file and eval_fraction are both given: held-out rows come from one of them.")
        if self.like and self.budget:
            raise ReftuneError("like and budget are both given: each decides rank, layers and positions; keep one.")
        if self.warmup_ratio and self.warmup_steps is not None:
            raise ReftuneError(
                f"warmup_steps={self.warmup_steps}: warmup_ratio={self.warmup_ratio:g} is given too; keep one of them."
            )
        if self.method.lower() in _NO_EDITS:
            raise ReftuneError(f"method={self.method!r} is no edit: `reftune compare` trains it beside them.")
        self._check_processes()
        self._check_steps()
        self._check_streaming()
        self._check_libraries_names()
        if self.layers == "all" or not isinstance(self.layers, str):
            self.adapter_config()
        else:  # 8/32: which layer that is depends on the model
            replace(self, layers="all")

    def _check_users(self) -> None:
        """Refuse what has no meaning for many users, or for a single adapter."""
        if self.adapter_column is None:
            for name in ("cohort_tokens", "share", "bias_lr"):
                if (value := getattr(self, name)) is not None:
                    raise ReftuneError(f"{name}={value!r} is of many users: give adapter_column too.")
            return
        if self.bias_lr is not None and self.share is None:
            raise ReftuneError(f"bias_lr={self.bias_lr:g} is the rate of biases beside a shared part: give share too.")
        unfit = {
            "task": self.task == "classification" and "classifiers are trained one by one",
            "optimizer": self.optimizer not in (None, "adamw_torch") and "each user's steps are AdamW's; leave it out",
            "schedule": self.schedule in ("greedy", "reduce_lr_on_plateau") and "use linear, cosine or constant",
            "parametrization": self.parametrization != "cholesky" and "use cholesky",
            "wandb": self.wandb and "what training came to is in users.jsonl",
            "objective": self.objective != "completion" and "users are trained on their answers",
            "max_steps": self.max_steps and "users have steps of their own",
            "eval_steps": self.eval_steps and "users are evaluated after each epoch",
            "save_steps": self.save_steps and "it is saved now and then",
            "report_to": self.report_to and "what training came to is in users.jsonl",
            "processes": self.processes > 1 and "users are trained in one process",
            "show": self.show and "it shows one adapter's rows; leave it out",
        }
        for name, why in unfit.items():
            if why:
                raise ReftuneError(f"{name}={getattr(self, name)!r} does not go with adapter_column: {why}.")

    def _check_processes(self) -> None:
        """Refuse what several processes cannot do together."""
        if self.processes == 1:
            return
        name = f"processes={self.processes}"
        if self.objective != "completion":
            raise ReftuneError(f"{name} does not go with objective={self.objective!r}: leave one of the two out.")
        if self.device not in (None, "cpu", "cuda"):
            raise ReftuneError(f"{name} take a device each, not device={self.device!r}: use cpu or cuda, or none.")

    def _check_streaming(self) -> None:
        """Refuse what needs all rows at once."""
        if not self.streaming:
            return
        if self.max_steps is None:
            raise ReftuneError("streaming=true: nobody knows how many rows will come; say when to stop with max_steps.")
        unfit = {
            "task": self.task == "classification" and "classes are found in all rows",
            "objective": self.objective != "completion" and "use completion",
            "adapter_column": self.adapter_column is not None and "users' rows are sorted",
            "eval_fraction": self.eval_fraction and "held-out rows need a file of their own; give eval_file",
            "show": self.show and "leave it out",
        }
        for name, why in unfit.items():
            if why:
                raise ReftuneError(f"{name}={getattr(self, name)!r} does not go with streaming: {why}.")

    def _check_steps(self) -> None:
        """Refuse evaluations that are not asked for, and checkpoints between them: the best one must have a loss."""
        evaluates = bool(self.eval_file or self.eval_fraction or self.glue)
        for name in ("patience", "eval_steps"):
            if getattr(self, name) is not None and not evaluates:
                raise ReftuneError(
                    f"{name}={getattr(self, name)} goes by the held-out loss: give eval_file or eval_fraction."
                )
        if evaluates and self.save_steps and self.save_steps % (self.eval_steps or self.save_steps):
            raise ReftuneError(
                f"save_steps={self.save_steps}: a checkpoint needs its held-out loss; give a multiple of "
                f"eval_steps={self.eval_steps}."
            )

    def _check_libraries_names(self) -> None:
        """Refuse an optimizer or a schedule that transformers does not have; their defaults need no look."""
        if self.optimizer is not None:
            from transformers.training_args import OptimizerNames

            optimizers = [name.value for name in OptimizerNames]
            if self.optimizer not in optimizers:
                close = difflib.get_close_matches(self.optimizer, optimizers, n=3)
                raise ReftuneError(f"optimizer={self.optimizer!r}: choose one of {', '.join(close or optimizers)}.")
        if self.schedule != "linear":
            from transformers.trainer_utils import SchedulerType

            schedules = [kind.value for kind in SchedulerType]
            if self.schedule not in schedules:
                raise ReftuneError(f"schedule={self.schedule!r}: choose one of {', '.join(schedules)}.")

    def _check_task(self) -> None:
        """Refuse options that the other task alone has."""
        classifies = self.task == "classification"
        others = (
            ("template", "system_prompt", "chat_template_kwargs", *DIALS)
            if classifies
            else ("test_file", "split_eval", "glue", "labels", "metric")
        )
        for name in others:
            if getattr(self, name):
                way_out = "leave it out" if classifies else "set task: classification"
                raise ReftuneError(f"{name}={getattr(self, name)!r} has no meaning for task={self.task!r}: {way_out}.")
        if classifies and self.prefix_reuse == "on":
            raise ReftuneError("prefix_reuse='on' is not possible for a classifier: use 'auto' or 'off'.")
        if self.glue and self.labels:
            raise ReftuneError(f"labels={self.labels!r}: glue={self.glue!r} has its own; leave one of the two out.")
        numbers = not GLUE[self.glue].labels if self.glue else self.labels == NUMBER if self.labels else None
        if self.metric and numbers is not None and numbers != (self.metric in ("pearson", "spearman")):
            of = "a number" if numbers else "classes"
            raise ReftuneError(f"metric={self.metric!r} does not measure {of}; leave it out, or name one that does.")

    def _check_objective(self) -> None:
        """Refuse what an objective on pairs cannot be combined with."""
        name = f"objective={self.objective!r}"
        if self.factors is not None and self.objective != "reps":
            raise ReftuneError(f"factors={self.factors} has a meaning for objective='reps' alone: leave it out.")
        if self.objective not in PREFERENCES:
            for field in ("reward", "beta"):
                if getattr(self, field) is not None:
                    raise ReftuneError(f"{field}={getattr(self, field)!r} has no meaning for {name}: leave it out.")
        if self.objective == "completion":
            return
        if self.task == "classification":
            raise ReftuneError(f"{name} has no meaning for task='classification': leave it out.")
        if self.objective in PREFERENCES:
            return self._check_preferences(name)
        if self.gradient_checkpointing:
            raise ReftuneError(f"{name} is not possible with gradient_checkpointing: leave one of the two out.")
        if self.objective == "reft-r1":
            several = self.layers == "all" or isinstance(self.layers, list)
            if self.method != "lobireft" or self.rank != 1 or several:
                raise ReftuneError(f"{name} trains one vector: set method: lobireft, rank: 1, and a single layer.")
            if self.prefix_reuse == "on":
                raise ReftuneError(f"prefix_reuse='on' is not possible with {name}: use 'auto' or 'off'.")

    def _check_preferences(self, name: str) -> None:
        """Refuse what TRL's objectives cannot be combined with."""
        if self.prefix_reuse == "on":
            raise ReftuneError(f"prefix_reuse='on' is not possible with {name}: use 'auto' or 'off'.")
        for field in ("init_from", "show"):
            if getattr(self, field):
                raise ReftuneError(f"{field}={getattr(self, field)!r} is not possible with {name}: leave it out.")
        if self.beta is not None and not 0 <= self.beta <= 1000:
            raise ReftuneError(f"beta={self.beta:g}: must be at least 0 and at most 1,000.")
        if self.batch_size == AUTO:
            raise ReftuneError(f"batch_size='auto' is not possible with {name}: give a number of rows.")
        rows = self.rows_of_a_step
        if self.objective in REWARDED and rows % self.answers:
            raise ReftuneError(
                f"batch_size={self.batch_size}: a step takes {rows} answers, which must be a multiple of the "
                f"{self.answers} of a prompt (--answers)."
            )
        if self.objective not in REWARDED:
            for item in fields(self):
                value = getattr(self, item.name)
                if item.name in ("reward", "answers", "answer_tokens") and value != item.default:
                    raise ReftuneError(f"{item.name}={value!r} has no meaning for {name}: leave it out.")
        if self.objective == "kto" and self.batch_size < 2:
            raise ReftuneError(f"batch_size={self.batch_size}: kto compares the rows of a batch, so at least 2.")

    def adapter_config(self, head: Sequence[str] = ()) -> ReftConfig:
        """The adapter as PEFT takes it; `head`: a classifier's modules that are trained and saved whole."""
        from reftune.adapter.config import ReftConfig

        layers: Any = self.layers
        with told_as_keys():
            return ReftConfig(
                method=self.method, r=self.rank, layers_to_transform=layers, component=self.component,
                positions=self.positions, share_weights=self.share_weights, dropout=self.dropout, act_fn=self.act_fn,
                init=self.init, parametrization=self.parametrization,
                task_type="SEQ_CLS" if self.task == "classification" else "CAUSAL_LM",
                modules_to_save=list(head) or None,
            )  # fmt: skip

    def fitted(self, base: Any, rows: Any = None) -> TrainRecipe:
        """The recipe with numbers in place of what depends on the base model, and, with rows, on what is trained.

        Args:
            base: decides which layers are as deep as `8/32`.
            rows: tokenised ones to train on; they decide, with the base, an `auto` learning rate and batch size.

        Raises:
            ReftuneError: a layer or component that the model does not have.
        """
        from reftune.engine.sites import find_sites

        found: TrainRecipe = self
        with told_as_keys():
            if isinstance(found.layers, str) and found.layers != "all":
                depth = len(find_sites(base, found.component, "all"))
                found = replace(found, layers=placed(found.layers, depth))
            if rows is not None and found.batch_size == AUTO:
                together = max(1, STEP_ROWS // found.processes) * found.gradient_accumulation
                size = rows_of_a_pass(together, max(map(len, rows["input_ids"])), affordable_tokens(base))
                found = replace(found, batch_size=size, gradient_accumulation=together // size)
            if rows is not None and found.lr == AUTO:
                sites = find_sites(base, found.component, found.layers)
                step = min(found.rows_of_a_step, len(rows))
                tokens = step * learnt_tokens(rows) / len(rows) if self.objective not in PREFERENCES else USUAL_TOKENS
                width = max(site.width for site in sites)
                found = replace(found, lr=learning_rate(width, found.rank, len(sites), tokens))
        return found

    def encoding(self, tokenizer: Any) -> Encoding:
        """How rows become tokens."""
        from reftune.data.tokenising import Encoding

        arguments = self.chat_template_kwargs if isinstance(self.chat_template_kwargs, dict) else None
        return Encoding(tokenizer, self.template, self.system_prompt, self.max_length, self.long_prompts, arguments)

    @property
    def rows_of_a_step(self) -> int:
        """Rows of one optimiser step, over all processes."""
        return int(self.batch_size) * self.gradient_accumulation * self.processes

    def full_path(self, name: str) -> Any:
        """A field that may be a local path, in full where it is one; a Hub name or None stays."""
        value = getattr(self, name)
        if not value or value in (DEMO_DATA, BUNDLED, BUNDLED_ENCODER) or not Path(value).expanduser().exists():
            return value
        return str(Path(value).expanduser().resolve())

    def to_yaml(self) -> str:
        """The recipe as `run.yaml` holds it: every key, local files by their full path, ready to run again anywhere."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in PER_CALL}
        values |= {
            name: self.full_path(name) for name in ("train_file", "eval_file", "test_file", "model", "init_from")
        }
        if self.reward and Path(place := self.reward.rpartition(":")[0]).expanduser().is_file():
            values["reward"] = f"{Path(place).expanduser().resolve()}:{self.reward.rpartition(':')[2]}"
        values["output"] = str(Path(self.output).expanduser().resolve())
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def recipe_fields() -> list[Field[Any]]:
    """The fields in order: what a command line or a table of options is made from."""
    return list(fields(TrainRecipe))


def adapter_keys() -> list[str]:
    """The fields that describe an edit, `method` first."""
    return [item.name for item in recipe_fields() if item.metadata["group"] == "Adapter" and item.name not in DIALS]


def resolve_recipe(path: str | Path | None = None, flags: Mapping[str, Any] | None = None) -> TrainRecipe:
    """Make a recipe from a YAML file and flags, which win.

    Args:
        path: a recipe, or a folder with a `run.yaml`; None for flags alone.
        flags: values by field name; None means "not given".

    Raises:
        ReftuneError: a file that is missing or not YAML, a key that does not exist, a value out of range.
    """
    if path is None:
        with told_by_flag(flags):
            return TrainRecipe(**given(flags))
    path = Path(path).expanduser()
    path = path / RUN_FILE if path.is_dir() else path
    values = read_yaml(path)
    check_names(values, also_known_as(TrainRecipe), f"recipe {path}")
    try:
        with told_by_flag(flags):
            return TrainRecipe(**merged(values, flags))
    except ReftuneError as error:
        if any(str(error).startswith((f"{name}=", f"{name} ")) for name in values.keys() - given(flags).keys()):
            raise ReftuneError(f"{path}: {error}") from None
        raise
