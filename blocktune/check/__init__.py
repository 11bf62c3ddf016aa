"""Checks that reuse is sound on a given model, and that a method keeps its contract."""

from blocktune.check.claim import Check
from blocktune.check.contract import Subject, axis_values, check_method, claims, subjects
from blocktune.check.model import check_model

__all__ = ["Check", "Subject", "axis_values", "check_method", "check_model", "claims", "subjects"]
