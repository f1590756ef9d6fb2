"""stub"""
from __future__ import annotations
from pathlib import Path
class StateDirectory:
    def __init__(self, path: Path, *, name: str) -> None:
        self.path = path
        self.work = path / "runs"
    def __enter__(self) -> StateDirectory:
        self.work.mkdir(parents=True, exist_ok=True)
        return self
    def __exit__(self, *args: object) -> None: ...
