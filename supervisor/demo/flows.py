"""The demonstration's flows, as text: the same as examples/flows.py, which a one-file binary does not have beside it."""

from supervisor.model import StateType

SOURCE = '''\
"""The three flows that `flow-agent demo` runs: one does its work, one fails, one is cancelled while it runs."""

import time

from prefect import flow


@flow
def quick(name: str = "world"):
    print(f"hello {name}")


@flow
def failing():
    raise RuntimeError("this flow fails to show what that looks like")


@flow
def endless():
    while True:
        print("working")
        time.sleep(1)
'''

EXPECTED = {"quick": StateType.COMPLETED, "failing": StateType.FAILED, "endless": StateType.CANCELLED}
CANCELLED_ON_THE_WAY = "endless"
