"""Several processes that train together: how they are started, who is the first, and how all of them end.

The first process reads flags, prints and writes; the others take the recipe from it, print nothing and write only what
the trainer asks of every process. They meet in a key-value store (torch's `TCPStore`): a launcher's, or the first
process's own where it has started the others itself. What one of them fails with is left there for the first to tell.

Nothing heavy is imported at the top: `rank` and `count` are asked by every command.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from reftune.errors import ReftuneError

if TYPE_CHECKING:
    from reftune.runs.recipe import TrainRecipe

_Value = TypeVar("_Value")
_FAILURE, _RECIPE = "failure", "recipe"
_STARTED = "REFTUNE_STARTED_BY_THE_FIRST"
"""In the environment of a process that was started here, and not by a launcher."""
_LOST = ("gloo", "NCCL", "Connection", "recv")
"""What errors of torch name when another process is gone."""
_LAST_SECONDS = 30.0
"""How long a process may go on that waits for one that is dead, where the device does not tell it."""

logger = logging.getLogger(__name__)
_store: Any = None  # of the run that is going on in this process
_runs = 0  # that a launcher's processes have done


def count() -> int:
    """How many processes a launcher has started, or `together` for a run that is going on; 1 without either."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    """Which of them this one is, from 0: the first."""
    return int(os.environ.get("RANK") or 0) if count() > 1 else 0


def as_launched(recipe: TrainRecipe) -> TrainRecipe:
    """The recipe with as many processes as a launcher (torchrun, accelerate) has started, if it was one."""
    return recipe if count() in (1, recipe.processes) else dataclasses.replace(recipe, processes=count())


def device(recipe: TrainRecipe) -> str | None:
    """Where this process computes: as the recipe says; of several, each takes a GPU of its own, or all the CPU."""
    if recipe.processes == 1:
        return recipe.device
    import torch

    if recipe.device == "cpu" or not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


@contextmanager
def together(recipe: TrainRecipe) -> Iterator[None]:
    """Let `recipe.processes` processes train: a launcher's, or others that are **started** and end with the block.

    Raises:
        ReftuneError: another process has failed with it, or is gone.
    """
    global _store, _runs
    if recipe.processes == 1:
        yield
        return
    import torch.distributed as dist
    from accelerate.state import AcceleratorState

    with nullcontext(()) if count() > 1 else _others(recipe.processes) as found:
        store, *started = found or (_launchers_store(),)
        name = "run-0" if started else f"run-{_runs}"  # a launcher's store serves several runs, one after another
        _store, _runs = dist.PrefixStore(name, store), _runs + (not started)  # pyright: ignore[reportPrivateImportUsage]
        try:
            if rank() == 0:
                _store.set(_RECIPE, json.dumps(dataclasses.asdict(recipe)))
                _wait_for(started)
            _store.set(f"here-{rank()}", "")
            backend = "gloo" if device(recipe) == "cpu" else "cuda:nccl,cpu:gloo"
            dist.init_process_group(backend, store=_store, rank=rank(), world_size=count())
            yield
        except BaseException as error:
            if (told := _explained(error, started)) is not None:
                raise told from None
            raise
        finally:
            _store = None
            if dist.is_initialized():
                dist.destroy_process_group()
            AcceleratorState._reset_state(reset_partial_state=True)


def from_first(name: str, compute: Callable[[], _Value]) -> _Value:
    """What `compute` gives in the first process, in all of them; one `name` a run."""
    if _store is None:
        return compute()
    if rank() == 0:
        value = compute()
        _store.set(name, pickle.dumps(value))
        return value
    return pickle.loads(_awaited(_store, name))


@contextmanager
def first_alone(name: str) -> Iterator[None]:
    """Let the others into the block only when the first process has left it; one `name` a run."""
    if _store is not None and rank() > 0:
        _awaited(_store, name)
    yield
    if _store is not None and rank() == 0:
        _store.set(name, "")


def follow(train: Callable[[TrainRecipe], Any]) -> None:
    """Be one of the others: ``train`` the first process's recipe without a word, then **leave the process**."""
    asked = {*sys.argv[1:]}
    if "train" not in asked or asked & {"-h", "--help"}:
        return  # the first process says all there is to say
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    if _STARTED in os.environ:
        _end_with_the_first()
    from reftune.runs.recipe import TrainRecipe

    status = 0
    try:
        import torch.distributed as dist

        store = dist.PrefixStore("run-0", _launchers_store())  # pyright: ignore[reportPrivateImportUsage]
        recipe = TrainRecipe(**json.loads(_awaited(store, _RECIPE)))
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as the first process does
        train(recipe)
    except ReftuneError:
        status = 2
    except KeyboardInterrupt:
        status = 130
    except Exception:
        status = 1
    sys.exit(status)


def _awaited(store: Any, name: str) -> bytes:
    """What the first process leaves under a name, however long it takes; a signal ends the waiting."""
    while not store.check([name]):
        time.sleep(0.05)
    return store.get(name)


@functools.cache
def _launchers_store() -> Any:
    import torch.distributed as dist

    return next(dist.rendezvous("env://"))[0]  # pyright: ignore[reportPrivateImportUsage]


@contextmanager
def _others(number: int) -> Iterator[tuple[Any, ...]]:
    """The store and the other processes, started; this one is the first of them meanwhile, **by its environment**."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, number, is_master=True, wait_for_workers=False)  # pyright: ignore
    shared = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    own = {name: str(value) for name, value in {**shared, "RANK": 0, "LOCAL_RANK": 0}.items()}
    before = {name: os.environ.get(name) for name in own}
    others: list[subprocess.Popen[bytes]] = []
    over = threading.Event()
    os.environ.update(own)
    try:
        for other in range(1, number):
            environment = {**os.environ, "RANK": str(other), "LOCAL_RANK": str(other), _STARTED: "1"}
            command = [sys.executable, "-m", "reftune", "train"]
            others.append(subprocess.Popen(command, env=environment, stdin=subprocess.PIPE))
            threading.Thread(target=_watch, args=(others[-1], over), daemon=True).start()
        yield store, *others
        for process in others:
            with _suppressed_timeout():
                process.wait(_LAST_SECONDS)
    finally:
        over.set()
        for process in others:
            if process.stdin is not None:
                process.stdin.close()  # they end with it
            with _suppressed_timeout():
                process.wait(5)
            process.kill()
            process.wait()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def _suppressed_timeout() -> Iterator[None]:
    try:
        yield
    except subprocess.TimeoutExpired:
        pass


def _watch(process: subprocess.Popen[bytes], over: threading.Event) -> None:
    """End a run that waits for a dead process, on a device that does not notice."""
    if process.wait() and not over.wait(_LAST_SECONDS):
        print(f"Error: {_gone(process.returncode)}", file=sys.stderr, flush=True)
        os._exit(1)


def _wait_for(others: Sequence[subprocess.Popen[bytes]]) -> None:
    """Until the processes that were started here have come to the store.

    Raises:
        ReftuneError: one of them has not.
    """
    while not _store.check([f"here-{number}" for number in range(1, len(others) + 1)]):
        for process in others:
            if process.poll() is not None:
                raise ReftuneError(_gone(process.returncode))
        time.sleep(0.05)


def _explained(error: BaseException, started: Sequence[subprocess.Popen[bytes]]) -> BaseException | None:
    """What the first process says of an error, where it is another process's; the others leave theirs to be told."""
    lost = isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST)
    if isinstance(error, ReftuneError) and rank() == 0 or isinstance(error, KeyboardInterrupt):
        return None
    try:
        if rank() > 0:
            if not lost and not _store.check([_FAILURE]):
                mendable = isinstance(error, ReftuneError)
                said = str(error) if mendable else "".join(traceback.format_exception(error))
                _store.set(_FAILURE, json.dumps({"rank": rank(), "mendable": mendable, "said": said}))
            return None
        if _store.check([_FAILURE]):
            found = json.loads(_store.get(_FAILURE))
            if found["mendable"]:
                return ReftuneError(found["said"])
            return RuntimeError(f"process {found['rank']} of {count()} failed:\n{found['said']}")
    except RuntimeError:  # the store is gone with the process that held it
        pass
    return ReftuneError(_gone(_status_of(started))) if lost else None


def _status_of(started: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """How one of the processes that were started here ended, which its watcher may learn a moment after its silence."""
    until = time.monotonic() + 2
    while started and time.monotonic() < until:
        if status := next((one.returncode for one in started if one.returncode), None):
            return status
        time.sleep(0.02)
    return None


def _gone(status: int | None = None) -> str:
    how = "" if status is None else f" with status {status}"
    if status is not None and status < 0:
        how = f", killed by {signal.Signals(-status).name}"
    return f"another process of this run has ended{how}: what was saved goes on with --resume."


def _end_with_the_first() -> None:
    """Leave when the process that started this one closes our input, or dies."""

    def wait() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
