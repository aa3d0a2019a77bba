"""What a training step will cost, before there is a weight: memory, operations, time."""
