"""One model in memory that becomes any task's, and is evaluated by the Trainer."""
