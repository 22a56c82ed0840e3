"""CUDA graphs: one evaluation of a network, some 1,500 kernels, launched by a single call.

At batch 1 a GPU finishes a kernel of the UNet before Python has launched the next (expected, not
measured on a GPU). A CUDA graph records the launches of one evaluation and repeats them in a single
call. A graph is bound to memory addresses: a replay reads the inputs and writes the output at the
addresses that they had at the capture. So each graph has input tensors of its own. The tensors of a
call are copied into them, except for tensors that are unchanged since the last call, such as the
keys and values of a prompt. The output is copied to new memory.

Graphs do not change results. Evaluations that record attention, need gradients or run hooks do not
use graphs, with one exception: within a block of `differentiating`, an evaluation that ends after
its attention maps, and the gradient of these maps with respect to the latents, use graphs too
(noise/losses.py).

PyTorch's allocator may not recover from a capture that fails (up to torch 2.11 at least), so that
the next capture or the next release of memory ends in an internal error. So after one failure, and
one warning, there are no graphs for the rest of the process.
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

from minsd.kernels import switches

LIMIT = 8  # the most graphs of one network; capturing one more releases all of them

broken = False  # whether a capture has failed in this process

Pool = Any  # the handle that torch.cuda.graph_pool_handle returns


def tensors_of(value: object) -> list[Tensor]:
    """Returns the tensors in nested dicts, lists and tuples as one list, in the order in which they
    occur."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [y for part in value for y in tensors_of(part)]
    return []


def signature_of(value: Any) -> Hashable:
    """Returns a hashable key for the arguments of a call. Two calls with equal keys can use the
    same CUDA graph. The key consists of the structure of `value` (nested dicts, lists and tuples),
    the shape, dtype and device of each tensor in it, and all other values in it."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    if isinstance(value, dict):
        return "dict", *((key, signature_of(part)) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), *map(signature_of, value)
    return value


def replaced(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Returns a copy of `value`, nested dicts, lists and tuples, with other tensors: the first
    tensor in it is replaced by the first item of `tensors`, the second by the second, and so on."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return {key: replaced(part, tensors) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(replaced(part, tensors) for part in value)
    return value


def own_copy(y: Tensor) -> Tensor:
    """Returns a copy of the tensor y, detached from autograd and in memory of its own.

    The copy has the same strides as y, because code from torch.compile depends on them. If y is
    expanded (has a stride of 0), the copy is contiguous instead.
    """
    if any(stride == 0 and size > 1 for size, stride in zip(y.shape, y.stride())):
        return y.detach().clone()
    return torch.empty_strided(y.shape, y.stride(), dtype=y.dtype, device=y.device).copy_(y.detach())


def cloned(value: Any) -> Any:
    """Returns a copy of `value`, nested lists and tuples of tensors, in which every tensor has
    memory of its own."""
    return replaced(value, iter([y.clone() for y in tensors_of(value)]))


def capture(
    run: Callable[[], Any], pool: Pool, stream: torch.cuda.Stream | None
) -> tuple[Callable[[], None], Any]:
    """Captures one call of `run`, a function without arguments, as a CUDA graph. Returns (replay,
    output): a function that replays the graph, and the output of `run`, whose tensors every replay
    overwrites.

    `pool` is a memory pool for intermediate results. Graphs with the same pool overwrite each
    other's results, so they must run one after the other. `stream` is the stream that
    `capture_stream` returns for the network's device.
    """
    assert stream is not None
    graph = torch.cuda.CUDAGraph()
    # The first two restore device and stream even if the end of a failed capture raises.
    with torch.cuda.device(stream.device), torch.cuda.stream(torch.cuda.current_stream(stream.device)):
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            out = run()
    return graph.replay, out


def warm_up(run: Callable[[], list[Tensor]], x: Tensor) -> None:
    """Prepares a capture: calls `run` once and computes the gradient of its outputs with respect to
    the leaf tensor x once.

    During a capture, no kernel may be compiled and cuBLAS may not be set up in autograd's thread.
    After this call both have happened. Earlier calls of the network cannot be relied on for this,
    because they may have computed no gradients, or those of some outputs only.
    """
    with torch.enable_grad():
        outputs = run()
        torch.autograd.grad(outputs, x, [torch.zeros_like(y) for y in outputs])


def capture_gradient(
    run: Callable[[], list[Tensor]], x: Tensor, pool: Pool, stream: torch.cuda.Stream | None
) -> tuple[Callable[[], None], list[Tensor], Callable[[], None], list[Tensor], Tensor]:
    """Captures two CUDA graphs: one of `run`, a function that computes several outputs from the
    leaf tensor x, and one of its gradient with respect to x (a vector-Jacobian product).

    Returns (replay, outputs, replay_back, given, gradient). `replay` writes to `outputs`.
    `replay_back` reads the gradients of the outputs from `given` and writes the gradient of x to
    `gradient`. Call `replay_back` directly after `replay`, because other graphs with the same
    memory pool may overwrite the intermediate results. `pool` and `stream` are those of `capture`.
    """
    with torch.enable_grad():
        replay, outputs = capture(run, pool, stream)
        given = [torch.empty_like(y) for y in outputs]
        back, gradient = capture(lambda: torch.autograd.grad(outputs, x, given)[0], pool, stream)
    return replay, [y.detach() for y in outputs], back, given, gradient


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Returns the CUDA stream on which all graphs of a device are captured. It is the same one in
    every call, because cuBLAS reserves up to 32 MB for each stream on which it was captured, and
    never frees them."""
    return torch.cuda.Stream(device)


def empty_cache() -> None:
    """Frees unused GPU memory that PyTorch has reserved, so that others can use it. Does nothing if
    there is no GPU, or if a capture has failed in this process, because PyTorch would then end in
    an internal error."""
    if torch.cuda.is_available() and not broken:
        torch.cuda.empty_cache()


def give_up(error: Exception) -> None:
    """Ends the use of CUDA graphs in this process, because a capture failed with `error`: drops all
    graphs, prevents further captures, and warns with the first line of the error message."""
    global broken
    broken = True
    for graphs in list(_living):
        graphs.let_go()
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    warnings.warn(f"the network runs without a CUDA graph: {reason}", stacklevel=4)


@dataclass
class Graph:
    """A CUDA graph of one evaluation of a network. Calling this object with a list of input tensors
    copies them into the graph's own inputs, replays the graph, and returns a copy of the output."""

    inputs: list[Tensor]  # read by every replay
    sources: list[tuple[Tensor, int]]  # the tensor last copied into each input, and its version
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
    """CUDA graphs of one evaluation of a network with several outputs, and of its gradient. The
    gradient is that of the first input, given the gradients of the outputs (a vector-Jacobian
    product)."""

    replay_back: Callable[[], None]
    given: list[Tensor]  # gradients of the outputs, read by every replay back
    gradient: Tensor  # of the first input, written by every replay back

    def back(self, gradients: tuple[Tensor, ...]) -> Tensor:
        for y, new in zip(self.given, gradients, strict=True):
            y.copy_(new)
        self.replay_back()
        return self.gradient.clone()


class _Replayed(torch.autograd.Function):
    """An autograd function that replays a `GradientGraph`. Only its first input, x, gets a
    gradient."""

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
    """Replaces the `forward` of the network `module` by replays of CUDA graphs.

    Each input signature (structure, shapes and dtypes of the inputs) has a graph of its own. It is
    captured when the signature occurs for the second time. The first time, the network runs without
    a graph, because it compiles kernels and chooses algorithms, which must not happen during a
    capture. If GPU memory runs out while the network runs without a graph, all graphs are released
    and the network runs again.

    If `gradients` is True, there are also graphs for attention maps and their gradients, which are
    used within a `differentiating` block.
    """

    def __init__(self, module: nn.Module, gradients: bool = True):
        self.module: Any = module
        self.gradients = gradients
        self.differentiating = False
        self.turn = 0  # replays so far
        self.run: Callable[..., Any] = module.forward
        # The module itself is left out. Its hooks, such as that of `guidance.counted`, do no harm,
        # because nn.Module calls them around `forward`, replayed or not.
        self.parts = dict.fromkeys(part for part in module.modules() if part is not module)
        self.graphs: dict[Hashable, Graph] = {}
        self.seen: set[Hashable] = set()
        self.refused: set[Hashable] = set()
        self.pool: Pool = None
        self.own = 0  # bytes reserved for these graphs, which the rest of the program cannot use
        _living.add(self)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def held(self) -> int:
        """Returns the number of bytes of GPU memory that are reserved for graphs, those of this
        network and of all others on its device. Nothing else can use this memory."""
        return sum(graphs.own for graphs in self._beside())

    def _beside(self) -> list["Graphs"]:
        """Returns the `Graphs` objects of all networks on the same device as this network, its own
        included. The others are those of ControlNets, for example."""
        return [graphs for graphs in _living if graphs.device == self.device]

    def release(self) -> None:
        """Releases the graphs of all networks on the same device as this network, and frees their
        memory. Call this method when other work needs the memory, or when a network has changed."""
        for graphs in self._beside():
            graphs.let_go()
        empty_cache()

    def let_go(self) -> None:
        """Drops the graphs of this network only. PyTorch keeps their memory reserved until
        `empty_cache` is called."""
        if self.graphs and torch.cuda.is_available():
            # A replay may still be running. Before PyTorch unmaps an expandable segment, it waits for
            # the capture's stream only, and the replay may run on another. After a failed capture
            # `synchronize` itself may raise.
            with contextlib.suppress(RuntimeError) if broken else contextlib.nullcontext():
                torch.cuda.synchronize(self.device)
        self.graphs.clear()
        self.seen.clear()
        self.pool = None
        self.own = 0

    def __call__(
        self, x: Tensor, t: int | float | Tensor, context: Any, *rest: Any, record: Any = None, **more: Any
    ) -> Any:
        """Evaluates the network: replays a graph if there is one for this call, and otherwise runs
        the network's own `forward`. Arguments and result are those of `UNet.forward` or
        `ControlNet.forward`."""
        if not torch.is_tensor(t):  # a graph would keep a number as a constant
            t = torch.full((), t, device=x.device, dtype=torch.float32)
        if isinstance(context, dict):  # with a ControlNet it holds the keys and values of both networks
            context = {layer: kv for layer, kv in context.items() if layer in self.parts}
        positional = x, t, context, *rest
        arguments = positional, more
        tensors = tensors_of(arguments)
        # `look`: the call only records attention maps, and these are differentiated. Of all calls
        # with a recorder only such calls have graphs, and only at the default resolution.
        look = record is not None and self.differentiating and record.only and record.wanted is None
        options = more if record is None else {**more, "record": record}
        if (record is not None and not look) or not self._can(tensors, look):
            return self._plainly(*positional, **options)
        address = next(self.module.parameters()).data_ptr()  # changes when the weights are moved
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
        record.cross_layers = [cross.flatten(1, 2)]  # already the mean over all layers
        record.self_layers = [own.flatten(1, 2)]
        return None

    def _can(self, tensors: list[Tensor], look: bool) -> bool:
        """Returns True if a graph may be used for a call whose inputs are `tensors`, with the
        latents x as the first. `look` states whether the call records attention maps to be
        differentiated. If it does, x must require a gradient, and no other input may. If it does
        not, no input may require a gradient."""
        if broken or self._hooked(look):
            return False
        differentiated = [y for y in tensors if y.requires_grad] if torch.is_grad_enabled() else []
        if bool(differentiated) != look or any(y is not tensors[0] for y in differentiated):
            return False
        # Inference tensors have no version, so a change of their contents would go unnoticed.
        if torch.is_inference_mode_enabled() or any(y.is_inference() for y in tensors):
            return False
        return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())

    def _hooked(self, look: bool) -> bool:
        """Returns True if a part of the network has hooks, such as those of an adapter. Hooks are
        Python functions, and a replay would not call them. Backward hooks count only if `look` is
        True, that is, if the call records attention maps to be differentiated."""
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
        """Captures a graph for a call and stores it under `key`, the call's signature. Returns True
        if this succeeded. `arguments` are (positional, keyword) arguments of the call, and
        `tensors` all tensors in them. If a recorder `record` is given, the graph computes attention
        maps and their gradient."""
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
            with switches.in_a_graph():
                self.run(*positional, record=fresh, **more)
            return [fresh.cross, fresh.self]

        try:
            inputs = [own_copy(y) for y in tensors]
            positional, more = replaced(arguments, iter(inputs))
            if record is not None:
                warm_up(maps, inputs[0].requires_grad_())
        except torch.cuda.OutOfMemoryError:  # no capture has begun, so none is broken
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
        except Exception as error:  # also Triton's; an error of the network itself will occur again
            give_up(error)
            return False
        self.own += (torch.cuda.memory_reserved(device) if cuda else 0) - before
        return True

    def _plainly(self, *arguments: Any, **more: Any) -> Any:
        """Runs the network without a graph and returns its output. If GPU memory runs out and there
        are graphs, those of any network on this device, releases them and runs the network once
        more."""
        try:
            return self.run(*arguments, **more)
        except torch.cuda.OutOfMemoryError:
            if not any(graphs.graphs for graphs in self._beside()):
                raise
        self.release()
        return self.run(*arguments, **more)


_living: WeakSet[Graphs] = WeakSet()


def use_graphs(network: nn.Module, on: bool = True, gradients: bool = True) -> Graphs | None:
    """Makes a network use CUDA graphs, or, if `on` is False, makes it run without them again.
    Returns the network's `Graphs` object, or None if `on` is False. If `gradients` is True, there
    are also graphs for attention maps and their gradients, which are used within a
    `differentiating` block."""
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
    """Returns the `Graphs` object of a network, or None if the network does not use CUDA graphs."""
    forward = getattr(network, "forward", None)
    return forward if isinstance(forward, Graphs) else None


@contextlib.contextmanager
def differentiating(network: Any) -> Iterator[None]:
    """Within the `with` block, CUDA graphs are also used to compute attention maps of `network` and
    their gradients with respect to the latents. This concerns evaluations that end after their
    attention maps. The gradient of such an evaluation must be computed before the network runs
    again, and only once. If the network has no graphs, the block runs as it would without them."""
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
