"""Retrieval tables, before and after, with chance beside them, and the report."""

from llm2clip.evaluation.run import evaluate

__all__ = ["evaluate"]
