"""Prefect 2.20 and 3.x over REST. `client.py` is the room's door; `wire.py` knows what the answers look like."""
