"""The step: which tensors go into which call of an op, and what has to be known before it."""
