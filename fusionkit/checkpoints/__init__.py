"""Weights by name, wherever they are: files, folders, URLs, live models, PEFT adapters."""

from fusionkit.checkpoints import opening as opening  # so that `Checkpoint.of` can open
