"""Checks that chunk reuse is correct on a given model, and that a method keeps its contract."""

from blocktune.check.contract import check_method, claims, subjects
from blocktune.check.serving import Check, Subject, check_adapter, check_model

__all__ = ["Check", "Subject", "check_adapter", "check_method", "check_model", "claims", "subjects"]
