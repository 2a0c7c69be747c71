"""The one training loop: steps, micro-batches, schedules, evaluation, checkpoints and resuming."""
