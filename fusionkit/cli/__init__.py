"""One file per verb, over recipes; tables and plots."""
