"""State that other libraries saved, read as ours; neither of them is imported."""
