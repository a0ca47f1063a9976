"""Evaluation: metrics, data sets, other people's pruning, and the tables that compare them.

Importing this package imports torch; ``import foldprune`` does not.
"""

from .metrics import (
    Interval,
    Perplexity,
    Scores,
    classification,
    interval,
    perplexity,
)

__all__ = ["Interval", "Perplexity", "Scores", "classification", "interval", "perplexity"]
