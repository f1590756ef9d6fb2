"""supervisor/process/environ.py: what a flow gets of the agent's environment, and in which order things are laid over it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from supervisor.process.environ import MARK, RUN_ID, flow_environ, inherited

AGENTS_OWN = {
    "NOTIFY_SOCKET": "/run/systemd/notify",
    "WATCHDOG_USEC": "30000000",
    "WATCHDOG_PID": "1",
    "LISTEN_FDS": "1",
    "LISTEN_FDNAMES": "x",
    "CREDENTIALS_DIRECTORY": "/run/credentials/x",
    "INVOCATION_ID": "abc",
    "JOURNAL_STREAM": "8:1",
    "MAINPID": "1",
    "STATE_DIRECTORY": "/var/lib/x",
    "_PYI_APPLICATION_HOME_DIR": "/tmp/_MEI1",
    "_MEIPASS2": "/tmp/_MEI1",
    "LD_LIBRARY_PATH_ORIG": "/user/lib",
    "FLOW_AGENT_API_KEY": "secret",
    "FLOW_AGENT_RUN_ID": "another run",
    "PREFECT__FLOW_RUN_ID": "another run",
    "PREFECT__CONTROL_TOKEN": "another token",
}


def made(
    environ: Mapping[str, str] | None = None,
    *,
    pass_env: Sequence[str] = (),
    flows_env: Mapping[str, str] | None = None,
    job_env: Mapping[str, str | None] | None = None,
    **more: Any,
) -> dict[str, str]:
    return flow_environ(
        run_id="run-1",
        api_url="http://server/api",
        secrets=more.pop("secrets", {}),
        pass_env=pass_env,
        flows_env=flows_env or {},
        job_env=job_env or {},
        extra=more.pop("extra", {}),
        environ=environ or {},
        **more,
    )


def test_a_flow_gets_what_every_program_needs_and_nothing_else_of_the_agent() -> None:
    needed = {"PATH": "/bin", "HOME": "/h", "LANG": "C", "LC_TIME": "de_DE", "https_proxy": "http://p", "TZ": "UTC"}
    assert inherited({**needed, "MY_PASSWORD": "x", "AWS_SECRET_ACCESS_KEY": "y", "OLDPWD": "/"}) == needed


@pytest.mark.parametrize("name", sorted(AGENTS_OWN))
def test_the_agents_own_variables_are_refused_even_when_asked_for(name: str) -> None:
    assert inherited(AGENTS_OWN, [name, "*"]) == {}


def test_pass_env_takes_names_and_patterns_case_by_case() -> None:
    environ = {"AWS_REGION": "eu", "AWS_PROFILE": "p", "aws_x": "no", "ONE": "1", "ONE_MORE": "no"}
    assert inherited(environ, ["AWS_*", "ONE"]) == {"AWS_REGION": "eu", "AWS_PROFILE": "p", "ONE": "1"}


@pytest.mark.parametrize("name", ["PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PREFECT_API_KEY", "PREFECT_API_URL"])
def test_what_was_made_for_the_agent_is_taken_by_its_exact_name_but_by_no_pattern(name: str) -> None:
    assert inherited({name: "x"}) == {}
    assert inherited({name: "x"}, ["*", "P*", "V*"]) == {}
    assert inherited({name: "x"}, [name]) == {name: "x"}


def test_prefect_settings_of_the_agents_user_reach_the_flow_without_the_secret_ones() -> None:
    kept = {"PREFECT_LOGGING_LEVEL": "DEBUG", "PREFECT_HOME": "/p", "PREFECT_LOCAL_STORAGE_PATH": "/s"}
    held_back = {
        "PREFECT_API_AUTH_STRING": "u:p",
        "PREFECT_SERVER_DATABASE_PASSWORD": "x",
        "PREFECT_API_DATABASE_CONNECTION_URL": "x",
        "PREFECT_CLIENT_CUSTOM_HEADERS": "{}",
        "PREFECT_INTEGRATION_TOKEN": "x",
    }
    assert inherited({**kept, **held_back}) == kept


def test_library_paths_of_the_bundle_are_replaced_by_the_users_own() -> None:
    bundle = {"LD_LIBRARY_PATH": "/tmp/_MEI1", "TMPDIR": "/unpack"}
    assert inherited(bundle, frozen=True) == {}
    assert inherited({**bundle, "LD_LIBRARY_PATH_ORIG": "/user"}, frozen=True) == {"LD_LIBRARY_PATH": "/user"}
    assert inherited(bundle, ["TMPDIR"], frozen=True) == {"TMPDIR": "/unpack"}
    assert inherited(bundle, frozen=False) == bundle


def test_later_layers_beat_earlier_ones() -> None:
    layers: list[tuple[str, dict[str, Any]]] = [
        ("inherited", {"environ": {"LANG": "inherited"}}),
        ("secrets", {"secrets": {"LANG": "secrets"}}),
        ("flows", {"flows_env": {"LANG": "flows"}}),
        ("extra", {"extra": {"LANG": "extra"}}),
        ("job", {"job_env": {"LANG": "job"}}),
    ]
    given: dict[str, Any] = {}
    for name, layer in layers:
        given |= layer
        assert made(**given)["LANG"] == name


def test_a_job_can_unset_what_was_set_before_it() -> None:
    env = made({"LANG": "C"}, flows_env={"A": "1"}, job_env={"LANG": None, "A": None, "NEVER_SET": None})
    assert env.keys().isdisjoint({"LANG", "A", "NEVER_SET"})


def test_the_mark_and_the_run_id_cannot_be_overridden_or_unset() -> None:
    foreign = {MARK: "x", RUN_ID: "x"}
    env = made(foreign, pass_env=["*"], flows_env=foreign, extra=foreign, job_env={MARK: None, RUN_ID: "x"})
    assert (env[MARK], env[RUN_ID]) == ("run-1", "run-1")


def test_the_server_is_the_agents_and_never_a_private_one() -> None:
    env = made({"PREFECT_API_URL": "http://elsewhere"}, secrets={"PREFECT_API_KEY": "k"})
    assert env["PREFECT_API_URL"] == "http://server/api"
    assert env["PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"] == "false"
    assert env["PREFECT_API_KEY"] == "k"


def test_output_is_unbuffered_unless_the_user_says_otherwise() -> None:
    assert made()["PYTHONUNBUFFERED"] == "1"
    assert "PYTHONUNBUFFERED" not in made(job_env={"PYTHONUNBUFFERED": None})
