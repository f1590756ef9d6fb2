"""DEMONSTRATION: a real Prefect 3 server, an agent and three flow runs in a temporary folder, all removed again.

It plays the user of both: it speaks to the server over REST as anybody would, and it starts the agent by its command.
"""
