"""Training of models that answer from chunks that were encoded separately."""
