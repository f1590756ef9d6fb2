"""HEART: the loops that find work and cancellations, and the life of each run."""
