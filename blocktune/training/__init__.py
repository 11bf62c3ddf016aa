"""Training: models that answer from chunks which never saw each other."""
