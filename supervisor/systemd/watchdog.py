"""stub"""
from __future__ import annotations
import trio
from collections.abc import Callable, Mapping
from supervisor.systemd.notify import Notifier
class Pulse:
    def expect(self, within: float | None) -> None: ...
class Watchdog:
    @classmethod
    def from_environ(cls, notifier: Notifier, environ: Mapping[str, str]) -> Watchdog:
        return cls()
    def pulse(self, name: str) -> Pulse:
        return Pulse()
    def dismiss(self, prefix: str) -> None: ...
    async def run(self) -> None:
        await trio.sleep_forever()
