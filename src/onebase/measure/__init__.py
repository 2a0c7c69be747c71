"""What judges: losses and metrics over labelled tokens and rows."""
