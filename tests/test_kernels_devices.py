"""Where the Triton kernels are taken and where PyTorch is: stand-ins claim to be on CUDA."""

import subprocess
import warnings

import pytest
import torch

from minsd import kernels
from minsd.kernels import attention, devices, group_norm, norm_is_fused


class OnCuda(torch.Tensor):
    is_cuda = True


def on_cuda(*shape, dtype=torch.float16):
    g = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=g).to(dtype).as_subclass(OnCuda)


@pytest.fixture
def launches(monkeypatch):
    """Triton is installed and works; the launches tried."""
    tried = []
    monkeypatch.setattr(devices, "_failures", {})
    monkeypatch.setattr(devices, "_launch", tried.append)
    monkeypatch.setattr(devices, "shared_memory", lambda device: (101376, False))  # an RTX 3090's
    for module in (devices, kernels):
        monkeypatch.setattr(module, "HAS_TRITON", True)
    return tried


def plain(y):
    return y.as_subclass(torch.Tensor)


def test_without_a_c_compiler_pytorch_does_the_work_after_one_warning(launches, monkeypatch):
    errors = [
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        subprocess.CalledProcessError(1, ["/usr/bin/gcc", "main.c", "-lcuda"]),
        RuntimeError(""),
    ]
    q, x = on_cuda(1, 4, 2, 8), on_cuda(1, 4, 3, 3)
    norm = torch.nn.GroupNorm(2, 4).half().requires_grad_(False)
    for error in errors:

        def launch(device, error=error):
            launches.append(device)
            raise error

        launches.clear()
        monkeypatch.setattr(devices, "_failures", {})
        monkeypatch.setattr(devices, "_launch", launch)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out, maps = attention(q, q, q, probs="mean")
            y = group_norm(x, norm, silu=True)
            attention(q, q, q, probs="mean", backend="sdpa")
        assert len(launches) == len(caught) == 1
        assert "without its Triton kernels" in str(caught[0].message) and "\n" not in str(caught[0].message)
        expected = attention(*[plain(q)] * 3, probs="mean", backend="reference")
        assert torch.equal(plain(out), expected[0]) and torch.equal(plain(maps), expected[1])
        assert torch.equal(plain(y), group_norm(plain(x), norm, silu=True))
        with pytest.raises(ValueError, match="triton backend cannot run: Triton cannot launch") as raised:
            attention(q, q, q, backend="triton")
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
        if error is not errors[2]:
            assert "python3-dev" in str(raised.value)


def test_a_launch_that_works_is_asked_for_once_per_device(launches):
    x, norm = on_cuda(1, 4, 3, 3), torch.nn.GroupNorm(2, 4).half().requires_grad_(False)
    assert norm_is_fused(x, norm, None) and norm_is_fused(x, norm, None)
    assert kernels._map_kernel(on_cuda(1, 4, 2, 8), on_cuda(1, 4, 2, 8), "auto") == "triton"
    assert len(launches) == 1
    assert devices.failure(torch.device("cuda", 0)) is devices.failure(torch.device("cuda", 1)) is None
    assert len(launches) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.skipif(not kernels.HAS_TRITON, reason="no Triton on this platform")
def test_a_real_launch_that_fails_gives_a_reason(monkeypatch):
    monkeypatch.setattr(devices, "_failures", {})
    with pytest.warns(UserWarning, match="Triton cannot launch a kernel here"):
        assert devices.failure(torch.device("cuda", 0)) is not None


def test_the_question_can_be_asked_under_compile(launches):
    def f(x):
        device = torch.device("cuda", 0)
        runs = devices.failure(device) is None
        fits = devices.short_of_memory(device, x.shape[-1], torch.float16) is None
        return x + runs + fits

    for dynamic in (False, True):
        compiled = torch.compile(f, fullgraph=True, backend="eager", dynamic=dynamic)
        assert (compiled(torch.zeros(2, 40)) == 2).all()
    assert len(launches) == 1


def test_hooks_of_a_norm_are_honoured(launches):
    x = on_cuda(1, 4, 3, 3)
    for add in (
        "register_forward_pre_hook",
        "register_forward_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ):
        norm = torch.nn.GroupNorm(2, 4).half().requires_grad_(False)
        assert norm_is_fused(x, norm, None)
        handle = getattr(norm, add)(lambda *args: None)
        assert not norm_is_fused(x, norm, None)
        handle.remove()
        assert norm_is_fused(x, norm, None)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
    assert not norm_is_fused(x, norm, None)
    handle.remove()
    seen = []
    norm.register_forward_hook(lambda module, inputs, y: seen.append(y))
    group_norm(x, norm)
    assert len(seen) == 1


def test_offsets_within_an_image_fit_32_bits(launches):
    """The VAE's last level at 2896 and 2897 cells squared: 256 * 2897^2 > 2^31."""
    norm = torch.nn.GroupNorm(32, 256, device="meta", dtype=torch.float16).requires_grad_(False)
    for side, fits in ((2896, True), (2897, False)):
        x = torch.empty(2, 256, side, side, device="meta", dtype=torch.float16).as_subclass(OnCuda)
        assert norm_is_fused(x, norm, None) == fits


@pytest.mark.parametrize("chosen, tf32", [("tf32", True), ("ieee", False)])
@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="needs PyTorch 2.9")
def test_tf32_is_asked_in_the_new_way(chosen, tf32):
    pytest.importorskip("triton", reason="no Triton on this platform")
    from minsd.kernels import flash

    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = chosen  # with "tf32" the old question raises RuntimeError
        assert flash._tf32_is_allowed() == tf32
        matmul.fp32_precision = before
        for old in (True, False):  # the old way still counts
            matmul.allow_tf32 = old
            assert flash._tf32_is_allowed() == old
    finally:
        matmul.fp32_precision = before


def test_an_old_device_uses_pytorch_without_a_warning(launches, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, old in (((7, 5), True), ((8, 0), False), ((12, 0), False)):
        monkeypatch.setattr(devices, "_failures", {})
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, have=capability: have)
        launches.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert (devices.failure(torch.device("cuda", 0)) is not None) == old
        assert len(launches) == (not old)
        assert kernels._map_kernel(on_cuda(1, 4, 2, 8), on_cuda(1, 4, 2, 8), "auto") == (
            "reference" if old else "triton"
        )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert devices._too_old(torch.device("cuda", 0)) == (
        "the kernels need compute capability 8.0, the device has 7.5"
    )


def test_what_does_not_fit_is_refused_or_left_to_pytorch(launches, monkeypatch):
    q = on_cuda(1, 4, 2, 160)
    for limit, fits in ((101376, True), (49152, False), (None, True)):
        monkeypatch.setattr(devices, "shared_memory", lambda device, limit=limit: (limit, False))
        assert kernels._map_kernel(q, q, "auto") == ("triton" if fits else "reference")
        if not fits:
            with pytest.raises(ValueError, match="needs .* bytes of shared memory, the device has") as raised:
                attention(q, q, q, backend="triton")
            assert "\n" not in str(raised.value)


@pytest.mark.parametrize("d", kernels.TRITON_HEAD_DIMS)
def test_every_kernel_fits_the_cards_from_8_0_on(d, monkeypatch):
    """99 KB on RTX 3090 to 5090, 227 KB on H100 and B200; float32 of head dim 160 too."""
    for limits in ((101376, False), (232448, True)):
        monkeypatch.setattr(devices, "shared_memory", lambda device, limits=limits: limits)
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            assert devices.short_of_memory(torch.device("cuda", 0), d, dtype) is None


def test_the_device_itself_is_asked(monkeypatch):
    class Properties:
        major = 9
        shared_memory_per_block_optin = 232448

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert devices.shared_memory(torch.device("cuda", 0)) == (232448, True)
    del Properties.shared_memory_per_block_optin
    assert devices.shared_memory(torch.device("cuda", 0)) == (None, True)
