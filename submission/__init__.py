"""What runs inside the budget, from a task's name to its training set. docs/architecture.md is the map.

`cli` turns arguments into a request, and `job` makes it: `tasks` give prompts, `model` turns image numbers into pixels
on the devices of an `engine`, `dataset` keeps rounds and writes the file, as `plan` decides; `report` tells of it.
"""
