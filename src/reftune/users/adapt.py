"""One user more in a store whose users share all but a bias: `reftune adapt`.

::

    adapt_user("store", "dora", "dora.csv")                    # a line of users.jsonl: steps and losses
    adapt_user("store", "dora", "all.csv", eval_fraction=0.2, patience=2)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from rich.console import Console

from reftune.adapter.config import new_adapter
from reftune.data.formats import Example, examples_of
from reftune.data.reading import read_rows
from reftune.data.splitting import split_rows
from reftune.errors import ReftuneError
from reftune.output import terminal
from reftune.output.json_files import read_json_object
from reftune.output.locks import refuse_if_locked
from reftune.runs.fingerprint import FINGERPRINT_FILE, base_digest
from reftune.runs.output_folder import readable_disk_errors
from reftune.runs.recipe import ADAPTED, OWN_OF_A_USER, RUN_FILE, TrainRecipe
from reftune.runs.recipe_values import given, read_yaml, told_by_flag
from reftune.runs.steps import load_base
from reftune.training.prefix.switch import PrefixSwitch
from reftune.users.names import check_user_name, looks
from reftune.users.run import RESULTS_FILE, Training, by_user, encoded_users, progress, use_shared
from reftune.users.store import UserStore


def adapt_user(
    folder: str | Path, user: str, train_file: str, console: Console | None = None, **settings: Any
) -> dict[str, Any]:
    """Train the bias of one user, who is added to a store or **replaced** there; what users share stays as it is.

    The bias is that which `reftune train --share rotation` gives for the same rows and settings, which are those of the
    store's `run.yaml` where ``settings`` does not name others.

    Args:
        folder: a store with a shared part.
        user: the name.
        train_file: the user's rows; where they have the run's ``adapter_column``, the user's among them.
        console: where the progress is printed; standard error by default.
        **settings: fields of ``TrainRecipe``: those in ``reftune.runs.recipe.ADAPTED``.

    Returns:
        The line of the user in `users.jsonl`.

    Raises:
        ReftuneError: no store, or one without a shared part; another base; a name that is none; a user without rows;
            a store in training; training that diverged. The store is as it was then.
    """
    console = console or terminal.console(stderr=True)
    store = UserStore.open(Path(folder).expanduser())
    check_user_name(user)
    refuse_if_locked(store.path)
    store.check_files()
    if not store.has_shared:
        raise ReftuneError(
            f"{store.path} has no shared part, beside which a bias could be a user's own: train the store with --share "
            "rotation, or this user alone with `reftune train` and then `reftune store import`."
        )
    if (other := next((n for n in store.names() if n != user and looks(n) == looks(user)), None)) is not None:
        raise ReftuneError(f"user {user!r} and {other!r} of {store.path} are too much alike; write a name in one way.")
    recipe, named = _recipe(store, {**settings, "train_file": train_file}), "adapter_column" in given(settings)
    rows = split_rows(
        _rows_of(recipe, recipe.train_file, user, named),
        eval_fraction=recipe.eval_fraction,
        eval_rows=_rows_of(recipe, recipe.eval_file, user, named) if recipe.eval_file else None,
        seed=recipe.seed,
    )
    transformers.set_seed(recipe.seed)
    base, tokenizer = load_base(recipe)
    _check_base(store, base)
    model = new_adapter(base, PeftConfig.from_peft_type(**{**store.config, "inference_mode": False}))
    _check_shared(store, model)
    use_shared(model, store)
    users, _, encoded = encoded_users(recipe, model, tokenizer, {user: rows})
    recipe = recipe.fitted(base, encoded)
    prefixes = PrefixSwitch(recipe.prefix_reuse, None, [users[0].train])
    cohort = Training(recipe, model, tokenizer.pad_token_id, prefixes, store.path, users).cohort(users)
    with progress(console, "steps", cohort.courses[0].total, 0) as advance:
        cohort.run(lambda: advance(1))
    prefixes.close()
    kept = next(iter(store.shared().values())).dtype
    found, result = cohort.stack.stacked_tensors(), cohort.courses[0].result()
    with readable_disk_errors(store.path):
        store.write_stacked([user], {name: tensor.to(kept) for name, tensor in found.items()})
        with (store.path / RESULTS_FILE).open("a", encoding="utf-8") as results:
            results.write(json.dumps(result) + "\n")
    return result


def _recipe(store: UserStore, settings: Mapping[str, Any]) -> TrainRecipe:
    """How the store's users were trained, with other settings for this one."""
    if unknown := sorted(settings.keys() - set(ADAPTED)):
        raise ReftuneError(f"{unknown[0]} is no setting of one user: choose among {', '.join(ADAPTED)}.")
    run = store.path / RUN_FILE
    values = read_yaml(run) if run.is_file() else {"adapter_column": "user"}
    known = {name: value for name, value in values.items() if name in TrainRecipe.__dataclass_fields__}
    kept = {name: value for name, value in known.items() if name not in OWN_OF_A_USER}
    with told_by_flag(settings):
        return TrainRecipe(
            **{**kept, "share": "rotation", "model": store.base, "output": str(store.path), **given(settings)}
        )


def _rows_of(recipe: TrainRecipe, source: str, user: str, named: bool) -> list[Example]:
    """A user's rows: by the column, or all of a file that lacks it, where nobody ``named`` the column."""
    rows = read_rows(source, split=recipe.split)[: recipe.limit_rows]
    if not any(str(recipe.adapter_column) in row.values for row in rows):
        if named:
            present = ", ".join(map(str, rows[0].values))
            raise ReftuneError(
                f"{source}: there is no column {recipe.adapter_column!r} (--adapter-column) among {present}."
            )
        return examples_of(rows, columns=recipe.columns if isinstance(recipe.columns, dict) else None)
    found = by_user(recipe, rows)
    if user not in found:
        raise ReftuneError(f"{source}: user {user!r} has no rows; {recipe.adapter_column!r} names {', '.join(found)}.")
    return found[user]


def _check_base(store: UserStore, base: Any) -> None:
    known = store.path / FINGERPRINT_FILE
    if known.is_file():
        before = read_json_object(known, "restore it from a copy").get("model")
        if before is not None and before != base_digest(base):
            raise ReftuneError(
                f"{store.path} was trained on other weights than those of {store.base!r}: a bias belongs to its base."
            )


def _check_shared(store: UserStore, model: PeftModel) -> None:
    """Refuse a shared part that is not all but the biases."""
    there = store.shared()
    for name, tensor in get_peft_model_state_dict(model).items():
        if not name.endswith(".bias") and (name not in there or there[name].shape != tensor.shape):
            raise ReftuneError(
                f"{store.path}: the shared part has no {name} of shape {tuple(tensor.shape)}, and adapt trains biases "
                "alone."
            )
