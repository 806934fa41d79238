"""PEFT adapters: how they are laid out, read, started and merged into a base."""
