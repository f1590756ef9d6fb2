"""A world of one run, on a clock that jumps: what the property test of a run's life is played in (test_run_stateful.py)."""
