"""Pre-training of a tiny model from scratch, in full attention, on generated worlds."""
