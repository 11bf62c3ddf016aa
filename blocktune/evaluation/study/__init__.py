"""A page of findings whose tables and figures are made from results, and whose prose is not."""

from blocktune.evaluation.study.page import refresh, refreshed

__all__ = ["refresh", "refreshed"]
