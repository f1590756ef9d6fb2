"""INSTALLER: what a package does, for somebody who has only the binary. It puts files in place and starts nothing.

bundle.py    what this binary carries, and where each file belongs
plan.py      what is to be done with each, judged by what lies there; pure
staging.py   all of it written beside its place first, then renamed: a disk that is full loses nothing
machine.py   the machine it is done to, and why it may not be
work.py      one installation, shown or carried out
"""
