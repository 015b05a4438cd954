"""Imported by the server that tests fork jobs from, and tools."""

from tests.forked import generator
from tools import audit, evaluate, init, make_checkpoint, rehearse, train  # noqa: F401

generator()
