"""The organisers' evaluator: their network, their augmentation, their training, and what is found on the way."""
