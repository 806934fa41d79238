"""Loggers of a run that measures one thing after the other, each under its own name."""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger


@contextmanager
def logged_as(trainer: Trainer, name: str) -> Iterator[None]:
    """For a while a Trainer logs under a name of its own.

    TensorBoard's and CSV files are in a folder of that name; of other loggers, metrics have it in
    front of theirs.

    Args:
        trainer: its loggers are put back after it.
        name: of what is measured: a codec, say.
    """
    plain = re.sub(r"[^\w.-]+", "-", name).strip("-")
    with _with_loggers(trainer, [_named(each, plain) for each in trainer.loggers]) as own:
        yield
        for each in own:
            if isinstance(each, TensorBoardLogger | CSVLogger):
                each.finalize("success")


@contextmanager
def unlogged(trainer: Trainer) -> Iterator[None]:
    """For a while a Trainer logs nothing."""
    with _with_loggers(trainer, []):
        yield


@contextmanager
def _with_loggers(trainer: Trainer, loggers: list[Logger]) -> Iterator[list[Logger]]:
    before = trainer.loggers
    trainer.loggers = loggers
    try:
        yield loggers
    finally:
        trainer.loggers = before


def _named(logger: Logger, name: str) -> Logger:
    """The same logger, but for the name."""
    made = copy.copy(logger)
    own: Any = made
    if isinstance(logger, TensorBoardLogger | CSVLogger):
        own._name, own._version, own._experiment = f"{logger.name}/{name}", None, None
    elif hasattr(logger, "_prefix"):
        own._prefix = "-".join(filter(None, (own._prefix, name)))
    return made
