"""What adapters learn from: rows of any usual shape, the examples they become, and the batches of a step."""
