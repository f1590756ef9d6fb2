"""The Prefect releases whose servers tests run against."""

from __future__ import annotations

import pytest

VERSIONS = {"prefect-3.8": "3.8.8", "prefect-2.20": "2.20.26"}

# For what no release can change: there one is enough, and every run on 2.20 costs four seconds of imports.
with_one_release = pytest.mark.parametrize("prefect_server", ["3.8.8"], ids=["prefect-3.8"], indirect=True)
