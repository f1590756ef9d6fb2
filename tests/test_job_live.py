"""Our merged jobs against what real Prefects, on their own servers, make of the same templates and variables."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trio

from supervisor import config
from supervisor.backend.http import HttpApi
from supervisor.backend.rest.job import read_job
from supervisor.errors import JobError
from supervisor.model import FlowRun, Job

PROBE = Path(__file__).with_name("real_jobs.py")
ENVIRON = {"PROBE_HOME": "/home/probe"}


def a_template(defaults: dict[str, Any] | None = None, **job_configuration: Any) -> dict[str, Any]:
    base = {"command": "{{ command }}", "env": "{{ env }}", "working_dir": "{{ working_dir }}", "name": "{{ name }}"}
    merged = {**base, **job_configuration}
    used = re.findall(
        r"{{\s*(\S+?)\s*}}", json.dumps(merged)
    )  # servers refuse a template that uses what it does not declare
    properties: dict[str, Any] = {name: {"title": name} for name in used}
    properties |= {name: {"title": name, "default": value} for name, value in (defaults or {}).items()}
    return {"job_configuration": merged, "variables": {"type": "object", "properties": properties}}


SAME_ON_BOTH = {
    "nothing said": {},
    "deployment": {"deployment": {"command": "python x.py", "env": {"A": "1"}, "working_dir": "/srv/work"}},
    "run over deployment": {
        "deployment": {"command": "python x.py", "env": {"A": "1", "B": "1"}},
        "run": {"command": "python y.py", "env": {"B": "2", "C": "3"}},
    },
    "run without deployment": {"run": {"env": {"A": "1"}, "working_dir": "/srv/work"}},
    "empty command": {"deployment": {"command": ""}},
    "null unsets": {
        "template": a_template(),
        "deployment": {"env": {"A": None, "B": "1"}},
        "run": {"env": {"B": None}},
    },
    "env values of all kinds": {
        "template": a_template(),
        "deployment": {"env": {"I": 1, "F": 1.5, "T": True, "E": ""}},
    },
    "env in the template": {
        "template": a_template(env={"T": "t", "A": "t"}),
        "deployment": {"env": {"A": "1"}},
        "run": {"env": {"B": "2"}},
    },
    "env in the defaults": {
        "template": a_template({"env": {"D": "d", "A": "d"}}),
        "deployment": {"env": {"A": "1"}},
        "run": {"env": {"B": "2"}},
    },
    "only defaults": {"template": a_template({"command": "a b", "env": {"D": "d"}, "working_dir": "/srv/d"})},
    "placeholders in text": {
        "template": a_template(
            {"who": "w"}, command="go {{ who }}/{{who}}-{{ nobody }}{{   conf.n }} x", env={"E": "<{{ conf.f }}>"}
        ),
        "deployment": {"conf": {"n": 1, "f": 1.5}},
    },
    "missing values": {
        "template": a_template(env={"A": "{{ nobody }}", "B": "-{{ nobody }}-"}, command="{{ nobody }}")
    },
    "paths": {
        "template": a_template(command="{{ conf.list[1].x }}", env={"A": "{{ conf.list[9] }}", "B": "{{ conf.a.b }}"}),
        "deployment": {"conf": {"list": [0, {"x": "word"}], "a": {"b": "deep"}}},
    },
    "agent's environment": {
        "template": a_template(
            env={"A": "{{ $PROBE_HOME }}", "B": "{{ $PROBE_HOME }}/x", "C": "{{ $PROBE_NOBODY }}"},
            working_dir="{{ $PROBE_HOME }}/w",
        )
    },
    "environment named in given values": {
        "deployment": {"env": {"A": "{{ $PROBE_HOME }}", "B": "{{ command }}"}, "command": "{{ env }}"},
    },
    "env of the deployment is filled inside a table": {
        "template": a_template(env={"T": "t"}),
        "deployment": {"env": {"A": "{{ $PROBE_HOME }}", "B": "{{ who }}"}, "who": "me"},
    },
    "no settings in the template": {
        "template": {
            "job_configuration": {"x": "{{ who }}"},
            "variables": {"type": "object", "properties": {"who": {"title": "who"}}},
        },
    },
    "dotted keys": {
        "template": a_template(),
        "deployment": {"env.A": "1", "env.B": "1", "env": {"B": "2"}, "conf.x": "1"},
        "run": {"env.C": "3", "env.B": "3"},
    },
    "dotted keys over defaults": {
        "template": a_template({"env": {"D": "d", "A": "d"}}, command="{{ conf.x.y }}"),
        "deployment": {"env.A": "1", "conf.x.y": "word"},
        "run": {"env": {"B": "2"}},
    },
    "secret block": {"deployment": {"env": {"A": "{{ prefect.blocks.secret.token }}"}}},
    "block paths": {
        "template": a_template(command="{{ prefect.blocks.probe.conf.value.a[0].b }}"),
        "deployment": {
            "env": {"A": "{{ prefect.blocks.pair.two.A }}", "B": "{{ prefect.blocks.probe.conf.a[0].b }}"},
        },
    },
    "env is a block's table": {"template": a_template(), "deployment": {"env": "{{ prefect.blocks.probe.conf.env }}"}},
    "env is a block by id": {
        "template": a_template(env="{{ conf }}"),
        "deployment": {"conf": {"$ref": {"block_document_id": "@pair@"}}},
    },
    "variables": {
        "deployment": {
            "env": {
                "A": "{{ prefect.variables.job_probe_stage }}",
                "B": "<{{ prefect.variables.job_probe_stage }}|{{ prefect.variables.nowhere }}>",
                "C": "{{ prefect.variables.nowhere }}",
            },
        },
    },
    "a variable inside a block": {
        "template": a_template(working_dir="{{ prefect.blocks.probe.conf.dir }}"),
    },
    "missing block": {"deployment": {"env": {"A": "{{ prefect.blocks.secret.gone }}"}}},
    "missing path in a block": {"deployment": {"env": {"A": "{{ prefect.blocks.pair.two.C }}"}}},
    "command is a list": {"template": a_template({"command": [1]})},
    "env is text": {"template": a_template(), "deployment": {"env": "A=1"}},
}

# What 3.x mended, and we do for both: 2.20 loses the template's own env, writes "None", refuses blocks inside text.
MENDED_IN_3X = {
    "all layers of env": {
        "template": a_template({"env": {"D": "d", "A": "d"}}, env={"T": "t", "D": "t", "A": "t"}),
        "deployment": {"env": {"A": "1"}},
        "run": {"env": {"B": "2"}},
    },
    "null default in text": {"template": a_template({"who": None}, command="go {{ who }}")},
    "block in text": {
        "deployment": {"env": {"A": "x-{{ prefect.blocks.secret.token }}-{{ prefect.variables.job_probe_stage }}"}}
    },
}

ONLY_3X = {
    "quotes in a command": {"deployment": {"command": "sh -c 'echo a b' \"c d\""}},
    "block table in text": {"deployment": {"env": {"A": "x-{{ prefect.blocks.pair.two }}"}}},
    "path that is contradicted": {"template": a_template(), "deployment": {"conf.a": "1", "conf.a.b": "2"}},
    "table in env": {"template": a_template(), "deployment": {"env": {"A": {"b": [1]}}}},
}

ONLY_220 = {
    "process block": {"process_block": {"env": {"A": "1"}, "command": ["python", "x y.py"], "working_dir": "/srv/b"}},
    "process block with overrides": {
        "process_block": {"env": {"A": "1", "B": "1"}, "command": ["python", "x.py"]},
        "deployment": {"env.B": "2", "env.C": "3", "working_dir": "/srv/o", "command": ["a", "b"]},
    },
    "process block with its env replaced": {
        "process_block": {"env": {"A": "1", "B": "1"}},
        "deployment": {"env": {"C": "3"}},
    },
    "process block with nothing": {"process_block": {}},
}

MATRIX = {3: {**SAME_ON_BOTH, **MENDED_IN_3X, **ONLY_3X}, 2: {**SAME_ON_BOTH, **MENDED_IN_3X, **ONLY_220}}
MEANT_TO_FAIL = {
    "missing block",
    "missing path in a block",
    "command is a list",
    "env is text",
    "block table in text",
    "path that is contradicted",
}


@pytest.fixture(scope="module")
def prefects_answers(prefect_server: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the server's own Prefect makes of each case of its matrix."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    home = str(tmp_path_factory.mktemp("prefect"))
    cases = MATRIX[prefect_server.major]
    asked = subprocess.run(
        [prefect_server.python, "-W", "ignore", PROBE],
        env={**kept, **ENVIRON, "PREFECT_HOME": home, "PREFECT_API_URL": prefect_server.url},
        cwd=home,
        input=json.dumps(list(cases.values())),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert asked.returncode == 0, asked.stderr
    return dict(zip(cases, json.loads(asked.stdout.splitlines()[-1]), strict=True))


async def our_job(api: HttpApi, run_id: str, major: int) -> Job | JobError:
    record = await api.get(f"/flow_runs/{run_id}")
    names = ("id", "name", "flow_id", "deployment_id", "work_pool_name", "job_variables")
    run = FlowRun(**{name: record[name] for name in names}, state_id=None, state_type=None, state_name=None)
    try:
        return await read_job(api, run, major, environ=ENVIRON)
    except JobError as refused:
        return refused


def same(theirs: dict[str, Any], ours: Job | JobError) -> bool:
    if "error" in theirs or isinstance(ours, JobError):
        return "error" in theirs and isinstance(ours, JobError)
    job = theirs["job"]
    words = shlex.split(job["command"]) if isinstance(job["command"], str) else job["command"]
    return (words or None, job["env"], job["working_dir"]) == (
        list(ours.command) if ours.command else None,
        dict(ours.env),
        ours.working_dir,
    )


def test_every_job_is_what_prefect_itself_would_start(prefect_server: Any, prefects_answers: dict[str, Any]) -> None:
    async def main() -> dict[str, Any]:
        settings = config.Api(url=prefect_server.url)
        async with HttpApi.open(settings, config.Credentials) as api:
            return {
                name: await our_job(api, theirs["run_id"], prefect_server.major)
                for name, theirs in prefects_answers.items()
            }

    ours = trio.run(main)
    different = {
        name: (theirs, ours[name]) for name, theirs in prefects_answers.items() if not same(theirs, ours[name])
    }
    mended = MENDED_IN_3X.keys() if prefect_server.major == 2 else set()
    assert different.keys() == mended, different
    refused = {name for name, job in ours.items() if isinstance(job, JobError)}
    assert refused == MEANT_TO_FAIL & prefects_answers.keys()
