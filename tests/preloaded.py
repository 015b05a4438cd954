"""Imported by the server that tests fork jobs from."""

from tests.forked import generator

generator()
