"""Plans against the deadline: what to generate next, what to write and when. Seconds go in, decisions come out."""
