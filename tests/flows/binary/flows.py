"""A flow that says what environment and which libraries it has been given."""

import json
import os
import sqlite3
import ssl
import zlib
from pathlib import Path

import numpy
from prefect import flow


@flow
def libraries(answer: str):
    numpy.linalg.inv(numpy.eye(3))
    ssl.create_default_context()
    sqlite3.connect(":memory:").execute("SELECT 1")
    zlib.compress(b"")
    mapped = {
        line.split(maxsplit=5)[5].strip() for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line
    }
    found = {"environ": dict(os.environ), "mapped": sorted(mapped), "openssl": ssl.OPENSSL_VERSION}
    Path(answer).write_text(json.dumps(found))
