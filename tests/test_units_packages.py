"""Removing the package on a booted machine, while an instance of the agent works and another one drains."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.machines import Machine, why_not
from tests.servers import Api, PrefectServer
from tests.units import CONFIG, TRACE, UNIT, Deb, Unit
from tests.waiting import wait_until

GPU = "flow-agent@gpu.service"


@pytest.mark.skipif(why_not() is not None, reason=f"README, Tests: {why_not()}")
def test_a_removal_does_not_wait_for_a_drain_and_leaves_no_run(
    boot: Callable[[str], Machine],
    server_3: PrefectServer,
    api_of: Callable[[PrefectServer], Api],
) -> None:
    machine = boot("bookworm")
    unit = Unit(machine, Deb(), api_of(server_3))
    unit.form.install(machine)
    unit.configure()
    other = unit.api.create_pool()
    machine.write("/etc/flow-agent/gpu.toml", unit.config(other))
    unit.systemctl("enable", "--now", UNIT, GPU)
    drained, _ = unit.hold()
    worked = unit.start_run_in(other, "sleeper", trace=f"{TRACE}/gpu")
    wait_until(
        machine.path(f"{TRACE}/gpu").exists, 60, "the instance's run has begun", more=lambda: machine.status(GPU)
    )
    unit.systemctl("--no-block", "stop", UNIT)
    wait_until(lambda: "drain" in unit.show("StatusText"), 20, "it drains", more=lambda: unit.show("StatusText"))

    began = time.monotonic()
    said = machine.run("dpkg", "--remove", "flow-agent", timeout=90).stdout
    assert time.monotonic() - began < 60
    for name in (UNIT, GPU):
        assert f"stopping {name} (" in said
        assert not machine.processes(f"system.slice/{name}")
    assert "flow runs that have not ended are cancelled now" in said
    assert [unit.api.state(run) for run in (drained, worked)] == ["CANCELLED", "CANCELLED"]
    assert machine.path(CONFIG).exists()
    assert machine.path("/var/lib/flow-agent").is_dir()

    machine.run("dpkg", "--purge", "flow-agent")
    left = [machine.path(folder) for folder in ("/etc/flow-agent", "/var/lib/flow-agent", "/var/lib/flow-agent@gpu")]
    assert not [folder for folder in left if folder.exists()]
    links = machine.run("find", "/etc/systemd/system", "-name", "flow-agent*", "-type", "l").stdout
    assert links == ""
    assert machine.run("systemctl", "list-units", "--plain", "--no-legend", "flow-agent*").stdout == ""
