"""CUDA graphs of a network: a stand-in for the capture on a CPU, real graphs if there is a GPU.

The stand-in keeps what a CUDA graph keeps: a replay runs what was captured on the captured tensors
themselves and leaves its output where the capture's was. Inputs that are not copied in, or an
output that is not copied out, give wrong numbers.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch

import minsd
from minsd import graphs, guidance
from minsd import unet as unet_file
from minsd.app import run as running
from minsd.attention import AttentionRecorder
from minsd.config import UNetConfig
from minsd.controlnet import Control, Controlled, ControlNet
from minsd.graphs import Graphs
from minsd.kernels import switches
from minsd.noise import initno, losses
from minsd.noise.initial import noise
from minsd.noise.look import Lift, ask
from minsd.unet import UNet
from minsd.weights import controlnet

CONFIG = UNetConfig(
    block_out_channels=(16, 32),
    layers_per_block=1,
    cross_attention=(True, False),
    num_heads=(2, 2),
    context_dim=8,
    norm_groups=4,
    sample_size=8,
)


class Recorded:
    """What `graphs.capture` does, without a GPU."""

    captures, replays, fail = 0, 0, None

    def __call__(self, run, pool, stream):
        self.captures += 1
        if self.fail is not None:
            raise self.fail
        output = run()

        def replay():
            self.replays += 1
            for y, new in zip(graphs.tensors_of(output), graphs.tensors_of(run()), strict=True):
                y.copy_(new)

        return replay, output


@pytest.fixture
def fake(monkeypatch):
    fake = Recorded()
    monkeypatch.setattr(graphs, "capture", fake)
    monkeypatch.setattr(graphs, "broken", False)
    return fake


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return UNet(CONFIG).requires_grad_(False)


def inputs(batch=2, size=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, size, size, generator=g), torch.randn(batch, 77, 8, generator=g)


def close(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_every_call_is_answered_from_its_own_inputs(unet, fake):
    plain, run = unet.forward, Graphs(unet)
    kept = []
    for i, t in enumerate((999, 500, 250.5, torch.tensor(3), torch.tensor([7, 900]))):
        x, context = inputs(seed=i)
        kept.append((run(x, t, context), plain(x, t, context)))
    assert all(close(a, b) for a, b in kept)  # nor were outputs of earlier calls overwritten
    # 999 runs the network, 500 and 250.5 a graph; the other two have signatures of their own.
    assert (fake.captures, fake.replays) == (1, 2)


def test_what_did_not_change_is_not_copied_and_what_changed_in_place_is(unet, fake):
    plain, run = unet.forward, Graphs(unet)
    x, context = inputs()
    text_kv = unet.text_kv(context)
    run(x, 900, text_kv)
    run(x, 800, text_kv)
    (graph,) = run.graphs.values()
    versions = [y._version for y in graph.inputs]
    assert close(run(x, 700, text_kv), plain(x, 700, text_kv))
    copied = [y._version - v for y, v in zip(graph.inputs, versions)]
    assert copied == [0, 1] + [0] * 2 * len(text_kv)  # only t
    x.mul_(0.5)
    next(iter(text_kv.values()))[0].mul_(3)
    assert close(run(x, 700, text_kv), plain(x, 700, text_kv))
    other = unet.text_kv(inputs(seed=5)[1])
    assert close(run(x, 700, other), plain(x, 700, other)) and fake.captures == 1


def test_one_graph_per_signature(unet, fake, monkeypatch):
    monkeypatch.setattr(graphs, "LIMIT", 3)
    plain, run = unet.forward, Graphs(unet)
    x, context = inputs()
    region = {grid: torch.zeros(2, grid[0] * grid[1], dtype=torch.long) for grid in unet.grids((8, 8))}
    skips = [torch.ones(2, c, n, n) for c, n in ((16, 8), (16, 8), (16, 4), (32, 4))]
    control = skips, torch.ones(2, 32, 4, 4)
    forms = [
        ((x, 9, context), {}),
        ((x[:1], 9, context[:1]), {}),
        ((x, 9, context), {"control": control}),
        ((x, 9, context[:, None].expand(-1, 2, -1, -1)), {"region": region}),
    ]
    for round_ in range(3):
        for positional, more in forms[:3]:
            assert close(run(*positional, **more), plain(*positional, **more))
        assert fake.captures == (3 if round_ else 0)
    for _ in range(2):
        assert close(run(*forms[3][0], **forms[3][1]), plain(*forms[3][0], **forms[3][1]))
    assert fake.captures == 4 and len(run.graphs) == 1  # the fourth released the others
    other = {grid: cells + 1 for grid, cells in region.items()}
    context = torch.stack([context, context.flip(0)], dim=1)  # (B, R, 77, D)
    for pair in ((region, other), (region, other), (other, region)):
        assert close(run(x, 9, context, region=pair), plain(x, 9, context, region=pair))
    assert fake.captures == 5  # one for pairs of regions
    assert not close(run(x, 9, context, region=(region, other)), run(x, 9, context, region=(other, region)))
    unet.to(torch.float64).to(torch.float32)  # weights at other addresses
    run(*forms[3][0], **forms[3][1])
    assert fake.captures == 5


def test_what_needs_the_network_itself_gets_it(unet, fake):
    run = Graphs(unet)
    x, context = inputs()
    for _ in range(3):
        leaf = x.clone().requires_grad_()
        assert torch.autograd.grad(run(leaf, 9, context).sum(), leaf)[0].abs().sum() > 0
        record = AttentionRecorder((8, 8))
        run(x, 9, context, record=record)
        assert len(record.cross_layers) == 3
        with torch.no_grad():
            hook = unet.mid_block.register_forward_hook(lambda *args: None)
            run(x, 9, context)
            hook.remove()
    assert fake.captures == 0
    with torch.no_grad():
        run(leaf, 9, context)
        assert run(leaf, 9, context).requires_grad is False
    assert fake.captures == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("full"),
        RuntimeError("not permitted when stream is capturing\nmore"),
        KeyError(),  # as Triton's: no RuntimeError
    ],
)
def test_after_a_failed_capture_there_are_no_graphs(unet, fake, error, recwarn, monkeypatch):
    """PyTorch's allocator may be left in the middle of it: to give memory back is an internal error."""
    other, plain, run = Graphs(UNet(CONFIG).requires_grad_(False)), unet.forward, Graphs(unet)
    x, context = inputs()
    other(x, 9, context)
    other(x, 9, context)
    assert other.graphs
    fake.fail = error
    unusable = "captures_underway.empty() INTERNAL ASSERT FAILED"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name in ("empty_cache", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: (_ for _ in ()).throw(RuntimeError(unusable)))
    for _ in range(4):
        assert close(run(x, 9, context), plain(x, 9, context))
        other(x, 9, context)
    run.release()
    job = SimpleNamespace(sampling=SimpleNamespace(width=128, height=128))
    assert running._smaller(SimpleNamespace(graphs=run), [job, job]) == [[job], [job]]
    big = inputs(4)
    for _ in range(3):
        run(big[0], 9, big[1])
        Graphs(unet)(x, 9, context)
    assert fake.captures == 2 and fake.replays == 2 and not run.graphs and not other.graphs
    reason = next(iter(str(error).splitlines()), "KeyError")
    assert [str(w.message) for w in recwarn] == [f"the network runs without a CUDA graph: {reason}"]


def test_out_of_memory_before_a_capture_breaks_nothing(unet, fake, monkeypatch, recwarn):
    plain, run = unet.forward, Graphs(unet)
    x, context = inputs()

    def full(y):
        raise torch.cuda.OutOfMemoryError("full")

    monkeypatch.setattr(graphs, "own_copy", full)
    for _ in range(3):
        assert close(run(x, 9, context), plain(x, 9, context))
    monkeypatch.undo()
    monkeypatch.setattr(graphs, "capture", fake)
    small = x[:1], 9, context[:1]
    for _ in range(3):
        assert close(run(*small), plain(*small))
    assert fake.captures == 1 and not graphs.broken and not recwarn.list


def test_release_waits_for_replays_and_keeps_the_stream(unet, fake, monkeypatch):
    """Graphs of another network on the device go too: their memory is wanted."""
    both, happened = (Graphs(unet), Graphs(UNet(CONFIG).requires_grad_(False))), []
    x, context = inputs()
    for run in both:
        run(x, 9, context)
        run(x, 9, context)
        run.own = 3
    assert both[0].held == 6
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    left = lambda *_: sum(len(run.graphs) for run in both)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: happened.append(("waited", left())))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: happened.append(("given back", left())))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    graphs.capture_stream.cache_clear()
    stream = graphs.capture_stream(torch.device("cuda", 0))
    both[0].release()
    assert happened == [("waited", 2), ("waited", 1), ("given back", 0)] and both[1].held == 0
    assert graphs.capture_stream(torch.device("cuda", 0)) is stream
    graphs.capture_stream.cache_clear()


def test_hooks_of_parts_bypass_graphs_and_those_of_the_network_see_every_call(unet, fake):
    unet.forward = Graphs(unet)
    x, context = inputs()
    calls = []
    unet.register_forward_hook(lambda module, given, out: calls.append(out.shape))
    with guidance.counted(unet) as rows:  # a pre-hook of the network itself
        for _ in range(3):
            unet(x, 9, context)
    assert rows == [2] * 3 and len(calls) == 3 and (fake.captures, fake.replays) == (1, 2)
    part = unet.mid_block.resnets[0].conv1
    seen = []
    for register in (
        part.register_forward_hook,
        part.register_forward_pre_hook,
        torch.nn.modules.module.register_module_forward_hook,
        torch.nn.modules.module.register_module_forward_pre_hook,
    ):
        seen.clear()
        handle = register(lambda module, *rest: seen.append(module))
        unet(x, 9, context)
        handle.remove()
        assert part in seen and fake.replays == 2
    unet(x, 9, context)
    assert fake.replays == 3


def test_graphs_are_released_before_the_network_runs_out_of_memory(unet, fake):
    """A larger batch finds the memory taken by graphs: they are released and it runs. With no graphs
    left to release, it is out of memory."""
    plain, run = unet.forward, None

    def tight(x, *rest, **more):
        if len(x) > 2 and run.graphs or len(x) > 4:
            raise torch.cuda.OutOfMemoryError("full")
        return plain(x, *rest, **more)

    unet.forward = tight
    run = Graphs(unet)
    x, context = inputs()
    run(x, 9, context)
    run(x, 9, context)
    assert len(run.graphs) == 1
    large = inputs(4)
    assert close(run(large[0], 9, large[1]), plain(large[0], 9, large[1])) and not run.graphs
    with pytest.raises(torch.cuda.OutOfMemoryError):
        larger = inputs(5)
        run(larger[0], 9, larger[1])


class Split:
    """What `graphs.capture_gradient` does, without a GPU: maps, then their vector-Jacobian product."""

    captures, replays, backs, fail = 0, 0, 0, None

    def __call__(self, run, x, pool, stream):
        self.captures += 1
        if self.fail is not None:
            raise self.fail
        outputs, maps = [y.detach().clone() for y in run()], []
        given, gradient = [torch.empty_like(y) for y in outputs], torch.empty_like(x)

        def replay():
            self.replays += 1
            with torch.enable_grad():
                maps[:] = run()
            for y, new in zip(outputs, maps, strict=True):
                y.copy_(new)

        def back():
            self.backs += 1
            gradient.copy_(torch.autograd.grad(maps, x, given)[0])

        return replay, outputs, back, given, gradient


@pytest.fixture
def split(monkeypatch, fake):
    split = Split()
    monkeypatch.setattr(graphs, "capture_gradient", split)
    return split


@pytest.fixture
def graphed(shapes):
    """The embedded model with graphs, for one test."""
    shapes.use_graphs()
    yield shapes
    shapes.use_graphs(False)


PROMPT = "a red circle and a blue square"


def looks(sd, seed, t, whole=True, rows=1):
    """The values and the gradient of InitNO's losses, or of the response alone."""

    def objective(look):
        conflict = losses.self_conflict(look.claims)
        if not whole:
            return losses.cross_response(look.maps)
        cross = losses.cross_response(look.maps)
        return cross + conflict + losses.clean_background(look.maps), {"cross": cross, "self": conflict}

    x = noise(range(seed, seed + rows), (4, 16, 16))
    lift = Lift(sd, ask(sd, [PROMPT] * rows, range(rows)), objective)
    told, gradient = lift.slope(x, torch.arange(rows), t)
    return torch.stack(list(told.values()), dim=1), gradient


@pytest.mark.parametrize("whole", [True, False], ids=["both maps", "cross-attention alone"])
def test_a_look_and_its_gradient_are_those_without_graphs(shapes, split, whole):
    steps = [(0, 981, 1), (1, 961, 1), (2, 500.5, 1), (3, 981, 2), (4, 20, 2), (5, 20, 2), (6, 1, 1)]
    expected = [looks(shapes, seed, t, whole, rows) for seed, t, rows in steps]
    shapes.use_graphs()
    try:
        with guidance.counted(shapes.unet) as rows:
            found = [looks(shapes, seed, t, whole, rows) for seed, t, rows in steps]
        assert rows == [n for *_, n in steps]
        assert (split.captures, split.replays, split.backs) == (2, 5, 5)
        for ours, theirs in zip(found, expected):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs)) and ours[1].abs().max() > 0
        shapes.graphs.release()
        assert not shapes.graphs.graphs
        shapes.use_graphs(gradients=False)
        for _ in range(3):
            looks(shapes, 0, 981)
        assert split.captures == 2 and not shapes.graphs.graphs
    finally:
        shapes.use_graphs(False)


def test_initno_optimises_the_same_noise_with_graphs(shapes, split):
    how = {"rounds": 1, "round_steps": 4, "last_steps": 2, "conflict_limit": 0.0}
    expected = initno.optimize(shapes, PROMPT, None, 5, **how)
    shapes.use_graphs()
    try:
        result = initno.optimize(shapes, PROMPT, None, 5, **how)
    finally:
        shapes.use_graphs(False)
    assert torch.equal(result.noise, expected.noise) and result.losses == expected.losses
    assert split.captures == 1 and split.backs == result.steps - 1 > 3


def test_kernels_of_a_captured_look_are_chosen_for_a_graph(graphed, split, monkeypatch):
    """From the warm-up on, which must compile what the capture will launch."""
    least = []
    norm = unet_file.group_norm

    def noted(*arguments, **more):
        least.append(switches.current.norm_gradient_from)
        return norm(*arguments, **more)

    monkeypatch.setattr(unet_file, "group_norm", noted)
    looks(graphed, 0, 981)
    default = switches.Switches().norm_gradient_from
    assert set(least) == {default} and default > 0
    eager = len(least)
    looks(graphed, 1, 981)
    assert least[eager:] == [0] * (3 * eager)  # warmed up, captured, replayed by the stand-in
    assert switches.current.norm_gradient_from == default
    with switches.use(norm_gradient_from=None), switches.in_a_graph():
        assert switches.current.norm_gradient_from is None


@pytest.mark.parametrize("found", ["nothing to do", "the response alone"])
def test_before_a_capture_every_gradient_has_been_computed(graphed, split, monkeypatch, found):
    """A capture must not compile kernels, and the losses so far may have needed none of the gradient,
    or that of one kind of map."""
    computed, grad = [], torch.autograd.grad

    def noted(outputs, *rest, **more):
        computed.append(len(outputs) if isinstance(outputs, list) else 0)
        return grad(outputs, *rest, **more)

    def captured(*arguments):
        assert computed[-1] == 2
        return split(*arguments)

    monkeypatch.setattr(torch.autograd, "grad", noted)
    monkeypatch.setattr(graphs, "capture_gradient", captured)

    limits = {"loss": math.inf} if found == "nothing to do" else None
    lift = Lift(graphed, ask(graphed, [PROMPT], [0]), lambda look: losses.cross_response(look.maps))
    for seed in range(3):
        lift.slope(noise([seed], (4, 16, 16)), torch.arange(1), 981, limits=limits)
    assert split.captures == 1 and split.replays == 2 and not graphs.broken


def test_out_of_memory_while_warming_up_breaks_nothing(graphed, split, monkeypatch, recwarn):
    def full(run, x):
        raise torch.cuda.OutOfMemoryError("full")

    with monkeypatch.context() as patched:
        patched.setattr(graphs, "warm_up", full)
        for seed in range(3):
            looks(graphed, seed, 9)
    assert split.captures == 0 and not graphs.broken and not recwarn.list
    for seed in range(3):
        looks(graphed, seed, 9, rows=2)
    assert split.captures == 1


def test_looks_that_need_the_network_itself_get_it(graphed, split):
    unet, context = graphed.unet, graphed.encode_prompt(PROMPT)
    x = noise([0], (4, 16, 16)).requires_grad_()
    for _ in range(3):  # outside of `differentiate`, and recorders of other kinds
        unet(x, 9, context, record=AttentionRecorder(only=True))
        with graphs.differentiating(unet):
            unet(x, 9, context, record=AttentionRecorder((8, 8), only=True))
            unet(x, 9, context, record=AttentionRecorder())
            unet(x, 9, context.clone().requires_grad_(), record=AttentionRecorder(only=True))
            with torch.no_grad():
                unet(x, 9, context, record=AttentionRecorder(only=True))
    assert split.captures == 0
    part = unet.mid_block.resnets[0].conv1
    for register in (part.register_forward_hook, part.register_full_backward_hook):
        handle = register(lambda *_: None)
        for _ in range(3):
            looks(graphed, 0, 9)
        handle.remove()
    assert split.captures == 0
    for _ in range(3):
        looks(graphed, 0, 9)
    assert (split.captures, split.replays) == (1, 2)


def test_a_gradient_that_comes_too_late_is_an_error(graphed, split):
    unet, context = graphed.unet, graphed.encode_prompt(PROMPT)
    x = noise([0], (4, 16, 16)).requires_grad_()
    recorders = [AttentionRecorder(only=True) for _ in range(4)]
    with graphs.differentiating(unet):
        for record in recorders:
            unet(x, 9, context, record=record)
    with pytest.raises(RuntimeError, match="another evaluation of the network came before"):
        torch.autograd.grad(recorders[2].cross.sum(), x)
    torch.autograd.grad(recorders[3].cross.sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError, match="another evaluation of the network came before"):
        torch.autograd.grad(recorders[3].cross.sum(), x)


def test_a_failed_capture_of_a_look_turns_graphs_off(shapes, split, recwarn):
    expected = looks(shapes, 0, 9)
    split.fail = RuntimeError("not permitted when stream is capturing")
    shapes.use_graphs()
    try:
        for _ in range(4):
            assert all(torch.equal(a, b) for a, b in zip(looks(shapes, 0, 9), expected))
    finally:
        shapes.use_graphs(False)
    assert split.captures == 1 and graphs.broken
    assert [str(w.message) for w in recwarn] == [
        "the network runs without a CUDA graph: not permitted when stream is capturing"
    ]


def test_the_capture_of_a_gradient(monkeypatch):
    """Two captures, forwards and back, in one pool; what the caller gets has no autograd graph left."""
    captured = []

    def capture(run, pool, stream):
        captured.append((pool, stream))
        return lambda: None, run()

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(torch, "empty_like", torch.ones_like)  # a capture computes nothing, this one does
    x = torch.randn(3, requires_grad=True)
    with torch.no_grad():
        _, outputs, _, given, gradient = graphs.capture_gradient(lambda: [x**2, 3 * x], x, "pool", None)
    assert captured == [("pool", None)] * 2 and len(given) == 2
    assert torch.equal(outputs[0], x.detach() ** 2) and not any(y.requires_grad for y in outputs)
    assert torch.allclose(gradient, 2 * x.detach() + 3)


@torch.no_grad()
def test_a_controlnet_has_graphs_of_its_own(small, fake, tmp_path, monkeypatch):
    """As `load_controlnet` gives it one on CUDA, for which the weights stay on the CPU here."""
    torch.manual_seed(2)
    made = ControlNet(small.config.unet, (4, 4, 8, 8))
    safetensors.torch.save_file(
        {name: y.contiguous() for name, y in made.state_dict().items()}, tmp_path / "net.safetensors"
    )
    fill = controlnet.fill
    monkeypatch.setattr(
        controlnet, "fill", lambda net, tensors, device, dtype: fill(net, tensors, torch.device("cpu"), dtype)
    )
    nets = [
        controlnet.load_controlnet(tmp_path / "net.safetensors", device=device, dtype=torch.float32)
        for device in ("cpu", "cuda")
    ]
    own = graphs.graphs_of(nets[1])
    assert own is not None and graphs.graphs_of(nets[0]) is None
    channels_last = {"memory_format": torch.channels_last}
    assert nets[1].conv_in.weight.is_contiguous(**channels_last)
    pictures = torch.rand(2, 3, 128, 128)
    plain, unet = (Controlled(small.unet, [Control(net, pictures, [0.7, 0.2])]) for net in nets)
    x, context = noise([1, 2], (4, 16, 16)), torch.randn(2, 77, 32)
    region = {grid: torch.ones(2, grid[0] * grid[1], dtype=torch.long) for grid in unet.grids((16, 16))}
    texts = torch.randn(2, 2, 77, 32)
    kept = []
    try:
        small.use_graphs()
        text_kv = unet.text_kv(context)
        for t in (900, 500.5, 20):
            kept.append((unet(x, t, text_kv), plain(x, t, context)))
            kept.append((unet(x, t, texts, region=region), plain(x, t, texts, region=region)))
        assert all(close(a, b) for a, b in kept)
        assert len(own.graphs) == 2
        # The text's keys and values in its graph are those of its own layers, and x, t, the images.
        sizes = sorted(len(graph.inputs) for graph in own.graphs.values())
        assert sizes[-1] == 3 + 2 * len(nets[1].text_kv(context)) < 3 + 2 * len(text_kv)
        replays = fake.replays
        handle = nets[1].mid_block.resnets[0].register_forward_hook(lambda *_: None)
        assert close(unet(x, 20, text_kv), kept[-2][1])
        handle.remove()
        assert fake.replays == replays + 1  # the UNet's
        small.set_attention("auto", nets[1])
        assert not own.graphs and not small.graphs.graphs
    finally:
        small.use_graphs(False)


def test_graphs_are_turned_off_and_on_beside_a_controlnet_too(small):
    net, unet = ControlNet(small.config.unet, (4, 4, 8, 8)), small.unet
    networks = unet, net
    small.unet = Controlled(unet, [Control(net, torch.rand(1, 3, 128, 128))])
    try:
        small.use_graphs(gradients=False)
        assert [graphs.graphs_of(network).gradients for network in networks] == [False, False]
        assert small.graphs is graphs.graphs_of(unet)
        small.use_graphs(False)
        assert all(graphs.graphs_of(network) is None for network in networks) and small.graphs is None
    finally:
        small.unet = unet
        small.use_graphs(False)


def test_the_same_images_with_graphs(small, fake):
    expected = small("a red circle", seeds=[1, 2], steps=4)
    small.use_graphs()
    try:
        ours = small("a red circle", seeds=[1, 2], steps=4)
        assert fake.captures == 1 and fake.replays == 3
        other = small("a blue square", seeds=[1, 2], steps=4)
        assert fake.captures == 1 and fake.replays == 7  # another prompt, the same graph
        small.set_attention("sdpa")
        assert not small.graphs.graphs
    finally:
        small.set_attention("auto")
        small.use_graphs(False)
    again = small("a red circle", seeds=[1, 2], steps=4)
    assert fake.replays == 7
    for a, b, c, d in zip(ours, expected, other, again):
        a, b, c, d = (np.asarray(y).astype(int) for y in (a, b, c, d))
        assert np.abs(a - b).max() <= 2 and np.abs(d - b).max() == 0 and np.abs(c - b).max() > 2


def test_graphs_of_what_the_compiler_made(small_folder, fake):
    sd, compiled = minsd.load(str(small_folder), "cpu"), []
    expected = np.asarray(sd("a red circle", seeds=1, steps=4)[0]).astype(int)
    sd.use_graphs()
    sd.compile(backend=lambda module, inputs: compiled.append(1) or module.forward)
    assert np.abs(np.asarray(sd("a red circle", seeds=1, steps=4)[0]) - expected).max() <= 2
    assert (len(compiled), fake.captures, fake.replays) == (1, 1, 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_same_image_and_no_waiting_in_the_loop():
    sd = minsd.load("shapes", "cuda", torch.float16)
    start = noise([1, 2], (4, 16, 16))
    with_graphs = sd.sample("a red circle", start, steps=6)
    assert len(sd.graphs.graphs) == 1 and sd.graphs.held > 0
    predict, begin = sd.guided("a red circle"), start.to("cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sd.denoise(predict, begin, steps=6)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    sd.use_graphs(False)
    plain = sd.sample("a red circle", start, steps=6)
    for a, b in zip(sd.decode(with_graphs), sd.decode(plain)):
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_same_looks_and_gradients():
    sd = minsd.load("shapes", "cuda", torch.float32)

    def objective(look):
        return losses.self_conflict(look.claims) + losses.cross_response(look.maps)

    lift = Lift(sd, ask(sd, [PROMPT], [0]), objective)

    def step(seed, t):
        x = noise([seed], (4, 16, 16)).to("cuda")
        told, gradient = lift.slope(x, torch.zeros(1, dtype=torch.long, device="cuda"), t)
        return told["loss"][:, None], gradient

    steps = [(0, 981), (1, 961), (2, 500), (3, 20)]
    by_graphs = [step(*each) for each in steps]
    assert len(sd.graphs.graphs) == 1 and not graphs.broken
    sd.use_graphs(gradients=False)
    plain = [step(*each) for each in steps]
    assert not sd.graphs.graphs
    for ours, theirs in zip(by_graphs, plain):  # convolutions may take TF32
        assert all(((a - b).norm() / b.norm()).item() < 1e-2 for a, b in zip(ours, theirs))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_another_gpu_than_the_current_one():
    sd = minsd.load("shapes", "cuda:1")
    by_graphs = np.asarray(sd("a red circle", steps=4)[0]).astype(int)
    assert sd.graphs.graphs
    sd.use_graphs(False)
    assert np.abs(by_graphs - np.asarray(sd("a red circle", steps=4)[0])).max() <= 2
