"""Real control groups (v2) for tests."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from supervisor.process.cgroup import RunGroup, own_directory


def need_groups(*, possible: bool) -> None:
    """Skips the test where they are not."""
    if not possible:
        pytest.skip("needs root or a delegated cgroup v2")


def writable_group() -> Path:
    """The group that this process is in, where it may make others below it."""
    here = own_directory(Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text())
    need_groups(possible=here is not None and all(os.access(path, os.W_OK) for path in (here, here / "cgroup.procs")))
    assert here is not None
    return here


@contextmanager
def group_of_our_own(suffix: str = "") -> Iterator[Path]:
    """A new group, removed with all that is in it."""
    path = writable_group() / f"fa-test-{uuid.uuid4()}{suffix}"
    path.mkdir()
    everything = RunGroup(path, path)
    try:
        yield path
    finally:
        everything.kill()
        trio.run(everything.wait_empty)
        assert everything.remove()
