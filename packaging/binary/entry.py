"""What the packed binary runs."""

from supervisor.cli import main

main()
