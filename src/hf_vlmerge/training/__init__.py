"""Training: a Trainer that logs every loss, its arguments, and the optimiser's groups."""
