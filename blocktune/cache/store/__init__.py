"""Stores of chunks: in memory, in a folder, and in a place that several machines share."""
