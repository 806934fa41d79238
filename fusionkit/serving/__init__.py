"""A bundle's tasks over HTTP: every row of a batch answered by its own task."""
