"""--engine ray: with a stand-in for Ray, whose actors run here and can be lost; and with Ray itself."""

import json
import pickle
import sys
import types
import warnings

import pytest
import torch

from minsd import image
from minsd.app import cluster, run
from minsd.generate import main

SIZE = ["--steps", "1", "--height", "64", "--width", "64"]


class Lost(Exception):
    pass


class Ray:
    """Tasks run when they are waited for, one per call. `plan`: for each batch that begins, in order, whether
    its worker is lost; `nodes_at`: (batches begun, cores of the cluster from then on)."""

    def __init__(self, plan=(), nodes_at=((0, 2),)):
        self.plan, self.nodes_at = list(plan), list(nodes_at)
        self.begun = self.started = 0
        self.tasks = []  # (reference, actor, name, arguments)
        self.results, self.lost = {}, set()
        self.exceptions = types.SimpleNamespace(RayError=Lost)

    def init(self, **options):
        pass

    def shutdown(self):
        self.stopped = True

    def nodes(self):
        cores = [cores for begun, cores in self.nodes_at if begun <= self.begun][-1]
        return [
            {"Alive": True, "Resources": {"CPU": float(cores)}},
            {"Alive": False, "Resources": {"CPU": 99.0}},
        ]

    def remote(self, **needs):
        assert needs == {"num_cpus": 1}
        return lambda kind: types.SimpleNamespace(remote=lambda: self._actor(kind()))

    def _actor(self, worker):
        self.started += 1
        number = self.started

        def method(name):
            def submit(*arguments):
                reference = len(self.tasks) + 1000 * number
                self.tasks.append(
                    (reference, number, getattr(worker, name), pickle.loads(pickle.dumps(arguments)))
                )
                return reference

            return types.SimpleNamespace(remote=submit)

        return types.SimpleNamespace(**{name: method(name) for name in ("open", "draw", "batch_size")})

    def wait(self, references, timeout):
        reference = references[0]
        if reference not in self.results:
            self.results[reference] = self._run(reference)
        return [reference], references[1:]

    def _run(self, reference):
        _, number, call, arguments = next(task for task in self.tasks if task[0] == reference)
        if call.__name__ == "draw" and number not in self.lost:
            self.begun += 1
            if self.plan and self.plan.pop(0):
                self.lost.add(number)
        return Lost("gone") if number in self.lost else pickle.loads(pickle.dumps(call(*arguments)))

    def get(self, reference):
        result = self.results.get(reference)
        result = self._run(reference) if result is None and reference not in self.results else result
        if isinstance(result, Lost):
            raise result
        return result


@pytest.fixture
def ray(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(
        cluster, "batches", lambda wanted, size: run.batches(wanted, lambda h, w: min(2, size(h, w)))
    )

    def make(*args, **more):
        fake = Ray(*args, **more)
        monkeypatch.setitem(sys.modules, "ray", fake)
        return fake

    return make


def draw(out, *args):
    return main(["a red circle", *map(str, args), *SIZE, "--out", str(out)])


def pictures(folder):
    """Seed -> pixels; each image complete, and with a row that is true."""
    rows = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    found = {}
    for row in rows:
        assert image.verified(folder / row["file"], whole=True)["seed"] == row["seed"] not in found
        found[row["seed"]] = image.to_tensor([image.read(folder / row["file"])])
    assert len(list(folder.glob("*.png"))) == len(rows)
    return found


def test_every_image_once_whatever_workers_are_lost(tmp_path, ray):
    assert draw(tmp_path / "alone", "--seeds", "0-8") == 0
    fake = ray([False, True, False, True, True, False], nodes_at=[(0, 2), (4, 3)])
    assert draw(tmp_path / "ray", "--seeds", "0-8", "--engine", "ray", "--save-noise") == 0
    assert fake.stopped and fake.started == 3 + 3  # three lost, one more after the cluster grew
    alone, found = pictures(tmp_path / "alone"), pictures(tmp_path / "ray")
    assert sorted(found) == list(range(9))
    assert all((alone[seed] - found[seed]).abs().max() <= 2.01 / 255 for seed in found)  # of -1..1: one level
    assert len(list((tmp_path / "ray" / "extra").glob("*-noise.safetensors"))) == 9
    fake = ray()
    assert draw(tmp_path / "ray", "--seeds", "0-9", "--resume", "--engine", "ray") == 0
    assert fake.begun == 1 and len(pictures(tmp_path / "ray")) == 10


def test_a_batch_that_ends_its_workers_is_reported(tmp_path, ray, capfd):
    ray([True] * cluster.LOSSES * 2)
    assert draw(tmp_path, "--seeds", "0", "--engine", "ray") == 1
    assert "its worker ended without a message, 3 times" in capfd.readouterr().err
    ray([True] * 1000)
    assert draw(tmp_path, "--seeds", "0-99", "--engine", "ray") == 1
    assert "ended in succession" in capfd.readouterr().err


def test_errors_and_warnings_come_from_the_workers(tmp_path, ray, capfd, monkeypatch):
    sample = run.draw

    def failing(session, jobs, *rest):
        if any(job.seed == 2 for job in jobs):
            raise FloatingPointError("x")
        warnings.warn(f"from seed {jobs[0].seed}", stacklevel=1)
        return sample(session, jobs, *rest)

    monkeypatch.setattr(run, "draw", failing)
    ray()
    assert draw(tmp_path, "--seeds", "0-3", "--engine", "ray") == 1
    error = capfd.readouterr().err
    assert sorted(pictures(tmp_path)) == [0, 1, 3]
    assert "seed 2 of 'a red circle' is not drawn: FloatingPointError: x" in error
    assert "minsd: warning: from seed 0" in error and "minsd: warning: from seed 3" in error


def test_what_a_cluster_cannot_do_is_one_line(tmp_path, ray, capfd, monkeypatch):
    fake = ray(nodes_at=[(0, 0)])
    assert draw(tmp_path, "--seed", 0, "--engine", "ray") == 2
    assert "the Ray cluster has no node with 1 CPU cores" in capfd.readouterr().err
    fake.init = lambda **options: exec("raise ConnectionError('no answer')")
    assert draw(tmp_path, "--seed", 0, "--engine", "ray") == 2
    assert "cannot be reached: no answer" in capfd.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    assert draw(tmp_path, "--seed", 0, "--engine", "ray") == 2
    assert "pip install 'minsd[ray]'" in capfd.readouterr().err
    assert draw(tmp_path, "--seed", 0, "--engine", "ray", "--objective", "own.py:mine") == 2
    assert "a function of your own" in capfd.readouterr().err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert draw(tmp_path, "--seed", 0, "--engine", "ray") == 2
    assert "without torchrun" in capfd.readouterr().err and not list(tmp_path.iterdir())


def test_errors_of_workers_can_be_sent():
    class Odd(RuntimeError):
        def __init__(self, a, b):
            super().__init__(f"{a} {b}")

    for error in (
        Odd(1, 2),
        UnicodeEncodeError("utf-8", "x", 0, 1, "y"),
        torch.cuda.OutOfMemoryError("z"),
        KeyError(1),
    ):
        sent = pickle.loads(pickle.dumps(cluster._portable(error)))
        assert str(error) in str(sent) and isinstance(sent, (RuntimeError, ValueError))


@pytest.mark.slow
def test_ray_itself(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="needs Ray")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert draw(tmp_path / "ray", "--seeds", "0-5", "--engine", "ray") == 0
    assert draw(tmp_path / "alone", "--seeds", "0-5") == 0
    alone, found = pictures(tmp_path / "alone"), pictures(tmp_path / "ray")
    assert all((alone[seed] - found[seed]).abs().max() <= 2.01 / 255 for seed in range(6))
