"""Draws on a Ray cluster (--engine ray): one worker per GPU, or per group of CPU cores.

A worker is a Ray actor that holds the model. The process of the command line plans the jobs (one
per image), forms the batches, and saves the images, as it does without Ray, so files, rows of
runs.jsonl and --resume are the same. Up to AHEAD batches are queued at each worker. If a worker is
lost (killed, or with its node), its batches are given to another worker. Nodes may join and leave:
the number of workers follows the cluster's GPUs or cores.

The nodes need minsd, and every file of the run (model, adapters, images) under the same path. Only
the process of the command line writes to --out.
"""

import importlib
import os
import re
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from minsd.app import mistake
from minsd.app.jobs import Job
from minsd.app.progress import Show
from minsd.app.requests import Command, Request
from minsd.app.run import Drawing, Finished, Wanted, attempt, batches
from minsd.app.session import Session, open_session
from minsd.graphs import empty_cache
from minsd.noise.drivers import Step

AHEAD = 2  # batches per worker, so that no worker waits while images are saved
CORES = 4  # CPU cores of a worker without a GPU, unless OMP_NUM_THREADS is set
LOSSES = 3  # workers that may be lost with one batch before the batch counts as failed
FAILED_STARTS = 10  # workers that may be lost in succession before any has drawn a batch


class Worker:
    """A Ray actor, a process on a node of the cluster, that holds the model and draws batches."""

    def open(self, command: Command, requests: Sequence[Request]) -> Exception | None:
        """Loads the model, with all files that the command and the requests (the settings of each
        prompt) name. Returns None, or the error if loading fails."""
        try:
            self.session = open_session(command, requests, quiet=True)
        except Exception as error:
            return _portable(error)

    def batch_size(self, height: int, width: int) -> int:
        return self.session.sd.batch_size(height, width)

    def draw(self, part: list[Job]) -> tuple[Finished | Exception, list[str]]:
        """Draws a batch of jobs (one per image). If GPU memory runs out while CUDA graphs take up
        memory, releases the graphs and draws the batch once more.

        Returns (outcome, messages). `outcome` is the drawn batch, or the error if drawing failed.
        `messages` are the texts of the warnings that were issued meanwhile.
        """
        with warnings.catch_warnings(record=True) as caught:
            outcome = attempt(self.session, part, Show())
            graphs = self.session.sd.graphs
            if isinstance(outcome, torch.cuda.OutOfMemoryError) and graphs is not None and graphs.held:
                graphs.release()
                empty_cache()
                outcome = attempt(self.session, part, Show())
        outcome = _portable(outcome) if isinstance(outcome, Exception) else outcome
        return outcome, [str(warning.message) for warning in caught]


def _portable(error: Exception) -> Exception:
    """Converts an error to one that can be sent to another process. Errors of a few plain types are
    returned unchanged. Any other error becomes a ValueError with the same message if it is a
    mistake of the user, otherwise a RuntimeError whose message is the error's type and message."""
    plain = (ValueError, FileNotFoundError, OSError, FloatingPointError, torch.cuda.OutOfMemoryError)
    if type(error) in plain:
        return error
    return ValueError(str(error)) if mistake(error) else RuntimeError(f"{type(error).__name__}: {error}")


@dataclass(eq=False)
class _Actor:
    """What the process of the command line knows of one worker: the worker's Ray handle, whether
    its model is loaded, and its queued batches."""

    handle: Any
    open: bool = False
    parts: deque[Any] = field(default_factory=deque)  # Ray references of queued batches, in order


class Cluster:
    """A connection to a Ray cluster, and its workers (processes on the cluster that hold the
    model)."""

    def __init__(self, command: Command, requests: Sequence[Request]):
        """Connects to the cluster at RAY_ADDRESS, or starts one on this machine. `command` holds
        the settings of the run, and `requests` those of each prompt.

        Raises ValueError if Ray is not installed, if the cluster cannot be reached, or if the
        cluster has no GPU or no node with enough CPU cores for a worker.
        """
        try:
            self.ray: Any = importlib.import_module("ray")
        except ImportError:
            raise ValueError("--engine ray needs Ray: pip install 'minsd[ray]'") from None
        ended = signal.getsignal(signal.SIGTERM)
        try:
            self.ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ValueError(f"the Ray cluster (RAY_ADDRESS) cannot be reached: {error}") from None
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ended)  # Ray's own handler ends the process without a message
        nodes = self._nodes()
        gpus = any(node.get("GPU", 0) >= 1 for node in nodes)
        self.device = (command.device or ("cuda" if gpus else "cpu")).partition(":")[0]
        largest = max((int(node.get("CPU", 0)) for node in nodes), default=0)
        threads = os.environ.get("OMP_NUM_THREADS", "")
        self.cores = int(threads) if re.fullmatch("[1-9][0-9]{0,3}", threads) else min(CORES, largest)
        self.gpus = int(self.device != "cpu")
        if not self._slots():
            missing = "GPU" if self.gpus else f"node with {max(self.cores, 1)} CPU cores"
            raise ValueError(f"the Ray cluster has no {missing}")
        self.command = command
        self.requests = [request for request in requests if request.layout is not None]
        self.actors: list[_Actor] = []
        self.opening: dict[Any, _Actor] = {}
        # Ray references of queued batches -> (worker, batch, workers lost with the batch so far)
        self.flying: dict[Any, tuple[_Actor, list[Job], int]] = {}
        self.lost = 0  # workers lost since a batch was last drawn

    def session(self, quiet: bool) -> Session:
        """Loads the model on this machine's CPU, only to plan the jobs; the workers draw the
        images. Returns a session: the loaded model with the run's settings. `quiet` turns messages
        off."""
        dtype = self.command.dtype or ("float16" if self.device == "cuda" else "float32")
        plain = replace(
            self.command, device="cpu", dtype=dtype, attention="auto", controlnet=None, compile=False
        )
        return replace(open_session(plain, self.requests, quiet), command=self.command)

    def draw(self, drawing: Drawing, wanted: Wanted) -> None:
        """Draws the jobs `wanted` on the workers, and saves the images with `drawing`. Then ends
        the workers and the connection to the cluster."""
        try:
            if wanted:
                self._draw(drawing, wanted)
        finally:
            self.ray.shutdown()  # ends the workers

    def _draw(self, drawing: Drawing, wanted: Wanted) -> None:
        drawing.show.phase("drawing on the cluster", drawing.tally.wanted)
        coming = batches(wanted, self._batch_size)
        again: deque[tuple[list[Job], int]] = deque()  # batches to repeat, with the workers lost so far
        while True:
            self._grow()
            everything = self._fill(coming, again)
            if everything and not self.flying:
                return
            refs = [*self.opening, *self.flying]
            for ref in self._ready(refs):
                if ref in self.opening:
                    self._opened(ref)
                    continue
                actor, part, losses = self.flying.pop(ref)
                began = actor in self.actors and actor.parts[0] == ref
                actor.parts.remove(ref)
                outcome = self._result(ref, actor)
                if outcome is None:
                    losses += began  # a batch that had not begun is not to blame for the loss
                    if losses < LOSSES:
                        again.append((part, losses))
                        continue
                    outcome = RuntimeError(f"its worker ended without a message, {losses} times")
                again.extend((smaller, 0) for smaller in drawing.settle(part, outcome))
                workers = f"{sum(actor.open for actor in self.actors)} workers"
                drawing.show.say(Step(workers, drawing.show.done, drawing.tally.wanted))

    def _fill(self, coming: Iterator[list[Job]], again: deque[tuple[list[Job], int]]) -> bool:
        """Queues batches until every worker that has loaded the model has AHEAD of them, or no
        batch is left. Every worker gets its first batch before any worker gets a second.

        `coming` yields the new batches. `again` holds the batches to repeat, as pairs (batch,
        number of workers lost while they drew it); these come before new ones. Returns True if a
        worker could take another batch but none is left, otherwise False.
        """
        for depth in range(AHEAD):
            for actor in self.actors:
                if not actor.open or len(actor.parts) > depth:
                    continue
                part, losses = again.popleft() if again else (next(coming, None), 0)
                if part is None:
                    return True
                ref = actor.handle.draw.remote(part)
                actor.parts.append(ref)
                self.flying[ref] = actor, part, losses
        return False

    def _result(self, ref: Any, actor: _Actor) -> Finished | Exception | None:
        """Returns what the worker `actor` returned for a batch: the drawn batch, or the error if
        drawing failed. Returns None if the worker is lost. `ref` is the Ray reference of the batch.
        The worker's warnings are issued again in this process."""
        try:
            outcome, messages = self.ray.get(ref)
        except self.ray.exceptions.RayError as error:
            self._drop(actor, error)
            return None
        self.lost = 0
        for message in messages:
            warnings.warn(message, stacklevel=2)
        return outcome

    def _drop(self, actor: _Actor, error: Exception) -> None:
        """Removes a lost worker. `error` is the error by which the loss was noticed. Raises
        RuntimeError if too many workers were lost since a batch was last drawn: more than
        FAILED_STARTS plus the number of remaining workers."""
        if actor in self.actors:
            self.actors.remove(actor)
            self.lost += 1
        if self.lost > FAILED_STARTS + len(self.actors):
            raise RuntimeError(f"{self.lost} workers of the Ray cluster ended in succession: {error}")

    def _ready(self, refs: list[Any]) -> list[Any]:
        """Waits at most one second until a result is available. Returns those of the Ray references
        `refs` whose results are available."""
        if refs:
            return self.ray.wait(refs, timeout=1)[0]
        time.sleep(1)
        return []

    # --- workers ----------------------------------------------------------------------------------

    def _nodes(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self.ray.nodes() if node["Alive"]]

    def _slots(self) -> int:
        """Returns how many workers the cluster has room for now: one per GPU or, without GPUs, one
        per group of `self.cores` CPU cores. Workers that have been started are not subtracted."""
        if self.gpus:
            return sum(int(node.get("GPU", 0)) for node in self._nodes())
        return sum(int(node.get("CPU", 0) // self.cores) for node in self._nodes()) if self.cores else 0

    def _grow(self) -> None:
        """Starts workers until there are as many as the cluster has room for (`_slots`)."""
        for _ in range(self._slots() - len(self.actors)):
            needs = {"num_gpus": 1, "num_cpus": 1} if self.gpus else {"num_cpus": self.cores}
            actor = _Actor(self.ray.remote(**needs)(Worker).remote())
            self.actors.append(actor)
            command = replace(self.command, device=self.device)
            self.opening[actor.handle.open.remote(command, self.requests)] = actor

    def _opened(self, ref: Any) -> None:
        """Handles the end of loading the model in a worker; `ref` is the Ray reference of the
        loading. Marks the worker as ready to draw, or removes it if it is lost. If the model cannot
        be loaded, raises the worker's error: unchanged if it is a mistake of the user, otherwise as
        a RuntimeError."""
        actor = self.opening.pop(ref)
        try:
            error = self.ray.get(ref)
        except self.ray.exceptions.RayError as lost:
            self._drop(actor, lost)
            return
        if error is not None:
            raise error if mistake(error) else RuntimeError(f"a worker cannot load the model: {error}")
        actor.open = True

    def _batch_size(self, height: int, width: int) -> int:
        """Waits until a worker has loaded the model. Returns the batch size that this worker
        computes for images of this height and width (pixels).
        """
        while True:
            self._grow()
            for actor in [actor for actor in self.actors if actor.open]:
                try:
                    return self.ray.get(actor.handle.batch_size.remote(height, width))
                except self.ray.exceptions.RayError as lost:
                    self._drop(actor, lost)
            for ref in self._ready([*self.opening]):
                self._opened(ref)
