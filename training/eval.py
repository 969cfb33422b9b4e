"""lm-evaluation-harness on the model in memory, while it is trained."""

from __future__ import annotations

import copy
import difflib
import logging
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from torch import nn
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from privatelora.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

PREFIX = "eval_harness"
"""Metrics are logged as ``eval_harness/TASK/METRIC``; TensorBoard shows ``eval/harness/...``."""
SEED = 1234
"""Of every evaluation, so that they all see the same few-shot examples and samples."""
BOOTSTRAP_ITERATIONS = 1000
"""Only for metrics whose standard error has no closed form, such as F1."""
_TASK_FILES = (".yaml", ".yml")


class EvalHarnessCallback(TrainerCallback):
    """Evaluates tasks of lm-evaluation-harness during training, and logs what they give.

    The harness runs on the Trainer's model as it is in memory, at steps ``eval_start``,
    ``eval_start + eval_steps`` and so on, before the first step of a fresh run if
    ``do_init_eval``, and after the last one if that is not among them. Metrics and their
    standard errors go through ``Trainer.log``: into the state's log history, TensorBoard and
    whatever else listens, as ``eval_harness/TASK/METRIC`` and ``eval_harness/TASK/METRIC_stderr``
    (with ``/FILTER`` behind it where a task has filters).

    Training goes on as if nothing had happened: random state, training mode of every module,
    ``requires_grad``, ``config.use_cache`` and tokenizer are those of before. With several
    processes each one evaluates everything, since a sharded model needs all of them in every
    forward pass, and the first one logs.

    >>> trainer = Trainer(model=model, args=args, train_dataset=dataset)
    >>> trainer.add_callback(EvalHarnessCallback(
    ...     trainer=trainer, tokenizer=tokenizer, tasks=["piqa", "my_task.yaml"], eval_steps=100))
    """

    def __init__(
        self,
        trainer: Trainer,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Sequence[str],
        eval_steps: int = 100,
        eval_start: int | None = None,
        do_init_eval: bool = True,
        eval_batch_size: int | None = None,
        limit: int | None = None,
    ) -> None:
        """Load the tasks.

        ``tasks``: names the harness knows, paths of YAML task files, or folders of such files;
        relative ``data_files`` in a file are looked for beside it first. ``eval_start``: by
        default ``eval_steps``. ``eval_batch_size``: by default that of the Trainer's own
        evaluation. ``limit``: examples of each task, by default all. Raises ConfigError if
        lm-eval is not installed, a number is not positive, or a task is unknown or cannot be
        loaded.
        """
        for name, number in (
            ("eval_steps", eval_steps),
            ("eval_batch_size", eval_batch_size),
            ("limit", limit),
        ):
            if number is not None and number < 1:
                raise ConfigError(f"{name} is {number}; give 1 or more")
        if eval_start is not None and eval_start < 0:
            raise ConfigError(f"eval_start is {eval_start}; give the number of a step, 0 or more")
        self._trainer = trainer
        # A copy, because the harness may give it a padding token and turns its padding side.
        self._tokenizer = copy.deepcopy(tokenizer)
        with _same_random_state():
            self._task_dict = load_tasks(tasks)
        self._eval_steps = eval_steps
        self._eval_start = eval_steps if eval_start is None else eval_start
        self._do_init_eval = do_init_eval
        self._batch_size = eval_batch_size or trainer.args.per_device_eval_batch_size
        self._limit = limit
        self._evaluated_step = -1

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Evaluate the model that training starts with; not when a run is resumed."""
        self._evaluated_step = -1
        if self._do_init_eval and state.global_step == 0:
            self._evaluate(state, control)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Evaluate if it is this step's turn."""
        since_start = state.global_step - self._eval_start
        due = since_start >= 0 and since_start % self._eval_steps == 0
        if due or state.global_step >= state.max_steps:
            self._evaluate(state, control)

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Evaluate at the end of a training that stopped early.

        Not when training ends, because by then TensorBoard's file is closed.
        """
        if control.should_training_stop and state.global_step != self._evaluated_step:
            self._evaluate(state, control)

    def _evaluate(self, state: TrainerState, control: TrainerControl) -> None:
        self._evaluated_step = state.global_step
        model = _runnable(self._trainer)
        with _same_random_state(), _left_as_it_was(model):
            metrics = self._metrics(model)
        if self._trainer.is_world_process_zero():
            # Trainer.log takes back a request to log the loss of this very step.
            should_log = control.should_log
            self._trainer.log(metrics)
            control.should_log = should_log

    def _metrics(self, model: nn.Module) -> dict[str, float]:
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        random.seed(SEED)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        for task in self._task_dict["tasks"].values():
            task.set_fewshot_seed(SEED)
        with _quiet():
            harness_model: Any = HFLM
            found = lm_eval.evaluate(
                lm=harness_model(
                    pretrained=model, tokenizer=self._tokenizer, batch_size=self._batch_size
                ),
                task_dict=self._task_dict,
                limit=self._limit,
                bootstrap_iters=BOOTSTRAP_ITERATIONS,
                log_samples=False,
            )
        return dict(_named(found["results"] if found is not None else {}))


def load_tasks(tasks: Sequence[str]) -> Any:
    """Return the harness' own table of tasks and groups, by names and paths.

    Raises ConfigError if lm-eval is not installed, or a task is unknown or cannot be loaded.
    """
    try:
        import lm_eval.models.huggingface  # noqa: F401 - missing is found now, not at step 100
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            "evaluation during training needs lm-evaluation-harness; install it with "
            "pip install 'privatelora[eval]'"
        ) from error
    if isinstance(tasks, str) or not tasks:
        raise ConfigError("tasks: give a list of at least one task")
    with _quiet():
        # Indexing the harness' own tasks takes seconds, which local files need not wait for.
        own = [task for task in tasks if not _is_path(task)]
        manager = TaskManager(include_defaults=bool(own))
        table: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
        for task in tasks:
            for source in _files(task) if _is_path(task) else [task]:
                _merge(table, _load(manager, source), str(source))
    for task in table["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return table


def _is_path(task: str) -> bool:
    return task.endswith(_TASK_FILES) or Path(task).is_dir()


def _files(task: str) -> list[Path]:
    """The task files that a path means."""
    from lm_eval.tasks import TaskManager

    path = Path(task).expanduser().resolve()
    if not path.is_dir():
        if not path.is_file():
            raise ConfigError(f"tasks: the task file {task} does not exist")
        return [path]
    inside = TaskManager(include_path=str(path), include_defaults=False)
    files = {inside.task_index[name].yaml_path for name in inside.all_subtasks}
    if not files:
        raise ConfigError(f"tasks: the folder {task} holds no task file (.yaml with a task: name)")
    return sorted(file for file in files if file is not None)


def _load(manager: Any, source: str | Path) -> Any:
    if isinstance(source, str) and source not in manager.task_index:
        close = difflib.get_close_matches(source, manager.all_tasks, n=1)
        advice = f"did you mean {close[0]}?" if close else "lm_eval ls tasks lists what there is"
        raise ConfigError(
            f"tasks: lm-evaluation-harness has no task {source!r}; {advice} "
            "A task of your own is named by the path of its .yaml file"
        )
    try:
        if isinstance(source, str):
            return manager.load([source])
        return _load_file(manager, source)
    except ConfigError:
        raise
    except Exception as error:  # task files hold code, and data sets come from anywhere
        reason = str(error).partition("\n")[0][:300] or type(error).__name__
        raise ConfigError(f"tasks: {source} cannot be loaded: {reason}") from error


def _load_file(manager: Any, path: Path) -> Any:
    """Load one task file; its relative ``data_files`` are meant from its own folder."""
    config = yaml.load(path.read_bytes(), Loader=_TagBlindLoader)
    if not isinstance(config, dict) or not isinstance(
        config.get("task") or config.get("group"), str
    ):
        raise ConfigError(f"tasks: {path} is no task file: it has no task: name")
    arguments = config.get("dataset_kwargs")
    if not isinstance(arguments, dict) or "data_files" not in arguments:
        return manager.load([str(path)])
    changed = {
        "include": str(path),
        "dataset_kwargs": {
            **arguments,
            "data_files": _beside(arguments["data_files"], path.parent),
        },
    }
    with tempfile.TemporaryDirectory() as directory:
        including = Path(directory) / path.name
        including.write_text(yaml.safe_dump({"task": config["task"], **changed}))
        return manager.load([str(including)])


def _beside(value: Any, folder: Path) -> Any:
    """``value`` with every file that is in ``folder`` named by its full path."""
    if isinstance(value, dict):
        return {key: _beside(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_beside(item, folder) for item in value]
    return str(folder / value) if (folder / str(value)).exists() else value


def _merge(table: dict[str, dict[str, Any]], loaded: dict[str, Any], source: str) -> None:
    twice = table["tasks"].keys() & loaded["tasks"].keys()
    if twice:
        raise ConfigError(f"tasks: {source} names task {min(twice)} a second time; leave one out")
    for kind, entries in loaded.items():
        table[kind].update(entries)


class _TagBlindLoader(yaml.SafeLoader):
    """Reads task files without running the code that their ``!function`` tags name."""


_TagBlindLoader.add_multi_constructor("!", lambda loader, suffix, node: None)


def _named(results: dict[str, dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """Metrics under tidy names, from those like ``acc_stderr,none`` by task."""
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, comma, filter_name = key.partition(",")
            if comma and isinstance(value, (int, float)):
                behind = "" if filter_name == "none" else f"/{filter_name}"
                yield f"{PREFIX}/{task}/{metric}{behind}", float(value)


def _runnable(trainer: Trainer) -> nn.Module:
    """The Trainer's model as something the harness can call."""
    model: Any = trainer.model
    # FSDP's outermost wrapper is what gathers the parameters that no layer owns.
    if not trainer.is_fsdp_enabled:
        # Mixed precision stays as it is in training: taking it off would change the model itself.
        model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=True)
    runnable: nn.Module = model
    return runnable


@contextmanager
def _same_random_state() -> Iterator[None]:
    """Put the random state of Python, NumPy and torch back at the end."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    torch_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Put training mode, ``requires_grad`` and ``use_cache`` back at the end."""
    config: Any = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    training = [(module, module.training) for module in model.modules()]
    requires_grad = [(value, value.requires_grad) for value in model.parameters()]
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode
        for value, needed in requires_grad:
            value.requires_grad_(needed)
        if use_cache is not None:
            config.use_cache = use_cache


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back the harness' warnings, which are about uses it is not put to here."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
