"""The report of a finished run: one HTML file that needs no network, and its pictures as PNGs."""

from blocktune.evaluation.report.page import write_report

__all__ = ["write_report"]
