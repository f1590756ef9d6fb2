"""The merge of base job templates, job variables, blocks and variables, as pure functions."""

from __future__ import annotations

import contextlib
import copy
import shlex
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor.backend.rest import placeholders, template
from supervisor.errors import JobError

# Examples run beside real servers: how long one takes says nothing.
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")

DEFAULT: dict[str, Any] = {
    "job_configuration": {
        "command": "{{ command }}",
        "env": "{{ env }}",
        "labels": "{{ labels }}",
        "name": "{{ name }}",
        "stream_output": "{{ stream_output }}",
        "working_dir": "{{ working_dir }}",
    },
    "variables": {"type": "object", "properties": {}},
}

names = st.text("abcXYZ_", min_size=1, max_size=4)
plain = st.text(st.characters(exclude_characters="{}", exclude_categories=["Cs"]), max_size=12)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | plain
json = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=8
)
envs = st.dictionaries(names, plain | st.none(), max_size=4)


def configured(
    base: dict[str, Any], variables: dict[str, Any], *, dotted: bool = True, **environ: str
) -> dict[str, Any]:
    return template.configuration(base, variables, dotted=dotted, environ=environ)


def slot(name: str) -> str:
    return "{{ " + name + " }}"


def with_defaults(default_env: Any = None, **job_configuration: Any) -> dict[str, Any]:
    base = copy.deepcopy(DEFAULT)
    base["job_configuration"].update(job_configuration)
    if default_env is not None:
        base["variables"]["properties"]["env"] = {"type": "object", "default": default_env}
    return base


# --- properties ---------------------------------------------------------------------------------------------------


@given(json)
def test_a_value_without_placeholders_passes_every_step_unchanged(value: Any) -> None:
    assert placeholders.fill(value, {}, {}) == value
    assert placeholders.put_blocks(value, {}, {}) == value
    assert placeholders.put_variables(value, {}) == value


@given(names, json)
def test_a_lone_placeholder_becomes_the_value_with_its_type(name: str, value: Any) -> None:
    filled = placeholders.fill({"x": slot(name), "y": [slot(name).replace(" ", "")]}, {name: value}, {})
    assert filled == {"x": value, "y": [value]}
    assert type(filled["x"]) is type(value)


@given(plain, names, scalars, plain)
def test_an_embedded_placeholder_becomes_its_text(before: str, name: str, value: Any, after: str) -> None:
    filled = placeholders.fill("<" + before + slot(name) + after, {name: value}, {})
    assert filled == "<" + before + str(value) + after


@given(names, plain)
def test_a_missing_value_drops_the_key_and_writes_nothing_into_text(name: str, text: str) -> None:
    given_template = {
        "alone": slot(name),
        "listed": [slot(name), 1],
        "inside": "<" + text + slot(name),
    }
    assert placeholders.fill(given_template, {}, {}) == {"listed": [1], "inside": "<" + text}


@given(st.dictionaries(names, json, max_size=4), st.lists(names, min_size=1, max_size=4))
def test_filling_is_finished_after_one_pass(values: dict[str, Any], used: list[str]) -> None:
    given_template = {f"k{i}": (slot(name) if i % 2 else "a" + slot(name) + "b") for i, name in enumerate(used)}
    once = placeholders.fill(given_template, values, {})
    assert placeholders.fill(once, values, {}) == once


@given(names, st.sampled_from(["{{ other }}", "{{ $SECRET }}", "x{{ other }}"]))
def test_a_value_that_looks_like_a_placeholder_is_not_filled_again(name: str, value: str) -> None:
    values = {name: value, "other": "never"}
    filled = placeholders.fill([slot(name), "-" + slot(name) + "-"], values, {"SECRET": "never"})
    assert filled == [value, f"-{value}-"]


@given(envs, envs, envs, envs)
def test_each_env_name_comes_from_the_highest_layer_that_has_it(
    in_template: dict[str, Any], default: dict[str, Any], deployment: dict[str, Any], run: dict[str, Any]
) -> None:
    base = with_defaults(default, env=in_template)
    variables = template.merge_variables({"env": deployment}, {"env": run})
    assert configured(base, variables)["env"] == {**in_template, **default, **deployment, **run}


@given(envs, envs, envs)
def test_the_default_template_joins_default_and_given_env(
    default: dict[str, Any], deployment: dict[str, Any], run: dict[str, Any]
) -> None:
    variables = template.merge_variables({"env": deployment}, {"env": run})
    assert configured(with_defaults(default), variables)["env"] == {**default, **deployment, **run}


@given(envs, envs)
def test_dotted_env_names_add_to_the_table_and_lose_against_it(dotted: dict[str, Any], nested: dict[str, Any]) -> None:
    variables = {**{f"env.{name}": value for name, value in dotted.items()}, "env": nested}
    assert configured(DEFAULT, variables)["env"] == {**dotted, **nested}
    assert template.expand_dotted(dict(reversed(variables.items())))["env"] == {**dotted, **nested}


@given(st.dictionaries(names, json, max_size=4), st.dictionaries(names | st.just("env.A"), json, max_size=4), envs)
def test_no_argument_is_ever_changed(deployment: dict[str, Any], run: dict[str, Any], env: dict[str, Any]) -> None:
    base = with_defaults({"A": "1"}, env={"B": "{{ x }}"})
    deployment = {**deployment, "env": env, "env.Z": {"deep": "1"}}
    before = copy.deepcopy((base, deployment, run))
    merged = template.merge_variables(deployment, run)
    configured(base, merged)
    with contextlib.suppress(JobError):
        template.override_block(deployment, {"env.Z.y": "2"}, {**run, "env": {"N": "1"}})
    assert (base, deployment, run) == before


@given(envs, envs, envs)
def test_a_deployments_env_replaces_the_blocks_and_a_runs_adds(
    block: dict[str, Any], deployment: dict[str, Any], run: dict[str, Any]
) -> None:
    assert template.override_block({"env": block}, {"env": deployment}, {"env": run})["env"] == {**deployment, **run}
    assert template.override_block({"env": block}, {}, {"env": run})["env"] == {**block, **run}


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=1))
def test_a_command_in_shell_quotes_comes_apart_into_its_words(words: list[str]) -> None:
    assert template.as_command(shlex.join(words)) == tuple(words)
    assert template.as_command(words) == tuple(words)


# --- cases --------------------------------------------------------------------------------------------------------


def test_deployment_variables_are_replaced_by_the_runs_except_for_env() -> None:
    merged = template.merge_variables(
        {"command": "a", "env": {"A": "1", "B": "1"}, "x": {"deep": 1}}, {"command": "b", "env": {"B": "2"}, "x": {}}
    )
    assert merged == {"command": "b", "env": {"A": "1", "B": "2"}, "x": {}}
    assert template.merge_variables({"env": {"A": "1"}}, {"env": None})["env"] == {"A": "1"}
    assert template.merge_variables({}, {"env": {"A": "1"}})["env"] == {"A": "1"}
    assert template.merge_variables({"env": "{{ prefect.blocks.json.e }}"}, {"env": {"A": "1"}})["env"] == {"A": "1"}


def test_null_defaults_count_as_no_value() -> None:
    base = with_defaults(command="run {{ image }}")
    base["variables"]["properties"] = {"image": {"default": None}, "working_dir": {"default": None}}
    assert configured(base, {}) == {"command": "run "}


def test_defaults_of_the_schema_are_used_until_something_is_given() -> None:
    base = with_defaults()
    base["variables"]["properties"] = {"command": {"default": "a b"}, "working_dir": {"default": "/srv"}}
    assert configured(base, {"working_dir": "/tmp/x"}) == {"command": "a b", "working_dir": "/tmp/x"}


def test_a_pool_without_a_template_has_the_default_one() -> None:
    assert configured({}, {"command": "c", "env": {"A": "1"}, "working_dir": "/w", "image": "no"}) == {
        "command": "c",
        "env": {"A": "1"},
        "working_dir": "/w",
    }


def test_dotted_keys_are_plain_variables_in_2x() -> None:
    assert configured(DEFAULT, {"env.A": "1", "command": "c"}, dotted=False) == {"command": "c"}
    assert configured(DEFAULT, {"env.A": "1", "command": "c"}, dotted=True) == {"command": "c", "env": {"A": "1"}}


def test_a_dotted_key_below_another_ones_table_leaves_that_table_alone() -> None:
    variables = {"conf.a": {"x": 1}, "conf.a.y": 2}
    assert template.expand_dotted(variables) == {"conf": {"a": {"x": 1, "y": 2}}}
    assert variables == {"conf.a": {"x": 1}, "conf.a.y": 2}


def test_dotted_keys_may_name_any_depth_in_any_variable() -> None:
    base = with_defaults(command="{{ a.b.c }} {{ a.list[1].x }} {{ a.b.nope }}{{ a.list[7] }}")
    variables = {"a.b.c": 1, "a": {"list": [0, {"x": 2}]}}
    assert configured(base, variables)["command"] == "1 2 "


@pytest.mark.parametrize(
    "variables",
    [
        pytest.param({"a.b": 1, "a.b.c": 2}, id="a path through a number"),
        pytest.param({"env": ["A=1"]}, id="env as a list"),
    ],
)
def test_variables_that_contradict_the_template_are_refused_in_a_sentence(variables: dict[str, Any]) -> None:
    with pytest.raises(JobError, match=r"^cannot (set job variable 'a\.b\.c'|merge the job's env): "):
        configured(with_defaults({"A": "1"}), variables)


def test_the_agents_environment_is_read_only_where_it_is_allowed() -> None:
    base = with_defaults(command="{{ $HOME }}", working_dir="{{ $HOME }}/{{ $PREFECT_API_KEY }}")
    assert configured(base, {}, HOME="/home/u") == {"command": "/home/u", "working_dir": "/home/u/"}


def test_blocks_are_found_wherever_they_hide() -> None:
    value = {
        "env": {"A": "{{ prefect.blocks.secret.token }}", "B": "x{{ prefect.blocks.json.conf.value.a[0] }}y"},
        "command": [
            "{{ command }}",
            {"$ref": {"block_document_id": "id-1"}, "beside": "{{ prefect.blocks.secret.no }}"},
        ],
        "odd": {"$ref": "text"},
    }
    assert placeholders.block_names(value) == {("secret", "token"), ("json", "conf")}
    assert placeholders.block_ids(value) == {"id-1"}


def test_block_references_become_block_data() -> None:
    by_name = {
        ("secret", "token"): {"value": "s3"},
        ("json", "conf"): {"value": {"a": [{"b": 1}], "values": 2}},
        ("aws", "creds"): {"key": "k", "region": "eu"},
    }
    value = {
        "one value": "{{ prefect.blocks.secret.token }}",
        "spelled out": "{{ prefect.blocks.secret.token.value }}",
        "inside": "{{ prefect.blocks.json.conf.value.a[0].b }}",
        "inside, short": "{{ prefect.blocks.json.conf.values }}",
        "table": "{{ prefect.blocks.aws.creds }}",
        "text": "{{ prefect.blocks.aws.creds.region }}-1:{{ prefect.blocks.secret.token }}:{{ prefect.variables.v }}",
        "by id": {"$ref": {"block_document_id": "id-1"}},
    }
    assert placeholders.put_blocks(value, by_name, {"id-1": {"value": 5}}) == {
        "one value": "s3",
        "spelled out": "s3",
        "inside": 1,
        "inside, short": 2,
        "table": {"key": "k", "region": "eu"},
        "text": "eu-1:s3:{{ prefect.variables.v }}",
        "by id": {"value": 5},
    }


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{{ prefect.blocks.aws.creds.nope }}", r"'prefect\.blocks\.aws\.creds\.nope'.*nothing at 'nope'"),
        ("in {{ prefect.blocks.aws.creds }}", r"'prefect\.blocks\.aws\.creds' into text: it is a table"),
    ],
)
def test_a_block_that_cannot_be_put_in_is_named_without_its_data(text: str, sentence: str) -> None:
    with pytest.raises(JobError, match=sentence) as caught:
        placeholders.put_blocks(text, {("aws", "creds"): {"key": "hush"}}, {})
    assert "hush" not in str(caught.value)


def test_a_block_placeholder_without_a_block_is_explained() -> None:
    with pytest.raises(JobError, match=r"'prefect\.blocks\.secret'.*<block-type-slug>\.<block-name>"):
        placeholders.block_names(["{{ prefect.blocks.secret }}"])


def test_variables_keep_their_type_alone_and_missing_ones_are_empty_text() -> None:
    value = [
        "{{ prefect.variables.n }}",
        "n={{ prefect.variables.n }}",
        "{{ prefect.variables.no }}",
        "a{{ prefect.variables.no }}b",
    ]
    assert placeholders.variable_names(value) == {"n", "no"}
    assert placeholders.put_variables(value, {"n": 5}) == [5, "n=5", "", "ab"]


def test_overrides_make_the_tables_they_need_and_stop_at_what_is_none() -> None:
    data = {"env": None, "command": ["a"], "working_dir": "/w"}
    assert template.override_block(data, {"env.A": "1", "x.y.z": 2}, {"env.B": "2"}) == {
        "env": {"A": "1", "B": "2"},
        "command": ["a"],
        "working_dir": "/w",
        "x": {"y": {"z": 2}},
    }
    with pytest.raises(JobError, match=r"^cannot set job variable 'command\.a': 'command' in it is a list"):
        template.override_block(data, {"command.a": "1"}, {})


@pytest.mark.parametrize("value", [None, "", "  ", [], "python -m prefect.engine", ["python", "-m", "prefect.engine"]])
def test_no_command_and_prefects_own_default_mean_the_engine(value: Any) -> None:
    assert template.as_command(value) is None


def test_a_command_with_broken_quotes_is_refused_except_where_2x_took_it() -> None:
    with pytest.raises(JobError, match=r"^cannot split the job's command into words: No closing quotation"):
        template.as_command("python it's.py")
    assert template.as_command("python it's.py", lenient=True) == ("python", "it's.py")


def test_env_values_become_text_and_null_stays_an_unset() -> None:
    assert template.as_env({"A": 1, "B": None, "C": True, "D": "x", "E": 1.5}) == {
        "A": "1",
        "B": None,
        "C": "True",
        "D": "x",
        "E": "1.5",
    }
    assert template.as_env(None) == {}


@pytest.mark.parametrize("env", [{"": "x"}, {"A=B": "x"}, {"A\0": "x"}, {"A": "secret\0"}, "A=secret"])
def test_an_env_that_no_process_could_have_is_refused_without_showing_values(env: Any) -> None:
    with pytest.raises(JobError, match=r"^cannot (set environment variable|use the job's env)") as caught:
        template.as_env(env)
    assert "secret" not in str(caught.value)


def test_commands_and_directories_of_the_wrong_type_are_refused() -> None:
    for command in (5, {"a": 1}, ["a", 1]):
        with pytest.raises(JobError, match=r"^cannot use the job's command: it is a (number|table|list); make it text"):
            template.as_command(command)
    for directory in (5, ["/a"], "/a\0"):
        with pytest.raises(JobError, match=r"^cannot use the job's working_dir: "):
            template.as_working_dir(directory)
    assert template.as_working_dir("") is None
    assert template.as_working_dir("/srv") == "/srv"
