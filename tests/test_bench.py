"""What benches share, and what their tracked results say of where they came from."""

import csv
import shlex
import sys
from pathlib import Path

import pytest

path = list(sys.path)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benches are not installed
import bench  # noqa: E402

sys.path[:] = path  # the root would hide PyPI's `kernels`


def test_a_command_can_be_run_again_and_names_no_folder_of_the_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "/somewhere/bench/layout.py",
            "--methods",
            "drop 0",
            "plain",
            "--sheet=/a/b=c/d.png",
            "--keep",
            "/a/keep/",
            "--scores",
            "10:7.5/1:50",
            "--out",
            "here/too",
            "-n",
            "4",
            "--csv",
        ],
    )
    for k in (1, 2):  # one header for both
        bench.write_csv("layout", [{"model": "/a/b/model.safetensors", "share": "7/8", "k": k}])
    with (tmp_path / "layout.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["share"], row["k"]) for row in rows] == [
        ("model.safetensors", "7/8", k) for k in "12"
    ]
    assert rows[0]["command"] == (
        "python -m bench.layout --methods 'drop 0' plain --sheet=d.png --keep keep --scores 10:7.5/1:50 --out here/too -n 4 --csv"
    )


def test_every_tracked_row_names_a_bench_and_no_folder_of_a_machine():
    files = sorted(bench.RESULTS.glob("*.csv"))
    assert files
    for file in files:
        with file.open() as lines:
            for row in csv.DictReader(lines):
                python, flag, module, *arguments = shlex.split(row["command"])
                assert (python, flag) == ("python", "-m") and (
                    bench.RESULTS.parent / f"{module.removeprefix('bench.')}.py"
                ).is_file(), file
                assert row["command"] == shlex.join([python, flag, module, *map(bench.shown, arguments)]), (
                    file
                )  # as it is written today
                assert not any(value.startswith("/") for value in row.values() if value), file


def test_rates_have_wilsons_interval():
    from scipy.stats import binomtest

    for n in (1, 7, 200):
        for k in range(n + 1):
            truth = binomtest(k, n).proportion_ci(method="wilson")
            assert bench.wilson(k, n) == pytest.approx((truth.low, truth.high), abs=2e-5)  # z is 1.96 here
            assert "-0.000-" not in bench.rate("strict", k, n)["strict_95"]
            assert not bench.rate("strict", k, n)["strict_95"].startswith("-")


def test_a_bench_in_a_process_of_its_own(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setattr(sys, "argv", ["maps.py", "--model", "shapes", "--size", "128", "--runs", "1"])
    told = bench.in_own_process("--worker", "minsd")
    assert len(told["gradient"]) == 4 * 16 * 16 and len(told["seconds"]) == 1 and told["peak_mb"] > 50
    with pytest.raises(
        SystemExit, match=r"invalid choice: 'none'(.|\n)*python -m bench.maps .* failed with exit code 2"
    ):
        bench.in_own_process("--worker", "none")
