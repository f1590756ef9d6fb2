"""A flow that ends when it is let go."""

import os
import time
from pathlib import Path

from prefect import flow


@flow
def held(trace: str, hooks: str = "", go: str | None = None, code: int | None = None):
    with Path(trace).open("a") as file:
        file.write(f"{os.environ['PREFECT__FLOW_RUN_ID']} {os.getpid()}\n")
    while go and not Path(go).exists():
        time.sleep(0.05)
    if code is not None:
        os._exit(code)
