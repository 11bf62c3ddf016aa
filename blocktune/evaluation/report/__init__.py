"""The report of a finished run: one self-contained HTML file, and its charts as PNG files."""

from blocktune.evaluation.report.page import write_report

__all__ = ["write_report"]
