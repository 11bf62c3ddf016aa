"""Evaluation: what reuse costs in accuracy and saves in time, one harness for all methods."""
