"""HOUSE: all we say to the host's service manager, and all we hear from it."""
