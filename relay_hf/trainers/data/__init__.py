"""Data sets on their way to the trainer: checked before work starts, and prepared as TRL prepares them."""
