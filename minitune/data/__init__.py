"""Data: rows of files to tokenized documents, and to batches."""

from minitune.data.cursor import Cursor as Cursor
from minitune.data.read_batches import read_batches as read_batches
from minitune.data.source import Source as Source
