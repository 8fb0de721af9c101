"""Mixers: the part of a block in which tokens see one another, one file each, listed here by the name that a config uses."""

from minitune.models.mixers.grouped_query import GROUPED_QUERY

MIXERS = {"grouped_query": GROUPED_QUERY}
