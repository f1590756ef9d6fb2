"""stub"""
from __future__ import annotations
import trio
from collections.abc import Callable, Mapping
class Notifier:
    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Notifier:
        return cls()
    def ready(self, status: str) -> None: ...
    def stopping(self, status: str) -> None: ...
    async def run_status(self, describe: Callable[[], str]) -> None:
        await trio.sleep_forever()
