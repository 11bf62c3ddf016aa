"""Benchmarks: speed on this machine, compared with its measured limits."""
