"""A run from start to end: `run` tells the story, `generate` makes rounds, `files` writes, `ending` sees it out."""
