"""EARS: the files that runs write their output to.

Children never write into a pipe of ours: an agent that dies must not break a flow's next `print` (docs/architecture.md). Why the
files of live runs have holes and reserves is in docs/decisions/0008-output.md.
"""

from supervisor.logs.follow import Follower
from supervisor.logs.keeper import OutputKeeper, Show, output_file
from supervisor.logs.sweep import sweep_old
from supervisor.logs.tail import last_lines

__all__ = ["Follower", "OutputKeeper", "Show", "last_lines", "output_file", "sweep_old"]
