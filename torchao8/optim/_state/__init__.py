"""The state of parameters: what it is made of, where it lies, and its way in from a checkpoint."""
