"""The engine: mapping over tasks, meta-training, evaluation, run folders, feature extractors."""
