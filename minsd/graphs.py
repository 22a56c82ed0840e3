"""CUDA graphs: a network's evaluation, some 1,500 kernels, launched as one.

At batch 1 a GPU is done with a kernel of the UNet before Python has launched the next. A CUDA graph records the launches of one
evaluation and repeats them in a single call. It is bound to addresses: a replay reads the memory that held the inputs at the
capture and writes where the output was. So each graph has inputs of its own, into which a call's are copied (those that are
not the same tensors as last time: a prompt's keys and values stay where they are), and its output is copied out.

Whoever calls the network need not know: what is recorded, differentiated or watched by hooks runs as ever.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

LIMIT = 8  # graphs at once; one more, and all go


def tensors_of(value) -> list[torch.Tensor]:
    """The tensors in nested dicts, lists and tuples, in their order."""
    if torch.is_tensor(value):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [y for part in parts for y in tensors_of(part)]


def form_of(value):
    """What must be equal for a graph to serve again: structure, shapes, dtypes and whatever is no tensor."""
    if torch.is_tensor(value):
        return value.shape, value.dtype, value.device
    if isinstance(value, dict):
        return "dict", *((key, form_of(part)) for key, part in value.items())
    return (type(value), *map(form_of, value)) if isinstance(value, (list, tuple)) else value


def replaced(value, tensors: Iterator[torch.Tensor]):
    """The same structure around other tensors."""
    if torch.is_tensor(value):
        return next(tensors)
    if isinstance(value, dict):
        return {key: replaced(part, tensors) for key, part in value.items()}
    return (
        type(value)(replaced(part, tensors) for part in value) if isinstance(value, (list, tuple)) else value
    )


def own_copy(y: torch.Tensor) -> torch.Tensor:
    """The same numbers in memory of its own, with the same strides: a compiler made its code for these."""
    if any(
        stride == 0 and size > 1 for size, stride in zip(y.shape, y.stride())
    ):  # expanded: cells share memory
        return y.detach().clone()
    return torch.empty_strided(y.shape, y.stride(), dtype=y.dtype, device=y.device).copy_(y.detach())


def capture(run: Callable[[], torch.Tensor], pool, stream) -> tuple[Callable[[], None], torch.Tensor]:
    """-> (replay, the tensor in which every replay leaves its output). Graphs of one pool share the memory of what lies
    between input and output: they run one after the other, and are captured on one stream of the network's own device."""
    graph = torch.cuda.CUDAGraph()
    # The outer two put device and stream back even where the end of a broken capture raises.
    with torch.cuda.device(stream.device), torch.cuda.stream(torch.cuda.current_stream(stream.device)):
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            out = run()
    return graph.replay, out


@dataclass
class Graph:
    inputs: list[torch.Tensor]  # read by every replay
    sources: list[tuple[torch.Tensor, int]]  # what was copied into each, and its version then
    replay: Callable[[], None]
    output: torch.Tensor

    def __call__(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        for i, (new, (old, version)) in enumerate(zip(tensors, self.sources)):
            if new is not old or new._version != version:
                self.inputs[i].copy_(new)
                self.sources[i] = new, new._version
        self.replay()
        return self.output.clone()


class Graphs:
    """A network's `forward` by CUDA graphs, one for each form of its inputs, captured when that comes the second time.

    The first evaluation of a form compiles kernels and chooses algorithms, which a capture must not do; and a form that does not
    come again is not worth one. Where memory runs out, here or in `forward` itself, all graphs go and the network runs
    without. `held` is how many bytes they keep from the rest of the program; `release` gives these back.
    """

    def __init__(self, module: nn.Module):
        self.module, self.run = module, module.forward
        self.parts = [part for part in module.modules() if part is not module]
        self.graphs: dict[tuple, Graph] = {}
        self.seen, self.refused = set(), set()
        self.pool, self.stream, self.held = None, None, 0

    def release(self) -> None:
        """Let go of every graph and of the memory in it: before other work that needs it, and when the network has changed."""
        self.graphs.clear()
        self.seen.clear()
        self.pool, self.stream, self.held = None, None, 0
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def __call__(self, x, t, context, *, record=None, **more):
        """As `UNet.forward`."""
        if not torch.is_tensor(t):  # a number would be compiled in
            t = torch.full((), t, device=x.device, dtype=torch.float32)
        arguments = (x, t, context, more)
        tensors = tensors_of(arguments)
        if record is not None or not self._can(tensors):
            return self._plainly(x, t, context, record=record, **more)
        key = (
            form_of(arguments),
            next(self.module.parameters()).data_ptr(),
            torch.is_grad_enabled(),
        )  # moved weights have other addresses
        if key not in self.graphs and (key in self.refused or key not in self.seen):
            self.seen.add(key)
            return self._plainly(*arguments[:3], **more)
        if key not in self.graphs and not self._captured(key, arguments, tensors):
            return self._plainly(*arguments[:3], **more)
        return self.graphs[key](tensors)

    def _can(self, tensors) -> bool:
        if torch.is_grad_enabled() and any(y.requires_grad for y in tensors):
            return False
        if torch.is_inference_mode_enabled() or any(
            y.is_inference() for y in tensors
        ):  # these have no version to compare
            return False
        if any(
            part._forward_hooks or part._forward_pre_hooks for part in self.parts
        ):  # an adapter's, or someone who watches
            return False
        return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())

    def _captured(self, key, arguments, tensors) -> bool:
        """Whether there now is a graph for `key`."""
        if len(self.graphs) >= LIMIT:
            self.release()
        x0 = tensors[0]
        cuda = x0.is_cuda
        if cuda:
            torch.cuda.empty_cache()
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            self.stream = self.stream or torch.cuda.Stream(x0.device)
        before = torch.cuda.memory_reserved(x0.device) if cuda else 0
        try:
            inputs = [own_copy(y) for y in tensors]
            x, t, context, more = replaced(arguments, iter(inputs))
            with torch.no_grad():
                replay, output = capture(lambda: self.run(x, t, context, **more), self.pool, self.stream)
        except (
            RuntimeError
        ) as error:  # of memory, mostly: the network alone needs less than beside its graphs
            reason = None if isinstance(error, torch.cuda.OutOfMemoryError) else str(error).splitlines()[0]
        else:
            self.graphs[key] = Graph(inputs, [(y, y._version) for y in tensors], replay, output)
            self.held += (torch.cuda.memory_reserved(x0.device) if cuda else 0) - before
            return True
        self.release()
        self.refused.add(key)
        if reason is not None:
            warnings.warn(f"the network runs without a CUDA graph: {reason}", stacklevel=3)
        return False

    def _plainly(self, *arguments, **more):
        try:
            return self.run(*arguments, **more)
        except torch.cuda.OutOfMemoryError:
            if not self.graphs:
                raise
        self.release()
        return self.run(*arguments, **more)
