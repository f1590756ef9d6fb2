"""Removes the output files of runs that ended long ago."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Collection
from pathlib import Path

from supervisor.logs.cut import compact, fresh_name
from supervisor.logs.space import hole_span, opened

OURS = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\.log")
UNFINISHED = re.compile(re.escape(fresh_name("RUN")).replace("RUN", OURS.pattern))
DAY = 86400.0

log = logging.getLogger(__name__)


def sweep_old(log_dir: Path, keep_days: float, in_use: Collection[str], *, cap: int) -> int:
    """Removes files of runs not `in_use` that nobody has written to for `keep_days`; how many. Blocking.

    Touches nothing but `<uuid>.log` and what an interrupted cut left behind. Files that still have holes (there was no
    room, or no time, to cut them for good when their run ended) are cut. Never raises `OSError`.
    """
    removed = 0
    oldest = time.time() - keep_days * DAY  # file times are wall-clock times
    try:
        names = [entry.name for entry in os.scandir(log_dir) if entry.is_file(follow_symlinks=False)]
    except FileNotFoundError:
        return 0
    except OSError as error:
        log.warning("cannot look for old output in '%s': %s", log_dir, error.strerror)
        return 0
    for name in names:
        found = OURS.fullmatch(name) or UNFINISHED.fullmatch(name)
        if found is None or found[1] in in_use:
            continue
        path = log_dir / name
        try:
            if path.stat().st_mtime < oldest or not OURS.fullmatch(name):
                path.unlink()
                removed += 1
            elif _has_hole(path):
                compact(path, cap)
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("cannot tidy up '%s': %s", path, error.strerror)
    return removed


def _has_hole(path: Path) -> bool:
    found = path.stat()
    if found.st_blocks * 512 >= found.st_size:  # a full file has all its blocks: most are not even opened
        return False
    with opened(path, os.O_RDONLY) as descriptor:
        return hole_span(descriptor, found.st_size) is not None
