"""What the pages say was measured is what the samples say, and the report holds up without some of them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import figures, report
from benchmarks.chart import TIMES, Panel, draw
from benchmarks.contenders import CONTENDERS, VERSION, VERSION_2
from benchmarks.figures import AIMS, ROWS, Figures
from benchmarks.measures import MEASURES, Sample
from benchmarks.processes import Cpu, alone_megabytes, family, pss_megabytes
from benchmarks.session import Progress, Results, plan

MACHINE = {
    "date": "2026-01-02",
    "flow-agent": "0.1.0",
    "commit": "abcdef0",
    "cores": 2,
    "processor": "a processor",
    "system": "Linux 6.1",
    "python": "3.11.2",
    "load before": 0.1,
    "rounds": 3,
    "minutes": 12.5,
}
SAMPLES = {
    "create": {"worker": [10.0, 8.0, 15.0], "cold": [2.0, 1.0, 1.5], "warm": [0.5, 0.25, 2.0], "agent": [9.0]},
    "throughput 4": {"worker": [14.0], "cold": [21.0], "warm": [140.0]},
    "late": {"worker": [1.0, 2.0], "warm": [float(number) / 100 for number in range(1, 101)]},
    "cpu own": {"worker": [0.1], "warm": [0.0125]},
    "left behind": {"worker": [0.0], "agent": [1.0]},
}
FOUND = Figures(MACHINE, SAMPLES, ("3.8.8 limit 4, cancel cold: not within 60 s",))


def table(text: str, row: str) -> list[str]:
    [line] = [line for line in text.splitlines() if line.startswith(f"| {row}") and "**" in line]
    return [cell.strip() for cell in line.strip("|").split(" | ")]


# --- the repository's own pages ---------------------------------------------------------------------------------------


def test_page_chart_and_readme_are_what_the_samples_say() -> None:
    found = figures.load()
    told = "write them anew: .venv/bin/python -m benchmarks --render"
    assert report.PAGE.read_text() == report.page(found), told
    assert report.CHART.read_text() == report.chart_of(found), told
    readme = report.README.read_text()
    assert readme == report.with_figures(readme, found), told


def test_the_samples_are_of_contenders_and_rows_that_there_are() -> None:
    rows = {row.of for row in ROWS.values()}
    for row, samples in figures.load().samples.items():
        assert row in rows
        assert set(samples) <= {*CONTENDERS, *report.PROGRAMS}
        assert all(value >= 0 for values in samples.values() for value in values) or row == "late"


def test_what_is_saved_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "DATA", tmp_path / "benchmarks.json")
    figures.save(FOUND)
    assert figures.load() == FOUND
    assert '"worker": [10.0, 8.0, 15.0]' in figures.DATA.read_text()


# --- figures ----------------------------------------------------------------------------------------------------------


def test_a_figure_is_the_median_in_the_unit_of_its_row() -> None:
    assert figures.figure(FOUND, "create", "worker") == 10
    assert figures.figure(FOUND, "cpu own", "warm") == 12.5
    assert figures.figure(FOUND, "cancel", "warm") is None


def test_the_95th_percentile_is_a_value_that_was_measured() -> None:
    assert figures.figure(FOUND, "late 95", "warm") == 0.95
    assert figures.percentile_95([3.0]) == 3
    assert figures.percentile_95([1.0, 2.0]) == 2


def test_a_ratio_is_to_the_reference_and_there_is_none_without_one() -> None:
    assert figures.ratio(FOUND, "create", "cold", "worker") == 0.15
    assert figures.ratio(FOUND, "create", "cold2", "agent") is None
    assert figures.ratio(FOUND, "left behind", "agent", "worker") is None  # by 0


def test_there_is_no_ratio_of_what_was_early() -> None:
    early = Figures(MACHINE, {"late": {"worker": [-0.5, -0.1, -0.1], "warm": [0.2], "cold": [-0.1]}})
    assert figures.figure(early, "late", "worker") == 0.1  # off its time, whichever way
    assert figures.ratio(early, "late", "warm", "worker") == 2
    assert figures.ratio(early, "late 95", "warm", "worker") is None
    late = Figures(MACHINE, {"late": {"worker": [0.5], "warm": [-0.1]}})
    assert figures.ratio(late, "late 95", "warm", "worker") is None
    assert figures.gain(late, "late 95", CONTENDERS["warm"]) is None


def test_a_gain_is_more_than_1_where_we_are_better_whichever_way_the_row_counts() -> None:
    assert figures.gain(FOUND, "create", CONTENDERS["warm"]) == 20
    assert figures.gain(FOUND, "throughput 4", CONTENDERS["warm"]) == 10


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.0667, "0.067"), (0.15, "0.15"), (1.25, "1.2"), (13.8, "14"), (138.4, "138")]
)
def test_a_number_has_two_digits_that_mean_something(value: float, text: str) -> None:
    assert figures.digits(value) == text


# --- pages ------------------------------------------------------------------------------------------------------------


def test_a_table_shows_median_spread_count_and_ratio() -> None:
    cells = table(report.tables(FOUND), "create → RUNNING, s")
    assert "### The command" not in report.tables(FOUND)  # nothing of it was measured
    assert cells[1:] == [
        "10 (8.0 to 15, n 3)",
        "1.5 (1.0 to 2.0, n 3)",
        "**0.15**",
        "0.50 (0.25 to 2.0, n 3)",
        "**0.050**",
    ]


def test_aims_say_whether_they_were_reached() -> None:
    said = report.aims(FOUND).splitlines()
    assert len(said) == len(AIMS)
    verdicts = {line.partition(":")[0]: line for line in said}
    assert verdicts["- flow-agent, warm, create → RUNNING"].endswith(
        "wanted at most 0.067 times the worker's; found 0.0500: **reached**"
    )
    assert verdicts["- flow-agent, no-op runs at limit 4"].endswith(
        "wanted at least 2.0 times the worker's; found 1.50: **not reached**"
    )
    assert verdicts["- flow-agent, warm, lateness, p95"].endswith(
        "wanted at most 0.20 s; found 0.950 s: **not reached**"
    )
    assert verdicts["- flow-agent, cancel"].endswith("**not measured**")


def test_the_page_tells_machine_date_commit_and_what_failed() -> None:
    page = report.page(FOUND)
    for said in ("2026-01-02", "2 cores (a processor)", "abcdef0", "make bench", "not within 60 s"):
        assert said in page
    for row in ROWS.values():
        assert row.meaning in page


def test_the_readmes_part_is_replaced_and_nothing_else() -> None:
    text = "before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n"
    new = report.with_figures(text, FOUND)
    assert new.startswith("before\n<!-- bench -->\n![")
    assert new.endswith("<!-- /bench -->\nafter\n")
    assert "old" not in new
    assert "| create → RUNNING, s | 10 | 1.5 (6.7 times) | 0.50 (20 times) |" in new
    with pytest.raises(ValueError, match="cannot write the figures"):
        report.with_figures("nothing", FOUND)


def test_the_chart_is_well_formed_and_shows_every_gain() -> None:
    root = ElementTree.fromstring(report.chart_of(FOUND))
    texts = ["".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert f"20{TIMES}" in texts
    assert f"10{TIMES}" in texts
    assert f"1.5{TIMES}" in texts


def test_a_bar_goes_to_the_right_where_we_are_better_and_to_the_left_where_we_are_worse() -> None:
    root = ElementTree.fromstring(draw([Panel("a < b", ["one", "two"], [("row", [4.0, 0.5])])]))
    space = "{http://www.w3.org/2000/svg}"
    [one] = [float(line.attrib["x1"]) for line in root.iter(f"{space}line") if line.attrib["class"] == "one"]
    better, worse = [
        bar for bar in root.iter(f"{space}rect") if bar.attrib["height"] != "12" or bar.attrib["width"] != "12"
    ]
    assert float(better.attrib["x"]) == pytest.approx(one, abs=0.1)
    assert float(worse.attrib["x"]) + float(worse.attrib["width"]) == pytest.approx(one, abs=0.1)


def test_a_chart_without_a_figure_is_still_one() -> None:
    ElementTree.fromstring(report.chart_of(Figures(MACHINE, {})))


# --- the session ------------------------------------------------------------------------------------------------------


def test_every_contender_is_the_first_in_some_round_and_slow_measures_are_not_taken_in_all() -> None:
    turns = list(plan(6, list(MEASURES.values()), list(CONTENDERS.values())))
    at_4 = [turn for turn in turns if turn.limit == 4]
    assert {turn.contenders[0] for turn in at_4} == set(CONTENDERS.values())
    assert [turn.version for turn in at_4[:4]] == [VERSION, VERSION_2, VERSION_2, VERSION]
    taken = Counter(measure.name for turn in turns for measure in turn.measures)
    assert taken["create"] == 12
    assert taken["late"] == 4
    assert taken["throughput-16"] == 4
    assert {turn.limit for turn in turns if turn.round == 1} == {4}


def test_what_is_measured_twice_in_a_round_is_so_with_the_others_turns_between() -> None:
    [turn] = (turn for turn in plan(1, [MEASURES["create"]], list(CONTENDERS.values())) if turn.version == VERSION)
    assert [contender.key for _, [contender] in turn.steps()] == ["worker", "cold", "warm"] * 2
    assert len(list(turn.ahead())) == 7


def test_one_round_has_all_measures() -> None:
    turns = list(plan(1, list(MEASURES.values()), list(CONTENDERS.values())))
    for version in (VERSION, VERSION_2):
        assert {m.name for turn in turns if turn.version == version for m in turn.measures} == set(MEASURES)


def test_progress_knows_what_is_left_from_what_has_been_seen(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress([("one", 600.0), ("two", 60.0), ("one", 600.0)])
    progress.step("one", "found")
    assert "  1.0 min left  one: found" in capsys.readouterr().out  # the second "one" takes no time either
    progress.skip(["two", "two"])
    progress.step("one", "found")
    assert "  0.0 min left" in capsys.readouterr().out


def test_what_could_not_be_measured_is_kept_by_its_first_line(capsys: pytest.CaptureFixture[str]) -> None:
    results = Results(MACHINE)
    results.add(Sample("create", "warm", 1.234567))
    results.fail("create warm", AssertionError("not within 60 s\nand a log"))
    results.fail("idle", AssertionError())
    assert results.failures == ["create warm: not within 60 s", "idle: AssertionError"]
    assert "and a log" in capsys.readouterr().out
    assert results.samples == {"create": {"warm": [1.23457]}}


# --- processes --------------------------------------------------------------------------------------------------------

BUSY = """
import subprocess, sys, time
memory = bytearray(50_000_000)
for place in range(0, len(memory), 4096): memory[place] = 1
print("ready", flush=True)
sys.stdin.readline()
began = time.process_time()
subprocess.run([sys.executable, "-S", "-c", "import time\\nwhile time.process_time() < 0.3: pass"])
while time.process_time() < began + 0.2: pass
print("done", flush=True)
time.sleep(600)
"""


def test_memory_and_cpu_of_a_process_are_told_and_what_its_children_took() -> None:
    command = [sys.executable, "-S", "-c", BUSY]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            before = Cpu(family(process.pid))
            print(file=process.stdin, flush=True)
            assert process.stdout.readline() == "done\n"
            after = Cpu(family(process.pid))
            memory = pss_megabytes(process.pid), alone_megabytes(process.pid)
        finally:
            process.kill()
    assert 48 < memory[0] <= memory[1] < 80
    assert 0.2 <= after.own_since(before) < 0.3
    assert after.all_since(before) - after.own_since(before) >= 0.25  # in clock ticks


def test_a_contender_that_does_not_exist_is_refused_before_anything_starts() -> None:
    command = [sys.executable, "-m", "benchmarks", "--contenders", "worker,nobody", "--rounds", "0", "--no-write"]
    asked = subprocess.run(command, capture_output=True, text=True)
    assert asked.returncode == 2
    assert re.search(r"there is no nobody; there is worker, cold", asked.stderr)
