"""Weights by name, wherever they are: files, folders, URLs, live models, PEFT adapters."""
