"""Several tasks, base beside edited: scores, differences with their p values, and the paper's averages."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reftune.adapter.config import ReftConfig, new_adapter
from reftune.data.tokenising import Encoding
from reftune.errors import ReftuneError
from reftune.evaluation.intervals import PairedDifference
from reftune.evaluation.task_runs import PAPER, Scoring, TaskScore, difference, evaluate_task
from reftune.evaluation.tasks import GROUPS, OPTIONS, TASKS, OptionForm, expand_names, generic_option_rows
from reftune.inference.generation import GenerationSettings
from reftune.inference.loading import EditedModel, recorded_run, within_context
from reftune.models import load
from reftune.output import terminal
from reftune.output.files import write_text
from reftune.runs.jobs import Jobs
from reftune.runs.output_folder import readable_disk_errors
from reftune.runs.recipe_values import read_chat_template_kwargs

SUMMARY = "results.json"


@dataclass(frozen=True)
class TaskReport:
    """What the models (`base`, `edited`) score on each task, by task and model."""

    scores: dict[str, dict[str, TaskScore]]

    @property
    def models(self) -> list[str]:
        """The models, in the order in which they are shown."""
        return list(next(iter(self.scores.values())))

    def difference(self, task: str, metric: str) -> PairedDifference | None:
        """Edited less base, or None where one of them was not evaluated."""
        found = self.scores[task]
        return difference(found["edited"], found["base"], metric) if len(found) == 2 else None

    def averages(self) -> dict[str, dict[str, float]]:
        """For each group whose every task was evaluated, each model's mean over tasks (each counts once)."""
        return {
            group: {
                model: sum(self.scores[name][model].accuracy or 0.0 for name in names) / len(names)
                for model in self.models
            }
            for group, names in GROUPS.items()
            if set(names) <= set(self.scores)
        }

    def as_dict(self) -> dict[str, Any]:
        """Everything but the rows, as JSON values."""
        tasks: dict[str, Any] = {}
        for name, found in self.scores.items():
            tasks[name] = {model: score.as_dict() for model, score in found.items()}
            tasks[name]["scoring"] = next(iter(found.values())).scoring
            for metric in next(iter(found.values())).metrics:
                if (gap := self.difference(name, metric)) is not None:
                    tasks[name].setdefault("difference", {})[metric] = {
                        "mean": gap.mean, "low": gap.interval.low, "high": gap.interval.high, "p_value": gap.p_value
                    }  # fmt: skip
        return {"tasks": tasks, "averages": self.averages()}


def evaluate_apart(commands: Mapping[str, Sequence[str]], jobs: int, device: str | None) -> None:
    """Let processes evaluate a task each, several at a time; `evaluate_tasks` then finds their results in ``out``.

    Args:
        commands: by task, what evaluates it.
        jobs: tasks at a time, each on a GPU in turn or with its share of the cores.
        device: as the commands have it.

    Raises:
        ReftuneError: what one of them said.
    """
    processes, console = Jobs(min(jobs, len(commands)), device), terminal.console(stderr=True)

    def one(task: str) -> None:
        with processes.running(commands[task], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            said = process.communicate()[1].strip()
        if process.returncode:
            last = said.splitlines()[-1].removeprefix("Error: ") if said else "it said nothing"
            raise ReftuneError(f"task {task}: {last}")
        console.print(f"{task}: done", highlight=False)

    processes.each(one, commands)


def evaluate_tasks(
    edited: EditedModel,
    names: str | Sequence[str],
    data: str | Path | None = None,
    *,
    models: Sequence[str] = ("base", "edited"),
    scoring: Scoring = "generate",
    form: OptionForm = "label",
    template: str | None = None,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    greedy: bool = False,
    seed: int = 0,
    limit: int | None = None,
    out: Path | None = None,
    progress: bool = False,
) -> TaskReport:
    """Evaluate several tasks for several models.

    Args:
        edited: the model.
        names: tasks and groups.
        data: the file of the one task, or a folder with a file for each; None takes the Hub's datasets.
        models: of `base` and `edited`.
        scoring: as for `evaluate_task`.
        form: as for `evaluate_task`.
        template: as for `evaluate_task`.
        batch_size: prompts of one forward pass.
        max_new_tokens: longest answer, the paper's where None.
        greedy: take the likeliest token also where the paper samples.
        seed: of the sampling.
        limit: only the first rows of each task.
        out: folder for one file of results a task and model, and a summary.
        progress: show bars on stderr.

    Raises:
        ReftuneError: a task that is not known or has no data; every task's rows are read before any is evaluated.
    """
    wanted = expand_names(names)
    if data is not None and len(wanted) > 1 and not Path(data).expanduser().is_dir():
        raise ReftuneError(
            f"data={str(data)!r} is one file and there are {len(wanted)} tasks: name a folder with a file for each"
        )
    if data is None and OPTIONS in wanted:
        raise ReftuneError(
            f"the task {OPTIONS!r} is scored on a file of {{prompt, options, answer}}: give it with --data"
        )
    rows = {
        name: generic_option_rows(str(data), limit) if name == OPTIONS else TASKS[name].rows(data, limit)
        for name in wanted
    }
    scores: dict[str, dict[str, TaskScore]] = {}
    for name in wanted:
        decoding = TASKS[name].decoding if name in TASKS else GenerationSettings()
        settings = replace(
            decoding,
            batch_size=batch_size,
            seed=seed,
            max_new_tokens=max_new_tokens or decoding.max_new_tokens,
            **({"temperature": 0.0, "top_p": 1.0, "top_k": 0} if greedy else {}),
        )
        scores[name] = {
            model: evaluate_task(
                edited, name, rows[name], settings, base=model == "base", scoring=scoring, form=form,
                template=template, out=out, progress=progress,
            )
            for model in models
        }  # fmt: skip
    report = TaskReport(scores)
    if out is not None:
        with readable_disk_errors(out):
            write_text(out / SUMMARY, json.dumps(report.as_dict(), indent=2, ensure_ascii=False) + "\n")
    return report


def default_template(folder: Path | None) -> str | None:
    """As in training where the folder says how that was; otherwise the paper's prompts."""
    recorded = recorded_run(folder) if folder is not None else {}
    return None if recorded else PAPER


def base_alone(
    name: str, dtype: str | None = None, device: str | None = None, chat_template_kwargs: Any = None
) -> EditedModel:
    """A base model to be evaluated by itself (`base=True`): the edit that it carries is the identity and stays off."""
    base, tokenizer = load(name, dtype, device)
    model = new_adapter(base, ReftConfig(r=1, layers_to_transform=[0], positions="l1", task_type="CAUSAL_LM"))
    arguments = read_chat_template_kwargs(chat_template_kwargs)
    encoding = Encoding(tokenizer, on_long_prompt="error", chat_template_kwargs=arguments)
    return EditedModel(model.eval(), tokenizer, within_context(encoding, base))
