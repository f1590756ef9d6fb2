"""Stands for a flow engine where many runs are wanted: reports RUNNING, notes "RUN_ID PID" in a file, reports COMPLETED.

Called as `python -IS quick_engine.py FILE`, with the environment that every engine gets; any Python will do.
"""

import json
import os
import sys
import time
import urllib.error
import urllib.request

RUN_ID = os.environ["PREFECT__FLOW_RUN_ID"]
URL = f"{os.environ['PREFECT_API_URL']}/flow_runs/{RUN_ID}/set_state"


def propose(state: str) -> None:
    body = json.dumps({"state": {"type": state}}).encode()
    # The User-Agent is that of an engine: 3.x takes the concurrency slot away from others.
    headers = {"Content-Type": "application/json", "User-Agent": "prefect/3.8.8 (API 0.8.4)"}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(100):
        try:
            with opener.open(urllib.request.Request(URL, body, headers), timeout=30) as answer:
                verdict = json.load(answer)
                break
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise
            time.sleep(0.1)  # a busy server on SQLite
    if verdict["status"] != "ACCEPT":
        sys.exit(f"the server does not accept {state}: {verdict}")


propose("RUNNING")
with open(sys.argv[1], "a") as file:  # noqa: PTH123 - importing pathlib takes as long as all the rest
    file.write(f"{RUN_ID} {os.getpid()}\n")
propose("COMPLETED")
