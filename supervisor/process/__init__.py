"""The hands: starts processes, knows them again, talks to engines, and ends them with all they left behind.

This room cannot call Prefect and decides nothing about runs; `supervisor.runs` tells it what to do.
"""
