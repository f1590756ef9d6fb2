"""MOUTH: everything that is said to a Prefect server, and nothing else. See `base.py` for what the house may ask."""
