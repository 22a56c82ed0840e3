"""CUDA graphs: one evaluation of a network, some 1,500 kernels, launched as one.

At batch 1 a GPU finishes a kernel of the UNet before Python has launched the next (expected, not
measured on a GPU). A CUDA graph records the launches of one evaluation and repeats them in a single
call. It is bound to memory addresses: a replay reads its inputs where they were at the capture and
writes its output where it was then. So each graph has inputs of its own. A call's tensors are
copied into them, except those that are unchanged since the last call, such as a prompt's keys and
values, and the output is copied out.

The caller notices nothing: evaluations that record attention, need gradients or run hooks bypass
the graphs. One kind that does both has graphs of its own: within `differentiating`, an evaluation
to its attention maps, and the maps' gradient in the latents (noise/losses.py).

A capture that fails may leave PyTorch's allocator in the middle of it (to torch 2.11 at least): to
capture again or to give memory back then ends in an internal error. So after one failure, and one
warning, there are no graphs for the rest of the process.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as nn_module

LIMIT = 8  # most graphs of a network; capturing one more releases all of them

broken = False  # whether a capture has failed in this process

Pool = Any  # the handle that torch.cuda.graph_pool_handle returns


def tensors_of(value: object) -> list[Tensor]:
    """The tensors in nested dicts, lists and tuples, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [y for part in value for y in tensors_of(part)]
    return []


def signature_of(value: Any) -> Hashable:
    """Equal for values that one graph can serve: structure, shapes, dtypes, devices, constants."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    if isinstance(value, dict):
        return "dict", *((key, signature_of(part)) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), *map(signature_of, value)
    return value


def replaced(value: Any, tensors: Iterator[Tensor]) -> Any:
    """A copy of nested dicts, lists and tuples that holds the next of `tensors` for each tensor."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return {key: replaced(part, tensors) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(replaced(part, tensors) for part in value)
    return value


def own_copy(y: Tensor) -> Tensor:
    """A detached copy of y, of any shape, in memory of its own.

    It has the strides of y, since torch.compile generates code for these, unless y is expanded
    (a stride of 0): then several elements share memory, and the copy is dense.
    """
    if any(stride == 0 and size > 1 for size, stride in zip(y.shape, y.stride())):
        return y.detach().clone()
    return torch.empty_strided(y.shape, y.stride(), dtype=y.dtype, device=y.device).copy_(y.detach())


def cloned(value: Any) -> Any:
    """A copy of nested lists and tuples of tensors, in memory of its own."""
    return replaced(value, iter([y.clone() for y in tensors_of(value)]))


def capture(
    run: Callable[[], Any], pool: Pool, stream: torch.cuda.Stream | None
) -> tuple[Callable[[], None], Any]:
    """Capture `run` as a CUDA graph; return `replay` and the output that replays write to.

    Graphs of one pool share the memory of their intermediate results, so they must run one after
    the other. They are captured on one `stream`, of the network's own device.
    """
    assert stream is not None
    graph = torch.cuda.CUDAGraph()
    # The outer two restore device and stream even if the end of a failed capture raises.
    with torch.cuda.device(stream.device), torch.cuda.stream(torch.cuda.current_stream(stream.device)):
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            out = run()
    return graph.replay, out


def warm_up(run: Callable[[], list[Tensor]], x: Tensor) -> None:
    """Compute the gradient of `run` in the leaf x through every output, once.

    A capture must not compile kernels, nor set up cuBLAS in autograd's thread. Earlier evaluations
    may have had no gradient, where the losses were within their limits, or one through some outputs.
    """
    with torch.enable_grad():
        outputs = run()
        torch.autograd.grad(outputs, x, [torch.zeros_like(y) for y in outputs])


def capture_gradient(
    run: Callable[[], list[Tensor]], x: Tensor, pool: Pool, stream: torch.cuda.Stream | None
) -> tuple[Callable[[], None], list[Tensor], Callable[[], None], list[Tensor], Tensor]:
    """Capture `run`, a function of the leaf x, and its vector-Jacobian product in x.

    Returns a replay and the outputs that it writes to, and a replay back, the gradients of the
    outputs that it reads, and the gradient of x that it writes to. The second must directly follow
    the first: other graphs of the pool may use the memory of its activations.
    """
    with torch.enable_grad():
        replay, outputs = capture(run, pool, stream)
        given = [torch.empty_like(y) for y in outputs]
        back, gradient = capture(lambda: torch.autograd.grad(outputs, x, given)[0], pool, stream)
    return replay, [y.detach() for y in outputs], back, given, gradient


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures on a device. cuBLAS keeps up to 32 MB for each stream that it was
    captured on, for good: a new stream for each set of graphs would add up."""
    return torch.cuda.Stream(device)


def empty_cache() -> None:
    """Give memory that PyTorch does not use back to the device, unless a failed capture forbids it."""
    if torch.cuda.is_available() and not broken:
        torch.cuda.empty_cache()


def give_up(error: Exception) -> None:
    """After a failed capture: drop all graphs of the process, and capture none again."""
    global broken
    broken = True
    for graphs in list(_living):
        graphs.let_go()
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    warnings.warn(f"the network runs without a CUDA graph: {reason}", stacklevel=4)


@dataclass
class Graph:
    """One captured evaluation. Calling it with a call's tensors returns a new output."""

    inputs: list[Tensor]  # read by every replay
    sources: list[tuple[Tensor, int]]  # the tensor last copied into each, and its version then
    replay: Callable[[], None]
    output: Any  # a tensor, or lists and tuples of them; written by every replay

    def __call__(self, tensors: list[Tensor]) -> Any:
        for i, (new, (old, version)) in enumerate(zip(tensors, self.sources)):
            if new is not old or new._version != version:
                self.inputs[i].copy_(new)
                self.sources[i] = new, new._version
        self.replay()
        return cloned(self.output)


@dataclass
class GradientGraph(Graph):
    """One captured evaluation of several outputs, and its vector-Jacobian product in the first
    input."""

    replay_back: Callable[[], None]
    given: list[Tensor]  # gradients of the outputs, read by every replay back
    gradient: Tensor  # of the first input, written by every replay back

    def back(self, gradients: tuple[Tensor, ...]) -> Tensor:
        for y, new in zip(self.given, gradients, strict=True):
            y.copy_(new)
        self.replay_back()
        return self.gradient.clone()


class _Replayed(torch.autograd.Function):
    """A `GradientGraph` as a differentiable function of its first input, x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, graphs: "Graphs", graph: GradientGraph, tensors: list[Tensor]) -> Any:
        out = graph(tensors)
        ctx.graphs, ctx.graph, ctx.turn = graphs, graph, graphs.turn
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        if ctx.graphs.turn != ctx.turn:
            raise RuntimeError("another evaluation of the network came before this one's gradient")
        ctx.graphs.turn += 1  # its activations are gone now
        return ctx.graph.back(gradients), None, None, None


class Graphs:
    """A network's `forward`, replayed from CUDA graphs.

    There is one graph per input signature (structure, shapes, dtypes), captured at the signature's
    second occurrence: the first evaluation compiles kernels and chooses algorithms, which a capture
    must not do, and a signature that does not recur is not worth a graph. If memory runs out in
    `forward` itself, all graphs are released and the network runs without.

    `gradients`: whether there are graphs for `differentiating` too.
    """

    def __init__(self, module: nn.Module, gradients: bool = True):
        self.module: Any = module
        self.gradients = gradients
        self.differentiating = False
        self.turn = 0  # replays so far
        self.run: Callable[..., Any] = module.forward
        # Without the module itself, whose hooks (`guidance.counted` has one there in every run) do
        # no harm: nn.Module calls them around `forward`, replayed or not.
        self.parts = dict.fromkeys(part for part in module.modules() if part is not module)
        self.graphs: dict[Hashable, Graph] = {}
        self.seen: set[Hashable] = set()
        self.refused: set[Hashable] = set()
        self.pool: Pool = None
        self.own = 0  # bytes of memory that these graphs withhold from the rest of the program
        _living.add(self)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def held(self) -> int:
        """Bytes that the graphs of all networks on this device withhold from the rest."""
        return sum(graphs.own for graphs in self._beside())

    def _beside(self) -> list["Graphs"]:
        """These graphs, and those of other networks on the same device, such as a ControlNet."""
        return [graphs for graphs in _living if graphs.device == self.device]

    def release(self) -> None:
        """Release every graph on the device, if other work needs the memory, or after a network has
        changed."""
        for graphs in self._beside():
            graphs.let_go()
        empty_cache()

    def let_go(self) -> None:
        """Drop this network's graphs, without giving their memory back to the device."""
        if self.graphs and torch.cuda.is_available():
            # A replay may still run. Memory in expandable segments waits for the stream of the
            # capture only, and would be taken away under a replay on another. After a failed
            # capture waiting itself may be refused.
            with contextlib.suppress(RuntimeError) if broken else contextlib.nullcontext():
                torch.cuda.synchronize(self.device)
        self.graphs.clear()
        self.seen.clear()
        self.pool = None
        self.own = 0

    def __call__(
        self, x: Tensor, t: int | float | Tensor, context: Any, *rest: Any, record: Any = None, **more: Any
    ) -> Any:
        """As `UNet.forward` or `ControlNet.forward`."""
        if not torch.is_tensor(t):  # a graph would keep a number as a constant
            t = torch.full((), t, device=x.device, dtype=torch.float32)
        if isinstance(context, dict):  # beside a ControlNet it has the keys and values of both networks
            context = {layer: kv for layer, kv in context.items() if layer in self.parts}
        positional = x, t, context, *rest
        arguments = positional, more
        tensors = tensors_of(arguments)
        # A recorder of another resolution, or of a whole evaluation, is for maps to look at.
        look = record is not None and self.differentiating and record.only and record.wanted is None
        options = more if record is None else {**more, "record": record}
        if (record is not None and not look) or not self._can(tensors, look):
            return self._plainly(*positional, **options)
        address = next(self.module.parameters()).data_ptr()  # differs if the weights were moved
        key = look, signature_of(arguments), address, torch.is_grad_enabled()
        if key not in self.graphs:
            due = key in self.seen and key not in self.refused
            self.seen.add(key)
            if not due or not self._captured(key, arguments, tensors, record):
                return self._plainly(*positional, **options)
        self.turn += 1
        graph = self.graphs[key]
        if not isinstance(graph, GradientGraph):
            return graph(tensors)
        assert record is not None  # only such calls have these graphs
        cross, own = _Replayed.apply(x, self, graph, tensors)
        record.begin(self.module.grids((x.shape[-2], x.shape[-1])), self.module.attention_blocks)
        record.cross_layers = [cross.flatten(1, 2)]  # the mean of all layers: the mean of one is itself
        record.self_layers = [own.flatten(1, 2)]
        return None

    def _can(self, tensors: list[Tensor], look: bool) -> bool:
        """Whether these inputs, x first, may be answered from a graph: without a gradient, or in a
        `look` with one in x alone."""
        if broken or self._hooked(look):
            return False
        differentiated = [y for y in tensors if y.requires_grad] if torch.is_grad_enabled() else []
        if bool(differentiated) != look or any(y is not tensors[0] for y in differentiated):
            return False
        # Inference tensors have no version, by which a change would be noticed.
        if torch.is_inference_mode_enabled() or any(y.is_inference() for y in tensors):
            return False
        return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())

    def _hooked(self, look: bool) -> bool:
        """Whether an adapter's or an observer's hooks watch a part: Python that a replay would skip."""
        if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
            return True
        if look and (nn_module._global_backward_hooks or nn_module._global_backward_pre_hooks):
            return True
        for part in self.parts:
            if part._forward_hooks or part._forward_pre_hooks:
                return True
            if look and (part._backward_hooks or part._backward_pre_hooks):
                return True
        return False

    def _captured(
        self, key: Hashable, arguments: tuple[Any, ...], tensors: list[Tensor], record: Any
    ) -> bool:
        """Capture a graph for `key`; whether there now is one."""
        if len(self.graphs) >= LIMIT:
            self.let_go()
        device = tensors[0].device
        cuda = tensors[0].is_cuda
        stream = None
        if cuda:
            torch.cuda.empty_cache()
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            stream = capture_stream(device)
        before = torch.cuda.memory_reserved(device) if cuda else 0

        def maps() -> list[Tensor]:
            fresh = type(record)(only=True)
            self.run(*positional, record=fresh, **more)
            return [fresh.cross, fresh.self]

        try:
            inputs = [own_copy(y) for y in tensors]
            positional, more = replaced(arguments, iter(inputs))
            if record is not None:
                warm_up(maps, inputs[0].requires_grad_())
        except torch.cuda.OutOfMemoryError:  # no capture has begun that this could break
            self.release()
            self.refused.add(key)
            return False
        sources = [(y, y._version) for y in tensors]
        try:
            if record is None:
                with torch.no_grad():
                    parts = capture(lambda: self.run(*positional, **more), self.pool, stream)
                self.graphs[key] = Graph(inputs, sources, *parts)
            else:
                parts = capture_gradient(maps, inputs[0], self.pool, stream)
                self.graphs[key] = GradientGraph(inputs, sources, *parts)
        except Exception as error:  # Triton's are no RuntimeErrors; the network's own will come again
            give_up(error)
            return False
        self.own += (torch.cuda.memory_reserved(device) if cuda else 0) - before
        return True

    def _plainly(self, *arguments: Any, **more: Any) -> Any:
        """Run the network itself; out of memory, release the graphs and try once more."""
        try:
            return self.run(*arguments, **more)
        except torch.cuda.OutOfMemoryError:
            if not any(graphs.graphs for graphs in self._beside()):
                raise
        self.release()
        return self.run(*arguments, **more)


_living: WeakSet[Graphs] = WeakSet()


def use_graphs(network: nn.Module, on: bool = True, gradients: bool = True) -> Graphs | None:
    """Replay a network's evaluations from CUDA graphs, or stop doing so. Returns its graphs."""
    graphs = graphs_of(network)
    if graphs is not None:
        graphs.release()
        network.forward = graphs.run
    if not on:
        return None
    graphs = Graphs(network, gradients)
    network.forward = graphs
    return graphs


def graphs_of(network: Any) -> Graphs | None:
    """The graphs of a network, if it has any."""
    forward = getattr(network, "forward", None)
    return forward if isinstance(forward, Graphs) else None


@contextlib.contextmanager
def differentiating(network: Any) -> Iterator[None]:
    """Within the block, evaluations to attention maps that are differentiated in the latents are
    replayed as well, where the network has graphs. Each one's gradient must be taken, once, before
    the network runs again."""
    graphs = graphs_of(network)
    if graphs is None or not graphs.gradients:
        yield
        return
    before = graphs.differentiating
    graphs.differentiating = True
    try:
        yield
    finally:
        graphs.differentiating = before
