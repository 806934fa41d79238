"""Several processes by Lightning's own launchers: subprocesses, torchrun, SLURM."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric import Fabric

from fusionkit.task_vectors.processes import ALONE, Group, Processes


def device_of(trainer: Mapping[str, Any]) -> torch.device:
    """The device that a Trainer of these settings would have if it had one.

    Args:
        trainer: a recipe's `trainer`: its `accelerator` is used.
    """
    device: torch.device = Fabric(accelerator=trainer["accelerator"], devices=1).device
    return device


@contextmanager
def launched(trainer: Mapping[str, Any]) -> Iterator[tuple[Processes, torch.device]]:
    """The processes that a Trainer of these settings would run in; the others are started first.

    Args:
        trainer: a recipe's `trainer`: its `accelerator`, `devices` and `num_nodes` are used.

    Yields:
        the processes, and this one's device.
    """
    fabric = Fabric(
        accelerator=trainer["accelerator"],
        devices=trainer["devices"],
        num_nodes=trainer["num_nodes"],
    )
    fabric.launch()
    if fabric.world_size == 1:
        yield ALONE, fabric.device
        return
    try:
        yield Group(), fabric.device
    finally:
        torch.distributed.destroy_process_group()
