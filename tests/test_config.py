"""`agent.toml` and what stands above and below it: read, merged, checked, every mistake at once and in its place."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest
import tomli
from hypothesis import given
from hypothesis import strategies as st

from supervisor.config import Agent, Api, Config, Flows, Output, Poll, Stop, Work
from supervisor.config.file import NoWorkNamed, credentials, load, warnings
from supervisor.config.keys import KEYS
from supervisor.config.layers import variable
from supervisor.config.lines import Lines
from supervisor.errors import ConfigError

ROOT = Path(__file__).parent.parent
NOWHERE = Path("/nonexistent/agent.toml")
POOL = '[[work]]\npool = "p"\n'


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """A whole environment: a home, and a PATH with a python3 in it."""
    program(tmp_path / "bin" / "python3")
    return {"HOME": str(tmp_path / "home"), "PATH": str(tmp_path / "bin")}


def program(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def read(folder: Path, text: str, environ: Mapping[str, str], flags: Mapping[str, object] = {}) -> Config:
    file = folder / "agent.toml"
    file.write_text(text)
    return load(file, environ=environ, flags=flags)


def mistakes(folder: Path, text: str, environ: Mapping[str, str], flags: Mapping[str, object] = {}) -> list[str]:
    """The sentences, with the folder's name taken out of them."""
    with pytest.raises(ConfigError) as caught:
        read(folder, text, environ, flags)
    return [sentence.replace(f"{folder}/", "") for sentence in caught.value.mistakes]


# --- what can be read -------------------------------------------------------------------------------------------------


def test_a_file_that_only_names_a_pool_gets_every_default(tmp_path: Path, environ: dict[str, str]) -> None:
    config = read(tmp_path, POOL, environ)

    python = tmp_path / "bin" / "python3"
    assert config.work == (Work(flows=Flows(python=python), pool="p"),)
    assert config.flows == Flows(python=python)
    assert config.poll == Poll()
    assert config.output == Output(max_mb=32.0, keep_days=30.0, show=True)
    assert config.stop == Stop(
        on_stop="drain",
        on_restart="keep",
        drain_timeout_seconds=1500.0,
        then="cancel",
        shutdown_timeout_seconds=90.0,
    )
    assert config.flows.crash_retries == 0
    assert config.api == Api(url="http://127.0.0.1:4200/api")
    assert config.agent.name == os.uname().nodename
    assert config.agent.log_dir == config.agent.state_dir / "logs"
    assert config.path == tmp_path / "agent.toml"


def test_every_key_is_known_to_the_structs_and_the_other_way_round() -> None:
    structs: dict[str, type[msgspec.Struct]] = {
        "agent": Agent,
        "api": Api,
        "poll": Poll,
        "work": Work,
        "flows": Flows,
        "output": Output,
        "stop": Stop,
    }
    fields = {name: {field.name for field in msgspec.structs.fields(struct)} for name, struct in structs.items()}
    fields["work"] -= {"flows", "tags"}  # made of the table's other keys; only --tag can say it
    assert {name: set(kinds) for name, kinds in KEYS.items()} == fields


def test_a_work_table_overrides_flows_and_merges_env(tmp_path: Path, environ: dict[str, str]) -> None:
    other = program(tmp_path / "venv" / "python")
    text = """
        [flows]
        grace_seconds = 10
        env = { A = "flows", B = "flows" }
        [[work]]
        pool = "p"
        python = "venv/python"
        command = "nice -n 5 'my engine'"
        env.B = "work"
        [[work]]
        queues = "q"
    """
    config = read(tmp_path, text, environ)
    own, plain = config.work
    assert config.flows == plain.flows
    assert own.flows.python == other
    assert own.flows.command == ("nice", "-n", "5", "my engine")
    assert own.flows.env == {"A": "flows", "B": "work"}
    assert own.flows.grace_seconds == plain.flows.grace_seconds == 10.0
    assert plain.flows.env == {"A": "flows", "B": "flows"}
    assert plain.queues == ("q",)


def test_flag_stands_above_variable_above_file_above_default(tmp_path: Path, environ: dict[str, str]) -> None:
    text = "[agent]\nlimit = 1\nprefetch_seconds = 1\nname = 'file'\n" + POOL
    environ |= {"FLOW_AGENT_AGENT_LIMIT": "2", "FLOW_AGENT_AGENT_PREFETCH_SECONDS": "2.5", "FLOW_AGENT_API_VERIFY": ""}
    agent = read(tmp_path, text, environ, {"agent.limit": 3, "agent.name": None}).agent
    assert (agent.limit, agent.prefetch_seconds, agent.name, agent.log_level) == (3, 2.5, "file", "info")


def test_a_variable_for_flows_stands_above_a_work_table(tmp_path: Path, environ: dict[str, str]) -> None:
    text = POOL + "grace_seconds = 1\nenv = { A = 'work', B = 'work' }\n"
    environ |= {"FLOW_AGENT_FLOWS_GRACE_SECONDS": "2", "FLOW_AGENT_FLOWS_ENV": "A=x,C=y=z"}
    flows = read(tmp_path, text, environ).work[0].flows
    assert flows.grace_seconds == 2.0
    assert flows.env == {"A": "x", "B": "work", "C": "y=z"}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("FLOW_AGENT_POLL_INTERVAL_SECONDS", "0.5", ("poll", "interval_seconds", 0.5)),
        ("FLOW_AGENT_API_VERIFY", "false", ("api", "verify", False)),
        ("FLOW_AGENT_API_URL", "https://x/api/", ("api", "url", "https://x/api")),
        ("FLOW_AGENT_API_HEADERS", "X-A=1,X-B=2", ("api", "headers", {"X-A": "1", "X-B": "2"})),
        ("FLOW_AGENT_FLOWS_PASS_ENV", "A, B", ("flows", "pass_env", ("A", "B"))),
        ("FLOW_AGENT_FLOWS_COMMAND", "echo 'a b'", ("flows", "command", ("echo", "a b"))),
        ("FLOW_AGENT_FLOWS_CRASH_RETRIES", "2", ("flows", "crash_retries", 2)),
        ("FLOW_AGENT_OUTPUT_MAX_MB", "1.5", ("output", "max_mb", 1.5)),
        ("FLOW_AGENT_OUTPUT_SHOW", "False", ("output", "show", False)),
        ("FLOW_AGENT_STOP_ON_STOP", "Reschedule", ("stop", "on_stop", "reschedule")),
        ("FLOW_AGENT_STOP_DRAIN_TIMEOUT_SECONDS", "0", ("stop", "drain_timeout_seconds", 0.0)),
        ("PREFECT_API_URL", "http://prefect:4200/api", ("api", "url", "http://prefect:4200/api")),
    ],
)
def test_a_variable_is_read_as_its_key_wants_it(
    tmp_path: Path, environ: dict[str, str], name: str, text: str, value: tuple[str, str, object]
) -> None:
    config = read(tmp_path, POOL, environ | {name: text})
    section, key, wanted = value
    assert getattr(getattr(config, section), key) == wanted


def test_work_in_variables_and_then_in_flags_replaces_the_tables_of_the_file(
    tmp_path: Path, environ: dict[str, str]
) -> None:
    environ |= {"FLOW_AGENT_WORK_QUEUES": "a,b", "FLOW_AGENT_WORK_CREATE": "false"}
    (work,) = read(tmp_path, POOL, environ).work
    assert (work.queues, work.pool, work.create) == (("a", "b"), None, False)

    flags = {"work": [{"queues": ["Agent queue x"], "tags": ["x"]}]}
    (work,) = read(tmp_path, POOL, environ, flags).work
    assert (work.queues, work.tags, work.create) == (("Agent queue x",), ("x",), True)


def test_systemd_directories_come_before_the_homes(tmp_path: Path, environ: dict[str, str]) -> None:
    environ |= {"STATE_DIRECTORY": "/var/lib/a:/var/lib/b", "LOGS_DIRECTORY": "/var/log/a"}
    agent = read(tmp_path, POOL, environ).agent
    assert (agent.state_dir, agent.log_dir) == (Path("/var/lib/a"), Path("/var/log/a"))


def test_paths_start_at_the_files_folder_and_the_tilde_is_home(tmp_path: Path, environ: dict[str, str]) -> None:
    text = "[agent]\nstate_dir = 'state'\nlog_dir = '~/logs'\n" + POOL
    agent = read(tmp_path, text, environ).agent
    assert agent.state_dir == tmp_path / "state"
    assert agent.log_dir == tmp_path / "home" / "logs"


def test_the_file_is_found_by_variable_and_then_by_default(tmp_path: Path, environ: dict[str, str]) -> None:
    (tmp_path / "named.toml").write_text("[agent]\nname = 'named'\n" + POOL)
    (tmp_path / "default.toml").write_text("[agent]\nname = 'default'\n" + POOL)
    default = tmp_path / "default.toml"
    assert load(None, environ=environ, default_file=default).agent.name == "default"
    environ["FLOW_AGENT_CONFIG"] = str(tmp_path / "named.toml")
    assert load(None, environ=environ, default_file=default).agent.name == "named"


def test_without_file_and_work_it_says_what_to_add(environ: dict[str, str]) -> None:
    with pytest.raises(NoWorkNamed, match=r"write .*agent\.toml with a \[\[work\]\] table"):
        load(None, environ=environ, default_file=NOWHERE)


def test_a_file_without_work_is_a_mistake_that_flags_can_mend(tmp_path: Path, environ: dict[str, str]) -> None:
    text = "[agent]\nlimit = 1\n"
    with pytest.raises(NoWorkNamed, match=r"agent\.toml: cannot tell what to work on; add a \[\[work\]\] table"):
        read(tmp_path, text, environ)
    assert read(tmp_path, text, environ, {"work": [{"pool": "p"}]}).agent.limit == 1


def test_python3_is_wanted_in_path_only_where_no_other_is_named(tmp_path: Path, environ: dict[str, str]) -> None:
    python = program(tmp_path / "own")
    environ["PATH"] = str(tmp_path / "empty")
    assert mistakes(tmp_path, POOL, environ) == [
        "agent.toml: cannot find python3 in PATH; set flows.python to the flows' Python"
    ]
    assert read(tmp_path, POOL + "python = './own'\n", environ).work[0].flows.python == python


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_all_mistakes_are_named_at_once_each_at_its_line(tmp_path: Path, environ: dict[str, str]) -> None:
    text = """
[agent]
limt = 4
limit = "4"
[api]
url = "ftp://x"
[poll]
interval_seconds = 0
[[work]]
pool = "a"
queues = ["x"]
match = ["y"]
"""
    environ |= {"FLOW_AGENT_POLL_JITTER": "2", "FLOW_AGENT_POL_JITTER": "1"}
    assert mistakes(tmp_path, text, environ, {"agent.limit": 0}) == [
        "agent.toml:3: cannot use 'limt' in [agent]: there is no such key; did you mean 'limit'?",
        'agent.toml:4: cannot use agent.limit: an integer is wanted, found the string "4"',
        (
            "agent.toml:6: cannot use api.url: a URL that starts with http:// or https:// is wanted,"
            ' found the string "ftp://x"'
        ),
        "agent.toml:8: cannot use poll.interval_seconds: it must be more than 0 seconds, found 0",
        (
            "agent.toml:12: cannot use this [[work]]: it names both queues and match; choose one,"
            " or write two [[work]] tables"
        ),
        "FLOW_AGENT_POLL_JITTER: cannot use poll.jitter: it must be from 0 to 1, found 2",
        "FLOW_AGENT_POL_JITTER: cannot use this variable: no such one is known; did you mean 'FLOW_AGENT_POLL_JITTER'?",
        "--limit: cannot use agent.limit: it must be 1 or more, found 0; leave the key out for no limit",
    ]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("agent = 1\n", 1, "a table [agent] is wanted, found the integer 1"),
        ("[[agent]]\nlimit = 1\n", 1, "[agent], with one bracket"),
        ("[worker]\nlimit = 1\n", 1, "cannot use [worker]: there is no such table; did you mean 'work'?"),
        ("[zzz]\n", 1, "known are [agent], [api], [poll], [[work]], [flows]"),
        ("limit = 1\n", 1, "outside a table: it belongs in [agent] or [[work]]"),
        ("[agent]\n\ninterval_seconds = 1\n", 3, "it belongs in [poll]"),
        ("[agent]\nzzz = 1\n", 2, "known are name, limit"),
        ("[agent]\nname = 'a/b'\n", 2, "'/' must not occur in it"),
        ("[agent]\nname = '50%'\n", 2, "'%' must not occur in it"),
        ("[agent]\nname = ''\n", 2, "an empty string says nothing"),
        ("[agent]\nlimit = 0\n", 2, "it must be 1 or more, found 0"),
        ("[agent]\nlimit = true\n", 2, "an integer is wanted, found the boolean true"),
        ("[agent]\nlimit = 1.5\n", 2, "an integer is wanted, found the float 1.5"),
        ("[agent]\nprefetch_seconds = -1\n", 2, "it must be 0 seconds or more, found -1"),
        ("[agent]\nprefetch_seconds = inf\n", 2, "a finite number is wanted"),
        ("[agent]\nlog_level = 'loud'\n", 2, 'one of "debug", "info", "warning", "error" is wanted'),
        ("[api]\nverify = 'yes'\n", 2, "true or false, without quotes, is wanted"),
        ("[api]\nurl = 'http://user:word@host/api'\n", 2, "must hold no user or password"),
        ("[api]\nurl = 'http://host:port/api'\n", 2, "it is not a URL"),
        ("[api]\nheaders = { X = 1 }\n", 2, "a string (in quotes) for X is wanted, found the integer 1"),
        ("[api]\nheaders = { X = 'a\\nb', 'X Y' = '' }\n", 2, "'X Y' cannot be the name of a header"),
        ("[api]\nca_file = 'missing.pem'\n", 2, "cannot read missing.pem: No such file or directory"),
        ("[api]\nca_file = '.'\n", 2, "it is a directory"),
        ("[api]\napi_key_file = 'pnu_1234'\n", 2, "that is a key itself; put it into a file"),
        ("[api]\nclient_key = 'agent.toml'\n", 2, "cannot use api.client_key without api.client_cert"),
        ("[api]\nauth_string_file = 'agent.toml'\n\napi_key_file = 'agent.toml'\n", 2, "keep one of them"),
        ("[poll]\njitter = 1.1\n", 2, "it must be from 0 to 1"),
        ("[poll]\nheartbeat_seconds = -5\n", 2, "it must be more than 0 seconds, found -5"),
        ("[flows]\npython = 'python9'\n", 2, "cannot find python9 in PATH"),
        ("[flows]\npython = './python9'\n", 2, "there is no program"),
        ("[flows]\npython = './agent.toml'\n", 2, "cannot be executed"),
        ('[flows]\ncommand = "a \'b"\n', 2, "it cannot be split as a shell would: No closing quotation"),
        ("[flows]\ncommand = []\n", 2, "an empty command starts nothing"),
        ("[flows]\nenv = 'A=1'\n", 2, 'a table of variables is wanted, found the string "A=1"'),
        ("[flows]\npass_env = ['A=1']\n", 2, "a variable's name without '='"),
        ("[flows]\ntimeout_seconds = 0\n", 2, "it must be more than 0 seconds, found 0"),
        ("[flows]\ncrash_retries = -1\n", 2, "it must be 0 or more, found -1"),
        ("[flows]\ncrash_retries = true\n", 2, "an integer is wanted, found the boolean true"),
        ("[output]\nmax_mb = 0.5\n", 2, "it must be 1 or more, found 0.5"),
        ("[output]\nmax_mb = '32'\n", 2, "a number of megabytes is wanted"),
        ("[output]\nkeep_days = 0\n", 2, "it must be more than 0 days, found 0"),
        ("[output]\nkeep_days = '7'\n", 2, "a number of days is wanted"),
        ("[output]\nshow = 1\n", 2, "true or false, without quotes, is wanted"),
        ("[stop]\non_stop = 'wait'\n", 2, 'one of "drain", "cancel", "keep", "reschedule" is wanted'),
        ("[stop]\non_restart = true\n", 2, "a string is wanted, found the boolean true"),
        ("[stop]\nthen = 'drain'\n", 2, 'one of "cancel", "keep", "reschedule" is wanted'),
        ("[stop]\ndrain_timeout_seconds = inf\n", 2, "a finite number is wanted"),
        ("[stop]\nshutdown_timeout_seconds = -1\n", 2, "it must be 0 seconds or more, found -1"),
        ("[stop]\nmax_mb = 1\n", 2, "it belongs in [output]"),
        ("[work]\npool = 'p'\n", 1, "write [[work]], with two brackets"),
        ("[[work]]\nlimit = 1\n", 1, "it names no pool, queues, match or deployments"),
        ("[[work]]\npool = 'p'\ndeployments = 'a/b'\n", 3, "it names both pool and deployments"),
        ("[[work]]\nqueues = []\n", 2, "an empty array says nothing"),
        ("[[work]]\nqueues = [1]\n", 2, "a string is wanted, found the integer 1"),
        ("[[work]]\ndeployments = 'nightly'\n", 2, '"flow/deployment" or the deployment\'s UUID is wanted'),
        ("[[work]]\npol = 'p'\n", 2, "did you mean 'pool'?"),
        ("[[work]]\npool = 'p'\n[[work]]\npool = 'q'\ngrace = 1\n", 5, "did you mean 'grace_seconds'?"),
    ],
)
def test_a_mistake_names_its_line_and_says_what_is_wanted(
    tmp_path: Path, environ: dict[str, str], text: str, line: int, words: str
) -> None:
    (sentence,) = mistakes(tmp_path, text if "work]" in text else f"{text}{POOL}", environ)
    assert sentence.startswith(f"agent.toml:{line}: cannot ")
    assert words in sentence


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"[agent]\nname = \n", "agent.toml:2: cannot read it as TOML: Invalid value (column 8)"),
        (b"[agent]\nname = 'a'\nname = 'b'\n", "agent.toml:3: cannot read it as TOML: Cannot overwrite a value"),
        (b"[agent]\nname = '\xff'\n", "agent.toml:2: cannot read it as TOML: byte 0xff is not UTF-8"),
        (b"a = " + b"9" * 5000, "agent.toml: cannot read it as TOML: "),
    ],
)
def test_what_is_not_toml_is_named_with_its_line_beside_mistakes_elsewhere(
    tmp_path: Path, environ: dict[str, str], data: bytes, words: str
) -> None:
    file = tmp_path / "agent.toml"
    file.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        load(file, environ=environ | {"FLOW_AGENT_AGENT_LIMIT": "many"})
    first, second = caught.value.mistakes
    assert first.startswith(f"{tmp_path}/{words}")
    assert second == 'FLOW_AGENT_AGENT_LIMIT: cannot use agent.limit: an integer is wanted, found the string "many"'


def test_a_named_file_that_is_not_there_is_a_mistake(tmp_path: Path, environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "gone.toml", environ=environ)
    assert caught.value.mistakes == (f"{tmp_path}/gone.toml: cannot read it: No such file or directory",)


def test_variables_of_other_rooms_are_left_alone(tmp_path: Path, environ: dict[str, str]) -> None:
    others = (
        "FLOW_AGENT_RUN_ID",
        "FLOW_AGENT_RUN_HOME",
        "FLOW_AGENT_TEST_CACHE",
        "FLOW_AGENT_API_KEY",
        "FLOW_AGENT_AUTH_STRING",
    )
    assert read(tmp_path, POOL, environ | dict.fromkeys(others, "x")).work[0].pool == "p"


def misspell(word: str, at: int, letter: str) -> str:
    return word[: at % len(word)] + letter + word[at % len(word) :]


ALL_KEYS = [(section, key) for section, kinds in KEYS.items() for key in kinds]


@given(where=st.sampled_from(ALL_KEYS), at=st.integers(0, 30), letter=st.sampled_from("xz_7"), above=st.integers(0, 20))
def test_any_misspelled_key_is_the_one_mistake_and_named_with_its_line(
    tmp_path_factory: pytest.TempPathFactory, where: tuple[str, str], at: int, letter: str, above: int
) -> None:
    section, key = where
    folder = tmp_path_factory.mktemp("config")
    program(folder / "bin" / "python3")
    wrong = misspell(key, at, letter)
    filling = "".join(f"# = [[{number}]]\n" if number % 2 else "\n" for number in range(above))
    header = "[[work]]\npool = 'p'" if section == "work" else f"[{section}]"
    text = f"{filling}{header}\n{wrong} = 'x'\n" + ("" if section == "work" else POOL)
    (sentence,) = mistakes(folder, text, {"PATH": str(folder / "bin")})
    line = text[: text.index(wrong)].count("\n") + 1
    assert re.match(rf"agent\.toml:{line}: cannot use '{wrong}' in .*; did you mean '", sentence)


@given(where=st.sampled_from(ALL_KEYS), at=st.integers(0, 30), letter=st.sampled_from("XZ7"))
def test_any_misspelled_variable_is_named_with_the_nearest(where: tuple[str, str], at: int, letter: str) -> None:
    right = variable(*where)
    wrong = right[:11] + misspell(right[11:], at, letter)
    with pytest.raises(ConfigError) as caught:
        load(None, environ={**os.environ, wrong: "x"}, flags={"work": [{"pool": "p"}]}, default_file=NOWHERE)
    assert caught.value.mistakes[0].startswith(f"{wrong}: cannot use this variable: no such one is known; did you mean")


# --- lines ------------------------------------------------------------------------------------------------------------

STRINGS = [
    '"x"',
    "'x'",
    '"]"',
    "'[#'",
    '"""\n[no]\nno = 1\n\\""" """',
    "'''\n[[no]]\n''''",
    "[\n  1, # ]\n  2,\n]",
    "[\n  ['u'],\n  'a',\n]",
]
VALUES = st.sampled_from([*STRINGS, "1", "{ a = ']', b = [1] }", "1979-05-27", '"\\""', "[['a'], ['b']]"])
KEY_NAMES = st.sampled_from(["a", "b-c", '"d e"', "'f.g'", '"h\\"]"', "i.j", "'k' . l"])


@given(
    st.lists(
        st.tuples(st.sampled_from(["[[t]]", "[ u.v ] # [x]", "[[u.w]]", "[t.x]"]), st.dictionaries(KEY_NAMES, VALUES))
    )
)
def test_every_key_of_any_document_is_found_on_its_line(tables: list[tuple[str, dict[str, str]]]) -> None:
    lines_of: list[tuple[tuple[str | int, ...], int]] = []
    text, counts = "", {"[[t]]": -1, "[[u.w]]": -1}
    for header, keys in tables:
        if header in text and header not in counts:
            continue  # a table may be opened once
        if header == "[t.x]":
            if counts["[[t]]"] < 0:
                continue
            base: tuple[str | int, ...] = ("t", counts["[[t]]"], "x")
        elif header in counts:
            counts[header] += 1
            base = (*header.strip("[]").split("."), counts[header])
        else:
            base = ("u", "v")
        text += f"\n# '''\n{header}\n"
        for key, value in keys.items():
            parts = tuple(_path_of(tomli.loads(f"{key} = 1")))
            lines_of.append(((*base, *parts), text.count("\n") + 1))
            text += f"  {key} = {value}\n"
    tomli.loads(text)
    lines = Lines(text)
    assert [(path, lines.of(*path)) for path, _ in lines_of] == lines_of


def _path_of(document: dict[str, object]) -> list[str]:
    ((key, value),) = document.items()
    return [key, *(_path_of(value) if isinstance(value, dict) else [])]


def test_a_key_in_an_inline_table_is_found_at_the_line_of_what_holds_it() -> None:
    lines = Lines("[flows]\n\nenv = { A = 1 }\n")
    assert lines.of("flows", "env", "A") == 3
    assert lines.of("flows", "python") == 1


# --- secrets ----------------------------------------------------------------------------------------------------------


def test_secrets_are_taken_from_the_first_place_that_holds_any(tmp_path: Path) -> None:
    environ = {"PREFECT_API_KEY": "from-prefect", "PREFECT_API_AUTH_STRING": "u:prefect"}
    api = Api(url="http://x")
    found = credentials(api, environ)
    assert (found.api_key, found.auth_string) == ("from-prefect", "u:prefect")

    environ["FLOW_AGENT_AUTH_STRING"] = "u:ours"
    found = credentials(api, environ)
    assert (found.api_key, found.auth_string) == (None, "u:ours")

    environ["CREDENTIALS_DIRECTORY"] = str(tmp_path)
    (tmp_path / "api-key").write_text("unset\n")
    assert credentials(api, environ).auth_string == "u:ours"
    (tmp_path / "api-key").write_text(" from-systemd\n")
    assert credentials(api, environ).api_key == "from-systemd"

    (tmp_path / "named").write_text("from-file\n")
    assert credentials(Api(url="http://x", api_key_file=tmp_path / "named"), environ).api_key == "from-file"


def test_a_secret_never_shows_itself() -> None:
    found = credentials(Api(url="http://x"), {"FLOW_AGENT_API_KEY": "hush", "FLOW_AGENT_AUTH_STRING": "u:hush"})
    assert found.api_key == "hush"
    shown = [repr(found), str(found), f"{found}", f"{[found]!r}", str(list(found.__rich_repr__()))]
    assert "hush" not in "".join(shown)
    assert "api_key" in repr(found)


@pytest.mark.parametrize("content", [b"hush\nhush", b"hush\xff", b"hush\x00"])
def test_a_secret_that_cannot_be_sent_is_refused_unquoted(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(ConfigError, match="cannot use the secret in it") as caught:
        credentials(Api(url="http://x", api_key_file=tmp_path / "key"), {})
    assert "hush" not in str(caught.value)


def test_a_working_directory_that_is_gone_is_said(
    tmp_path: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    here.rmdir()
    with pytest.raises(ConfigError, match="this working directory was removed; change to another one"):
        load(None, environ=environ, flags={"work": [{"pool": "p"}]})


def test_what_is_unwise_is_a_warning(tmp_path: Path, environ: dict[str, str]) -> None:
    (tmp_path / "key").write_text("k")
    (tmp_path / "key").chmod(0o644)
    text = "[api]\nurl = 'http://x:4200'\nverify = false\napi_key_file = 'key'\n" + POOL + "working_dir = 'gone'\n"
    said = warnings(read(tmp_path, text, environ))
    assert [sentence.partition(":")[0] for sentence in said] == [
        "api.api_key_file",
        "api.verify",
        "api.url",
        "flows.working_dir",
    ]
    (tmp_path / "key").chmod(0o600)
    assert warnings(read(tmp_path, "[api]\napi_key_file = 'key'\n" + POOL, environ)) == []


# --- the example and the page -----------------------------------------------------------------------------------------


def example(folder: Path, uncomment: str) -> str:
    """The example with every commented key live that matches, and the files there that it names."""
    for name in ("api-key", "auth-string", "ca.pem", "client.pem", "client-key.pem"):
        (folder / name).touch(mode=0o600)
    text = (ROOT / "agent.toml.example").read_text()
    return re.sub(rf"^#(?=(?:{uncomment})\b|\[)", "", text, flags=re.MULTILINE)


def test_the_example_as_it_is_can_be_used_and_says_nothing_unusual(tmp_path: Path, environ: dict[str, str]) -> None:
    config = read(tmp_path, (ROOT / "agent.toml.example").read_text(), environ)
    assert config.work == (Work(flows=config.flows, pool="default"),)
    assert config == msgspec.structs.replace(read(tmp_path, '[[work]]\npool="default"', environ), path=config.path)
    assert warnings(config) == []


@pytest.mark.parametrize("secret", ["api_key_file", "auth_string_file"])
def test_the_example_can_be_used_with_every_key_uncommented(
    tmp_path: Path, environ: dict[str, str], secret: str
) -> None:
    other = {"api_key_file", "auth_string_file"} - {secret}
    keys = sorted({key for kinds in KEYS.values() for key in kinds} - other)
    config = read(tmp_path, example(tmp_path, "|".join(keys)), environ)
    assert (config.poll, config.output, config.stop) == (Poll(), Output(), Stop())
    assert (config.agent.prefetch_seconds, config.agent.log_level) == (10.0, "info")
    assert (config.api.verify, config.api.timeout_seconds) == (True, 30.0)
    assert (config.flows.grace_seconds, config.flows.crash_retries) == (30.0, 0)
    assert getattr(config.api, secret) is not None
    assert [work.match or work.deployments or work.pool for work in config.work] == [
        "default",
        ("dev-",),
        ("my-flow/nightly",),
    ]


def test_every_key_stands_in_the_example_and_on_the_page() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    text = (ROOT / "agent.toml.example").read_text()
    for section, kinds in KEYS.items():
        heading = "### `[[work]]`" if section == "work" else f"### `[{section}]`"
        part = page.partition(heading)[2].partition("\n#")[0]
        below = text.partition("\n[[work]]\n" if section == "work" else f"\n[{section}]\n")[2]
        below = re.split(r"^\[", below, flags=re.MULTILINE)[0]
        for key in kinds:
            assert f"| `{key}` |" in part, f"{section}.{key} is not in its table of docs/configuration.md"
            assert re.search(rf"^#?{key} = ", below, re.MULTILINE), f"{section}.{key} is not in agent.toml.example"


def test_the_mistakes_shown_on_the_page_are_what_is_really_said(tmp_path: Path, environ: dict[str, str]) -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    shown = page.partition("## When something is wrong")[2].split("```")[1].strip()
    text = """[agent]
limt = 4
interval_seconds = 5

[api]
verify = "no"

[[work]]
pool = "p"
queues = ["q"]
match = ["m"]
"""
    said = mistakes(tmp_path, text, environ | {"FLOW_AGENT_POLL_JITTER": "2"})
    assert "\n".join(said) == shown.replace("/etc/flow-agent/", "")
