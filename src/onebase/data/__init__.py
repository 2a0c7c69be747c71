"""What is learned from: rows of any usual shape, as tokens with labels, in flat batches."""
