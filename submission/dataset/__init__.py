"""Rounds on disk, copies made of them, and the file made of both."""
