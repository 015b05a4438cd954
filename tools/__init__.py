"""What runs outside the budget: a file per command of `./run.sh`, and their parts in folders."""
