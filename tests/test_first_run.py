"""The first run on a GPU: its driver with stand-in steps, and the whole of it on a CPU."""

import shlex
import sys
import tarfile
import time
from pathlib import Path

import pytest

path = list(sys.path)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benches are not installed
from bench import first_run  # noqa: E402
from bench.first_run import STEPS, Step, take_all  # noqa: E402

sys.path[:] = path  # the root would hide PyPI's `kernels`

CODE = "timeit -n 1 -r 1 -s"  # runs the code that follows


def running(code: str, name: str = "step", limit: int = 60) -> Step:
    return Step(name, limit, f"{CODE} {shlex.quote(code)}")


def lines_of(out: Path) -> list[str]:
    return (out / "summary.txt").read_text().splitlines()


def states(out: Path) -> list[tuple[str, str]]:
    """(name, first word of the state) per step."""
    return [(line.split()[0], line.split()[1]) for line in lines_of(out)]


def main(monkeypatch: pytest.MonkeyPatch, *options: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["first_run.py", *options])
    with pytest.raises(SystemExit) as end:
        first_run.main()
        sys.exit(0)
    return end.value.code


@pytest.mark.parametrize("options", [[], ["--cpu"]], ids=str)
def test_dry_lists_every_step_with_its_command_and_limit(options, monkeypatch, capsys, tmp_path):
    out = tmp_path / "out"
    assert main(monkeypatch, "--dry", "--out", str(out), *options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [step.name for step in STEPS]
    for line, step in zip(lines, STEPS):
        limit = first_run.CPU_LIMIT if options else step.limit
        needs_gpu = options and step.cpu is None
        told = first_run.NO_GPU if needs_gpu else f"python -m {step.command.split()[0]}"
        assert f"{limit} s  {told}" in line
    assert not out.exists()


def test_every_command_names_files_that_are_there():
    for step in STEPS:
        for word in first_run.arguments(step, False, Path("out")):
            if word.startswith("bench."):
                assert (first_run.ROOT / word.replace(".", "/")).with_suffix(".py").is_file()
            if word.startswith("tests/"):
                assert (first_run.ROOT / word).is_file()


def test_steps_can_be_chosen(monkeypatch, capsys):
    assert main(monkeypatch, "--dry", "--steps", "maps", "smoke") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["smoke", "maps"]
    assert main(monkeypatch, "--dry", "--steps", "nothing") == 2


def test_no_step_stops_the_next(tmp_path, capsys):
    child = tmp_path / "child"
    endless = (
        f"import subprocess, time; child = subprocess.Popen(['sleep', '600']);"
        f" open({str(child)!r}, 'w').write(str(child.pid)); print('began'); time.sleep(600)"
    )
    out = tmp_path / "out"
    steps = (
        running("raise ValueError('wrong')", "wrong"),
        Step("missing", 60, "no_such_module"),
        running("import os; os.kill(os.getpid(), 9)", "killed"),
        running(endless, "endless", limit=2),
        running("print(12, 'figures')", "good"),
    )
    assert take_all(steps, out, False, 300) == 1
    assert states(out) == [
        ("wrong", "failed"),
        ("missing", "failed"),
        ("killed", "failed"),
        ("endless", "timed"),
        ("good", "ok"),
    ]
    told = capsys.readouterr()
    assert told.out.splitlines() == told.err.splitlines() == lines_of(out)
    assert "ValueError: wrong" in told.out
    assert "No module named no_such_module" in told.out
    assert "timed out     2 s  began" in told.out
    assert sorted(file.name for file in out.iterdir()) == ["log.txt", "results.tar", "summary.txt"]
    assert "12 figures" in (out / "log.txt").read_text()
    assert ended(int(child.read_text()))


def ended(pid: int) -> bool:
    """Whether a process is gone within ten seconds, or waits only for its parent to notice."""
    for _ in range(100):
        stat = Path(f"/proc/{pid}/stat")
        try:
            if stat.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False


def test_what_was_left_out_for_a_reason_is_no_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(first_run, "LEAST", 2)
    steps = (
        running("print('done')", "good"),
        Step("gpu_alone", 60, CODE, cpu=None),
        running("import time; time.sleep(600)", "long"),
        running("print('done')", "late"),
    )
    assert take_all(steps, tmp_path, True, 5) == 0
    assert states(tmp_path) == [
        ("good", "ok"),
        ("gpu_alone", "skipped"),
        ("long", "skipped"),
        ("late", "skipped"),
    ]
    good, gpu, long, late = lines_of(tmp_path)
    assert gpu.endswith(first_run.NO_GPU)
    assert "no time left to finish" in long
    assert late.endswith("no time left")


def test_tests_that_all_skip_are_a_skipped_step(tmp_path):
    needs = tmp_path / "test_needs.py"
    needs.write_text("import pytest\n\ndef test_it():\n    pytest.skip('needs a CUDA device')\n")
    steps = (
        Step("all", 60, f"{first_run.PYTEST} {needs}"),
        Step("none", 60, f"{first_run.PYTEST} {tmp_path / 'no.py'}"),
    )
    out = tmp_path / "out"
    assert take_all(steps, out, True, 300) == 1
    assert states(out) == [("all", "skipped"), ("none", "failed")]
    assert "needs a CUDA device (1 skipped in " in lines_of(out)[0]


def test_rows_are_kept_as_they_come_and_figures_are_read_from_them(tmp_path, monkeypatch):
    """A bench's rows go to results.tar, not to bench/results: those of one that is killed, too."""
    package = tmp_path / "bench"
    package.mkdir()
    (package / "__init__.py").write_text("RESULTS = None\n")
    (package / "slow.py").write_text(
        "import sys, time, bench\n"
        "bench.RESULTS.mkdir()\n"
        "(bench.RESULTS / 'slow.csv').write_text('provider,seconds\\nother,1\\nminsd,2.5\\n')\n"
        "time.sleep(float(sys.argv[1]))\n"
    )
    monkeypatch.setattr(first_run, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    out = tmp_path / "out"
    steps = (
        Step("short", 60, "bench.slow 0", figure="seconds fused/minsd"),
        Step("long", 4, "bench.slow 600", figure="seconds minsd"),
        Step("unknown", 60, "bench.slow 0", figure="seconds nobody"),
    )
    assert take_all(steps, out, False, 300) == 1
    short, long, unknown = lines_of(out)
    assert short.endswith("minsd: seconds 2.5")
    assert "timed out" in long and long.endswith("minsd: seconds 2.5")
    assert unknown.endswith("no output")
    with tarfile.open(out / "results.tar") as tar:
        assert tar.getnames() == [f"{name}/slow.csv" for name in ("long", "short", "unknown")]


def test_the_log_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr(first_run, "LOG_BYTES", 1000)
    long = "print('first'); print('x' * 50_000); print('last')"
    steps = (running(long), running("print('next')"))
    assert take_all(steps, tmp_path, True, 300) == 0
    log = (tmp_path / "log.txt").read_text()
    assert len(log) < 3000
    for word in ("first", "[... cut ...]", "last", "next"):
        assert word in log


def test_earlier_results_are_not_overwritten(tmp_path, monkeypatch, capsys):
    (tmp_path / "log.txt").touch()
    assert main(monkeypatch, "--cpu", "--out", str(tmp_path)) == 2
    assert "holds an earlier run; give a new folder" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_run_on_a_cpu(tmp_path, monkeypatch):
    results = first_run.ROOT / "bench/results"
    before = {file: file.stat().st_mtime for file in results.iterdir()}
    code = main(monkeypatch, "--cpu", "--out", str(tmp_path))
    assert code == 0, (tmp_path / "log.txt").read_text()
    assert [name for name, _ in states(tmp_path)] == [step.name for step in STEPS]
    assert {state for _, state in states(tmp_path)} == {"ok", "skipped"}
    assert states(tmp_path)[0] == ("smoke", "ok")
    assert len(list(tmp_path.iterdir())) <= 8
    assert (tmp_path / "smoke.png").is_file()
    assert before == {file: file.stat().st_mtime for file in results.iterdir()}
    for line in lines_of(tmp_path):
        if line.split()[1] == "skipped":
            assert first_run.NO_GPU in line or "no time left" in line
