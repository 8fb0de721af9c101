"""Mixers by the name that a config uses."""

from minitune.models.config import MixerName
from minitune.models.mixers.grouped_query import GROUPED_QUERY
from minitune.models.mixers.mixer import Mixer

MIXERS: dict[MixerName, Mixer] = {"grouped_query": GROUPED_QUERY}
