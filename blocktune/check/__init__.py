"""Whether reuse is sound: on a given model, and of a given method."""

from blocktune.check.claim import Check
from blocktune.check.contract import Subject, check_method, claims
from blocktune.check.model import check_model
from blocktune.check.subjects import axis_values, subjects

__all__ = ["Check", "Subject", "axis_values", "check_method", "check_model", "claims", "subjects"]
