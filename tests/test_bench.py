"""The functions that benches share, and the provenance of the tracked results."""

import ast
import csv
import json
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

path = list(sys.path)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benches are not installed
import bench  # noqa: E402

sys.path[:] = path  # the root would hide PyPI's `kernels`


def test_a_command_can_be_run_again_and_names_no_folder_of_the_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    given = "--sheet=/a/b=c/d.png --keep /a/keep/ --scores 10:7.5/1:50 --out here/too -n 4 --csv"
    argv = ["/somewhere/bench/layout.py", "--methods", "drop 0", "plain", *given.split()]
    monkeypatch.setattr(sys, "argv", argv)
    for k in (1, 2):  # one header for both
        bench.write_csv("layout", [{"model": "/a/b/model.safetensors", "share": "7/8", "k": k}])
    with (tmp_path / "layout.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["share"], row["k"]) for row in rows] == [
        ("model.safetensors", "7/8", k) for k in "12"
    ]
    kept = "--sheet=d.png --keep keep --scores 10:7.5/1:50 --out here/too -n 4 --csv"
    assert rows[0]["command"] == f"python -m bench.layout --methods 'drop 0' plain {kept}"


def test_every_tracked_row_names_a_bench_and_no_folder_of_a_machine():
    files = sorted(bench.RESULTS.glob("*.csv"))
    assert files
    for file in files:
        with file.open() as lines:
            for row in csv.DictReader(lines):
                python, flag, module, *arguments = shlex.split(row["command"])
                assert (python, flag) == ("python", "-m"), file
                assert (bench.RESULTS.parent / f"{module.removeprefix('bench.')}.py").is_file(), file
                # as it would be written today
                assert row["command"] == shlex.join([python, flag, module, *map(bench.shown, arguments)]), (
                    file
                )
                assert not any(value.startswith("/") for value in row.values() if value), file


def test_rows_with_a_new_column_keep_the_rows_before(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "results")
    bench.write_csv("x", [{"a": 1, "b": "p, q"}])
    bench.write_csv("x", [{"a": 2, "c": 3}, {"a": 4, "c": ""}])
    bench.write_csv("x", [{"c": 5, "a": 6}])
    with bench.write_csv("x", [{"a": 7, "b": 8}]).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["a"], row["b"], row["c"]) for row in rows] == [
        ("1", "p, q", ""),
        ("2", "", "3"),
        ("4", "", ""),
        ("6", "", "5"),
        ("7", "8", ""),
    ]
    assert all(row["command"].startswith("python -m ") for row in rows)


def test_rates_have_wilsons_interval():
    from scipy.stats import binomtest

    for n in (1, 7, 200):
        for k in range(n + 1):
            truth = binomtest(k, n).proportion_ci(method="wilson")
            assert bench.wilson(k, n) == pytest.approx((truth.low, truth.high), abs=1e-6)
            assert "-0.000-" not in bench.rate("strict", k, n)["strict_95"]
            assert not bench.rate("strict", k, n)["strict_95"].startswith("-")


def test_a_bench_in_a_process_of_its_own(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setattr(sys, "argv", ["maps.py", "--model", "shapes", "--size", "128", "--runs", "1"])
    result = bench.in_own_process("--worker", "minsd")
    assert len(result["gradient"]) == 4 * 16 * 16
    assert len(result["seconds"]) == 1 and result["peak_mb"] > 50
    message = r"invalid choice: 'none'(.|\n)*python -m bench.maps .* failed with exit code 2"
    with pytest.raises(SystemExit, match=message):
        bench.in_own_process("--worker", "none")


def test_both_providers_of_the_unet_bench_compute_the_same():
    """On the embedded model, whose group norms are not of diffusers' default size."""
    from bench import unet

    ours = unet.build("shapes", torch.float32, "cpu")
    theirs = unet.build_diffusers("shapes", torch.float32, "cpu")
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 16, 16, generator=g)
    context = torch.randn(2, 77, ours.config.context_dim, generator=g)
    with torch.no_grad():
        a = ours(x, 481, context)
        b = theirs(x, 481, context).sample
    assert (a - b).norm() < 1e-5 * b.norm()


def test_every_flag_has_a_help_text():
    for file in sorted(bench.RESULTS.parent.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                assert any(keyword.arg == "help" for keyword in node.keywords), (file.name, node.lineno)


def test_the_methods_bench_pairs_what_all_methods_have_drawn(tmp_path):
    """Every method's settings are valid; the table has only prompts that all methods have drawn."""
    from bench import methods
    from minsd.config import MODELS
    from minsd.noise import steer

    sd = SimpleNamespace(config=MODELS["shapes"])
    for name in methods.METHODS:
        method = methods.scaled(sd, name, 2.0)
        if method.objective is not None:
            steer.choose(method.objective, driver=method.driver, settings=method.settings)
    for group in methods.GROUPS:
        drawn = methods.group_cases(group, 30, True)
        assert len(drawn) == 30 and all(len({shape for _, shape in s}) == len(s) for s in drawn)
    costs = {"cpu_seconds": 2.0, "unet_rows": 100.0, "gradient": 0.0, "stopped": 0.0, "peak_mb": 9.0}
    jobs = [
        methods.Job("shapes", "two", method, 1.0, 30, start, False, tmp_path)
        for start in (0, 10, 20)
        for method in ("plain", "excite")
    ]
    for job, good in zip(jobs, (3, 6, 5, 9, 4)):  # the last batch lacks one of the two
        found = [(k < good, k < good, True, "right", costs) for k in range(10)]
        job.file.write_text(json.dumps(found))
    plain, excite = methods.table(jobs)
    assert (plain["n"], plain["right"], excite["right"], excite["right_colours"]) == (20, 0.4, 0.75, 1.0)
    assert excite["gain_no_neglect_95"].startswith("+0.350 [+0.136")  # 0.35 - 1.96 * sd / sqrt(20)
    assert (excite["rival"], excite["over_rival_95"]) == ("plain", excite["gain_no_neglect_95"])
    images = {
        (name, 1.0): [methods.Judged(True, True, True, "right", {"cpu_seconds": seconds})]
        for name, seconds in (("plain", 1), ("pick-5", 1.1), ("pick-16", 1.9), ("initno", 2.5), ("best", 2))
    }
    assert [methods.rival_of(name, images)[0] for name in ("initno", "pick-16", "plain")] == [
        "pick-16",
        "pick-5",
        "pick-5",
    ]


def test_the_methods_bench_tunes_step_sizes_and_then_uses_them(tmp_path):
    from bench import methods

    kept = {"model": "shapes", "keep": tmp_path, "groups": ["two"], "n": 10, "factors": [0.5, 1.0, 2.0]}
    args = SimpleNamespace(**kept, tune=10, methods=["plain", "pick-5", "excite", "saga", "overlap"])
    tried = list(methods.all_jobs(args))
    assert {(job.method, job.scale, job.tune) for job in tried} == {
        (method, scale, True) for method in ("excite", "overlap") for scale in (0.5, 1.0, 2.0)
    }
    values = [("excite", 0.5, 0.8, 0.6), ("excite", 2.0, 0.8, 0.7), ("excite", 1.0, 0.7, 0.7)]
    values += [("overlap", 2.0, 0.5, 0.4), ("overlap", 1.0, 0.5, 0.4), ("overlap", 0.5, 0.5, 0.3)]
    columns = ("method", "scale", "no_neglect", "right", "n")
    scales = methods.chosen_scales([dict(zip(columns, (*row, 10))) for row in values])
    assert scales == {"excite": 2.0, "overlap": 1.0}  # the more right; of equal ones the published
    (tmp_path / methods.SCALES).write_text(json.dumps(scales))
    args.tune = 0
    drawn = {job.method: job.scale for job in methods.all_jobs(args)}
    assert drawn == {"plain": 1.0, "pick-5": 1.0, "excite": 2.0, "saga": 1.0, "overlap": 1.0}
