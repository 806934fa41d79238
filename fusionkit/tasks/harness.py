"""lm-eval's harness around a live language model."""

import logging
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from fusionkit.errors import DataError, FusionKitError, in_line, of_extra
from fusionkit.tasks.harness_tasks import HarnessTasks, load_tasks, task_manager
from fusionkit.tasks.models import tokenizer_of


@dataclass(frozen=True)
class HarnessSettings:
    """How lm-eval is run; its own command has options of these names.

    Attributes:
        tokenizer: folder or hub name of the tokenizer; None: the one beside the base's weights.
        batch_size: requests at once; `auto`: as many as fit.
        limit: documents of each task, the first ones.
        num_fewshot: examples before a question, of tasks that don't say it themselves.
        include_path: folders with tasks, beside lm-eval's own.
        apply_chat_template: whether prompts are written as the tokenizer's chat template has it.
        system_instruction: what a conversation begins with.
        gen_kwargs: of tasks that generate, settings that go before their own.
        bootstrap_iters: samples for standard errors that have no formula; 0: no standard errors.
        confirm_run_unsafe_code: whether tasks may run the code that a model writes.
        metadata: what some tasks want to know.
        model_args: further arguments of lm-eval's `HFLM`.
    """

    tokenizer: str | None = None
    batch_size: int | str = 1
    limit: int | None = None
    num_fewshot: int | None = None
    include_path: tuple[str, ...] = ()
    apply_chat_template: bool = False
    system_instruction: str | None = None
    gen_kwargs: Mapping[str, Any] = field(default_factory=dict)
    bootstrap_iters: int = 100_000
    confirm_run_unsafe_code: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)
    model_args: Mapping[str, Any] = field(default_factory=dict)


class Harness:
    """Scores lm-eval's tasks on a model that stays in memory, with the weights that it has then.

    Args:
        settings: how.
    """

    def __init__(self, settings: HarnessSettings) -> None:
        self.settings = settings
        self._tasks: dict[tuple[str, ...], HarnessTasks] = {}
        self._lm: Any = None

    def load(self, asked: Sequence[Sequence[str]]) -> list[HarnessTasks]:
        """Load tasks and their data sets, each once.

        Args:
            asked: for each of FusionKit's tasks, names of lm-eval's, or paths of YAML files.

        Raises:
            MissingExtraError: lm-eval is not installed.
            DataError: as of `load_tasks`.
        """
        of_extra("lm_eval", "harness", "what lm-eval scores")
        own = self.settings
        lacking = [tuple(names) for names in asked if tuple(names) not in self._tasks]
        if lacking:
            flat = [name for names in lacking for name in names]
            with quiet():
                manager = task_manager(flat, own.include_path, own.metadata)
                for names in lacking:
                    found = load_tasks(manager, names, own.limit)
                    for task in found.loaded["tasks"].values():
                        self._tell(task)
                    self._tasks[names] = found
        return [self._tasks[tuple(names)] for names in asked]

    def run(self, model: nn.Module, tasks: HarnessTasks) -> Mapping[str, Any]:
        """What tasks come to, as lm-eval's `evaluate` returns it.

        Args:
            model: a causal or encoder-decoder language model of transformers.
            tasks: the tasks.

        Raises:
            FusionKitError: the model is another one.
            DataError: there is no tokenizer, no chat template, or lm-eval refuses the tasks.
        """
        from lm_eval.evaluator import evaluate

        own = self.settings
        lm = self._around(model)
        with isolate_rng(), _bars():  # seeded as lm-eval's own command does
            random.seed(0)
            np.random.seed(1234)  # noqa: NPY002
            torch.manual_seed(1234)
            for task in tasks.loaded["tasks"].values():
                task.set_fewshot_seed(seed=1234)
            try:
                results: Mapping[str, Any] = evaluate(
                    lm,
                    tasks.loaded,
                    limit=own.limit,
                    bootstrap_iters=own.bootstrap_iters,
                    log_samples=True,
                    system_instruction=own.system_instruction,
                    apply_chat_template=own.apply_chat_template,
                    fewshot_as_multiturn=own.apply_chat_template,
                    confirm_run_unsafe_code=own.confirm_run_unsafe_code,
                )
            except ValueError as error:
                raise DataError(f"lm-eval refuses {in_line(tasks.parts)}: {error}") from error
        return results

    def _tell(self, task: Any) -> None:
        """Tell a task what was asked for, as lm-eval's own command does."""
        own = self.settings
        if own.gen_kwargs and task.get_config("output_type") == "generate_until":
            task.set_config("generation_kwargs", dict(own.gen_kwargs), update=True)
        said = task.get_config("num_fewshot")
        if own.num_fewshot is not None and said != 0:
            task.set_config("num_fewshot", own.num_fewshot)
        elif said is None:
            task.set_config("num_fewshot", 0)

    def _around(self, model: nn.Module) -> Any:
        """lm-eval's model around a live one; made once, unless that has moved."""
        from lm_eval.models.huggingface import HFLM

        bare: Any = getattr(model, "_orig_mod", model)
        check_generates(bare)
        if self._lm is None or self._lm.model is not model or self._lm.device != bare.device:
            own = self.settings
            with quiet(), ties_kept(bare):
                self._lm = HFLM(
                    pretrained=model,
                    tokenizer=self._tokenizer(bare),
                    batch_size=own.batch_size,
                    **own.model_args,
                )
        return self._lm

    def _tokenizer(self, model: Any) -> Any:
        place = self.settings.tokenizer or model.config.name_or_path
        if not place:
            raise DataError(
                "where the base's tokenizer is, its model does not say; give `tokenizer`, its "
                "folder or its name on the Hub"
            )
        found = tokenizer_of(place)
        if self.settings.apply_chat_template and not found.chat_template:
            raise DataError(
                f"{place}: the tokenizer has no chat template; leave `apply_chat_template` out, or "
                "put a chat_template.jinja beside it"
            )
        return found


def check_generates(model: nn.Module) -> None:
    """Check that a model is one that lm-eval's tasks are for.

    Raises:
        FusionKitError: it is not.
    """
    can: Any = getattr(model, "can_generate", None)
    if not callable(can) or not can():
        raise FusionKitError(
            f"{type(model).__name__} is no causal and no encoder-decoder language model, which "
            "lm-eval's tasks are for; build it by fusionkit.tasks.models.causal_lm, or seq2seq_lm"
        )


@contextmanager
def ties_kept(model: Any) -> Iterator[None]:
    """A context in which no one ties a model's weights: a task may have parted the base's."""
    model.tie_weights = _nothing
    try:
        yield
    finally:
        del model.tie_weights


def _nothing(*_: Any, **__: Any) -> None:
    pass


@contextmanager
def quiet() -> Iterator[None]:
    """A context without lm-eval's warnings of what is meant so: a model that is in memory."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _bars() -> Iterator[None]:
    """A context in which lm-eval's progress bars go when they are done; in a terminal alone.

    Of a long text it shows one for every few hundred tokens, each on a line of its own.
    """
    from lm_eval.api import model, task
    from lm_eval.models import huggingface

    modules: tuple[Any, ...] = (model, task, huggingface)
    bar = huggingface.tqdm

    def short(*args: Any, **settings: Any) -> Any:
        hidden = settings.pop("disable", False) or not sys.stderr.isatty()
        return bar(*args, **{**settings, "leave": False, "disable": hidden})

    for module in modules:
        module.tqdm = short
    try:
        yield
    finally:
        for module in modules:
            module.tqdm = bar
