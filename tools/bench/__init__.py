"""Benchmarks: each measures ways of doing one thing side by side, in one run."""
