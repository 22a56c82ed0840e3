"""The UNet against diffusers' on the same random weights, at full size one network at a time."""

import gc
import json
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel

import minsd
from minsd.attention import Attention, AttentionRecorder
from minsd.config import MODELS, ScheduleConfig, UNetConfig
from minsd.guidance import classifier_free
from minsd.samplers.schedule import Schedule
from minsd.unet import UNet

SMALL = UNetConfig(
    block_out_channels=(32, 64, 96),
    layers_per_block=2,
    cross_attention=(True, True, False),
    num_heads=(2, 4, 4),
    context_dim=48,
    norm_groups=16,
    sample_size=16,
)


def diffusers_unet(config: UNetConfig) -> UNet2DConditionModel:
    kinds = [("CrossAttn" if cross else "") for cross in config.cross_attention]
    return UNet2DConditionModel(
        sample_size=config.sample_size,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
        attention_head_dim=config.num_heads,
        cross_attention_dim=config.context_dim,
        norm_num_groups=config.norm_groups,
        use_linear_projection=config.linear_projection,
        upcast_attention=config.upcast_attention,
    ).eval()


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", ["sd15", "sd21"])
@torch.no_grad()
def test_full_size_parity(name):
    """One set of weights in memory: ours are assigned from theirs, not copied."""
    config = MODELS[name].unet
    torch.manual_seed(0)
    theirs = diffusers_unet(config)
    with torch.device("meta"):
        ours = UNet(config)
    ours.load_state_dict(theirs.state_dict(), assign=True)  # strict: the same names, every one
    x, context, t = torch.randn(1, 4, 32, 32), torch.randn(1, 77, config.context_dim), torch.tensor([481])
    assert relative(ours(x, 481, context), theirs(x, t, context).sample) <= 1e-5
    del theirs, ours
    gc.collect()


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(
    "size", [(16, 16), (13, 22), (1, 3)], ids=str
)  # odd sizes: upsampling must meet each skip
@torch.no_grad()
def test_sizes_and_timesteps(linear, size):
    config = UNetConfig(**{**SMALL.__dict__, "linear_projection": linear})
    torch.manual_seed(1)
    theirs, ours = diffusers_unet(config), UNet(config)
    ours.load_state_dict(theirs.state_dict())
    x, context = torch.randn(3, 4, *size), torch.randn(3, 77, 48)
    t = torch.tensor([1, 500, 999])
    expected = theirs(x, t, context).sample
    assert relative(ours(x, t, context), expected) <= 1e-5
    assert relative(ours(x[1:2], 500, context[1:2]), expected[1:2]) <= 1e-5  # an int serves the whole batch


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(2)
    unet = UNet(SMALL)
    return unet.requires_grad_(False), torch.randn(2, 4, 16, 16), torch.randn(2, 77, 48)


def whole_softmax(unet, x, t, context, grid):
    """Head- and layer-mean maps by hooks on to_q and to_k: independent of the recorder and of the
    kernels."""
    sums, counts, inputs = {}, {}, {}

    def keep(name, which):
        return lambda module, args, out: inputs.setdefault(name, {}).update({which: out})

    handles = []
    for name, module in unet.named_modules():
        if isinstance(module, Attention):
            handles += [
                module.to_q.register_forward_hook(keep(name, "q")),
                module.to_k.register_forward_hook(keep(name, "k")),
            ]
    unet(x, t, context)
    for handle in handles:
        handle.remove()
    for name, qk in inputs.items():
        heads = unet.get_submodule(name).num_heads
        q, k = (qk[which].unflatten(-1, (heads, -1)).transpose(1, 2) for which in "qk")  # (B, heads, N, d)
        if q.shape[2] != grid[0] * grid[1]:
            continue
        kind = name[-5:]
        p = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean(1)
        sums[kind], counts[kind] = sums.get(kind, 0) + p, counts.get(kind, 0) + 1
    return {kind: (sums[kind] / counts[kind]).unflatten(1, grid) for kind in sums}


@pytest.mark.parametrize("resolution", [None, (16, 16), (8, 8)], ids=str)
def test_recorder_equals_whole_softmax(small, resolution):
    unet, x, context = small
    grid = resolution or (16, 16)
    recorder = AttentionRecorder(resolution)
    unet(x, 300, context, record=recorder)
    expected = whole_softmax(unet, x, 300, context, grid)
    assert recorder.resolution == grid
    torch.testing.assert_close(recorder.cross, expected["attn2"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(recorder.self, expected["attn1"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(recorder.self.sum(-1), torch.ones(2, *grid))


@torch.no_grad()
def test_recording_leaves_the_output_alone(small):
    unet, x, context = small
    plain = unet(x, 300, context)
    recorded = unet(x, 300, context, record=AttentionRecorder())
    assert relative(recorded, plain) < 1e-6


def test_early_stop_gives_the_same_maps_and_gradients(small):
    unet, x, context = small
    results = []
    for only in (False, True):
        recorder, leaf = AttentionRecorder(only=only), x.clone().requires_grad_()
        out = unet(leaf, 300, context, record=recorder)
        assert (out is None) == only
        loss = recorder.cross[..., 5].amax() + (recorder.self**2).sum()
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert results[1][1].abs().sum() > 0
    assert all(p.grad is None for p in unet.parameters())


def test_early_stop_runs_nothing_after_the_last_layer_that_records(small):
    unet, x, context = small
    ran = []
    handles = [
        m.register_forward_hook(lambda module, args, out, name=name: ran.append(name))
        for name, m in unet.named_modules()
        if isinstance(m, Attention)
    ]
    unet(x, 300, context, record=AttentionRecorder((8, 8), only=True))
    for handle in handles:
        handle.remove()
    assert not [name for name in ran if name.startswith("up_blocks.2")]  # the finest level, the dearest
    assert [name for name in ran if name.startswith("up_blocks.1")]


@torch.no_grad()
def test_each_cell_attends_to_its_own_text(small):
    """Upper half one text, lower half another, against ordinary attention over each text."""
    unet, x, context = small
    texts = torch.stack([context, context.flip(0)], dim=1)  # (B, R, 77, D)
    one = {grid: torch.ones(2, grid[0] * grid[1], dtype=torch.long) for grid in unet.grids((16, 16))}
    assert relative(unet(x, 300, texts, region=one), unet(x, 300, texts[:, 1])) < 1e-6

    block = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    cells, half = torch.randn(2, 256, 32), (torch.arange(256) // 128).expand(2, -1)
    mixed = block(cells, texts, region=half)
    expected = torch.cat([block(cells, texts[:, 0])[:, :128], block(cells, texts[:, 1])[:, 128:]], dim=1)
    assert relative(mixed, expected) < 1e-6


@torch.no_grad()
def test_a_pair_of_texts_one_for_each_half(small):
    """The encoder half attends to the first text alone, everything after it to the second alone."""
    unet, x, context = small
    texts = torch.stack([context, context.flip(0)], dim=1)  # (B, R, 77, D)
    down, up = (
        {grid: torch.full((2, grid[0] * grid[1]), text) for grid in unet.grids((16, 16))} for text in (0, 1)
    )
    first, second = (unet.text_kv(texts[:, text]) for text in (0, 1))
    spliced = {
        m: (first if name.startswith("down_blocks") else second)[m]
        for name, m in unet.named_modules()
        if m in first
    }
    assert relative(unet(x, 300, texts, region=(down, up)), unet(x, 300, spliced)) < 1e-6
    assert relative(unet(x, 300, texts, region=(down, up)), unet(x, 300, texts, region=up)) > 1e-4


@torch.no_grad()
def test_keys_and_values_stand_for_the_text(small):
    unet, x, context = small
    text_kv = unet.text_kv(context)
    for t in (300, 700):
        assert torch.equal(unet(x, t, text_kv), unet(x, t, context))


def test_predictors_project_a_text_once_unless_it_takes_a_gradient(small):
    unet, x, context = small
    calls = []
    schedule = Schedule(ScheduleConfig())
    layer = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    handle = layer.to_k.register_forward_hook(lambda *args: calls.append(1))
    cond, uncond = context[:1].clone(), context[1:].clone()
    predict = classifier_free(unet, cond, uncond, 3.0, schedule)
    first, second = predict(x, 500), predict(x, 300)
    assert len(calls) == 1 and predict(x[:1], 300).shape == (1, 4, 16, 16) and len(calls) == 2
    u, c = unet(x, 300, uncond.expand(2, -1, -1)), unet(x, 300, cond.expand(2, -1, -1))
    assert relative(second, u + 3 * (c - u)) < 1e-5 and relative(first, second) > 0.01
    cond.requires_grad_()
    predict = classifier_free(unet, cond, uncond, 3.0, schedule)
    for t in (500, 300):
        assert torch.autograd.grad(predict(x, t).sum(), cond)[0].abs().sum() > 0
    handle.remove()


@torch.no_grad()
def test_control_enters_as_in_diffusers():
    torch.manual_seed(3)
    theirs, ours = diffusers_unet(SMALL), UNet(SMALL)
    ours.load_state_dict(theirs.state_dict())
    x, context = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 48)
    shapes = [(32, 16)] * 3 + [(32, 8)] + [(64, 8)] * 2 + [(64, 4)] + [(96, 4)] * 2
    skips, middle = [torch.randn(2, c, n, n) for c, n in shapes], torch.randn(2, 96, 4, 4)
    expected = theirs(
        x, 300, context, down_block_additional_residuals=skips, mid_block_additional_residual=middle
    ).sample
    assert relative(ours(x, 300, context, control=(skips, middle)), expected) <= 1e-5
    assert relative(ours(x, 300, context), expected) > 1e-2


def test_default_resolution_of_the_families():
    """Counts and grids only: SD1.x at 512x512 records 16x16, from 5 cross- and 5 self-attention
    layers."""
    recorder, full = AttentionRecorder(), UNetConfig()
    with torch.device("meta"):
        unet = UNet(full)
    for size, grid in (
        ((64, 64), (16, 16)),
        ((96, 64), (24, 16)),
        ((128, 128), (32, 32)),
        ((32, 32), (16, 16)),
        ((8, 8), (8, 8)),
    ):
        recorder.begin(unet.grids(size), unet.attention_blocks)
        assert recorder.resolution == grid
        assert recorder.total == 5


def test_recorder_says_what_is_wrong(small):
    unet, x, context = small
    with pytest.raises(ValueError, match="16x16, 8x8"):
        unet(x, 300, context, record=AttentionRecorder((32, 32)))
    with pytest.raises(ValueError, match="nothing is recorded"):
        AttentionRecorder().cross  # noqa: B018


@torch.no_grad()
def test_fused_projections_are_views_and_give_the_same(small):
    unet, x, context = small
    fused = UNet(SMALL)
    fused.load_state_dict(unet.state_dict())
    names = set(fused.state_dict())
    for module in fused.modules():
        if isinstance(module, Attention):
            module.fuse()
    assert set(fused.state_dict()) == names
    assert relative(fused(x, 300, context), unet(x, 300, context)) < 1e-6
    attention = fused.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    for dtype in (torch.float32, torch.float64, torch.float32):  # a move must not part views and buffer
        attention = attention.to(dtype)
        storage = attention.fused.untyped_storage().data_ptr()
        weights = (attention.to_q.weight, attention.to_k.weight, attention.to_v.weight)
        assert {weight.untyped_storage().data_ptr() for weight in weights} == {storage}
    attention.to_k.weight.zero_()  # as an adapter does
    assert relative(fused(x, 300, context), unet(x, 300, context)) > 1e-4


@torch.no_grad()
def test_a_network_that_is_told_the_guidance_scale_equals_diffusers(small_folder, tmp_path):
    """Latent consistency models: the scale goes into an embedding, and one row is predicted."""
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler

    folder = shutil.copytree(small_folder, tmp_path / "lcm")
    config = json.loads((folder / "unet" / "config.json").read_text())
    torch.manual_seed(0)
    theirs = UNet2DConditionModel.from_config(config | {"time_cond_proj_dim": 64})
    theirs.save_pretrained(folder / "unet")
    settings = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    LCMScheduler.from_config(settings).save_pretrained(folder / "scheduler")
    sd = minsd.load(str(folder), "cpu")
    assert (sd.config.sampler, sd.config.steps, sd.config.guidance_scale) == ("lcm", 4, 8.5)
    x, cond, uncond = torch.randn(2, 4, 16, 16), torch.randn(1, 77, 32), torch.randn(1, 154, 32)
    outputs = []
    embedding = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    for scale in (8.5, 3.0):
        told = embedding(None, torch.tensor([scale - 1.0] * 2), embedding_dim=64)
        expected = theirs(x, 499, cond.expand(2, -1, -1), timestep_cond=told).sample
        predict = sd.predictor(cond, uncond, scale)
        outputs.append(predict(x, 499))
        assert ((outputs[-1] - expected).norm() / expected.norm()).item() <= 1e-5
        if scale == 8.5:
            assert torch.equal(sd.unet(x, 499, cond.expand(2, -1, -1)), outputs[0])  # as it is usually
    assert (outputs[0] - outputs[1]).norm() > 1e-3
    assert torch.equal(sd.unet(x, 499, cond.expand(2, -1, -1)), outputs[0])  # also after another scale
