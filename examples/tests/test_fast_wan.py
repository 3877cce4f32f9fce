"""fast_wan.py on a CPU, with tiny random checkpoints of two experts and of one: every option does
what it says, or says why it cannot."""

import logging
import pickle
import sys

import diffusers
import numpy as np
import pytest
import torch

import collabvr as c
from examples.models.fast_wan import FastWan, Float8Linear, store_in_8_bits
from examples.tests import checkpoints

pytestmark = pytest.mark.slow
FRAME = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    torch.manual_seed(0)
    return checkpoints.a14b(tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    torch.manual_seed(0)
    return checkpoints.ti2v_5b(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def plain(two):
    """A clip without options."""
    return clip(c.Wan(vgm=two))


@pytest.fixture
def told(caplog):
    """told(): what was logged."""
    caplog.set_level(logging.INFO, "collabvr")
    return lambda: caplog.text


def clip(vgm, seed=0):
    return vgm(FRAME, "Move the ball.", 0.25, seed).frames


def difference(one, other):
    """In grey levels of 255, in the mean."""
    return np.abs(one.astype(int) - other).mean()


def test_without_options_it_is_wan(two, plain):
    assert (clip(FastWan(vgm=two)) == plain).all()
    assert plain.shape == (5, 32, 48, 3)
    for wrong in ({"cache_low": 1.5}, {"cache": 0.1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FastWan(**wrong)


def test_the_cache_skips_blocks_of_one_expert(two, plain, told):
    """And says how often."""
    vgm = FastWan(vgm=two, cache_low=0.5)
    calls = {"transformer": 0, "transformer_2": 0}
    for name in calls:  # what really is computed of the last block
        def count(*_, name=name):
            calls[name] += 1
        getattr(vgm.pipe, name).blocks[-1].ffn.register_forward_hook(count)
    cached = clip(vgm)
    assert calls["transformer"] == 2 * 6 and 0 < calls["transformer_2"] < 2 * 14
    share = 1 - calls["transformer_2"] / 28
    assert vgm.skipped("low-noise") == pytest.approx(share)
    assert f"low-noise expert: {100 * share:.0f} % of 28 passes ended after" in told()
    assert (cached != plain).any()


def test_a_failed_clip_leaves_nothing_in_the_cache(two, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    vgm = FastWan(vgm=two, cache_low=0.5)
    fresh = clip(vgm)
    with monkeypatch.context() as patch:
        patch.setattr(vgm.pipe.vae, "decode", full)
        with pytest.raises(RuntimeError, match="try --offload model, or group"):
            clip(vgm, seed=1)
    assert (clip(vgm) == fresh).all()


def test_fp8_halves_the_blocks_weights(two, plain, told):
    """Norms and scales stay as they are."""
    vgm = FastWan(vgm=two, fp8=True)
    for expert in (vgm.pipe.transformer, vgm.pipe.transformer_2):
        block = expert.blocks[1]
        assert block.attn1.to_q.weight.dtype == block.ffn.net[2].weight.dtype == torch.float8_e4m3fn
        assert block.norm2.weight.dtype == block.scale_shift_table.dtype == torch.float32
    assert told().count("GB in 8 bits") == 2
    assert 0 < difference(clip(vgm), plain) < 5


def test_fp8_matmul_is_near_the_true_product(two, plain):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(64, 32).to(torch.bfloat16), torch.randn(1, 48, 64).bfloat16()
    blocks = torch.nn.Sequential(layer)
    true = layer(x).detach()
    store_in_8_bits(blocks, multiply=True)
    assert type(blocks[0]) is Float8Linear
    assert 0 < (blocks(x) - true).abs().mean() / true.abs().mean() < 0.05
    assert 0 < difference(clip(FastWan(vgm=two, fp8_matmul=True)), plain) < 5


def test_fp8_and_cache_go_with_offloaded_weights(two):
    """Layer by layer, as group offload does it, only that here both places are main memory."""
    vgm, other = (FastWan(vgm=two, fp8=True, cache_low=0.5) for _ in range(2))
    other.pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    assert (clip(vgm) == clip(other)).all()


def test_all_blocks_share_one_compiled_graph(two):
    """Also with the cache."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    compiled = clip(FastWan(vgm=two, compile=True, cache_low=0.5))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert difference(compiled, clip(FastWan(vgm=two, cache_low=0.5))) < 2


def write_lora(path, seed):
    """A random LoRA of rank 2 of all blocks, with the names and alphas of Wan2.2-Lightning's."""
    from safetensors.torch import save_file

    weights, random = {}, torch.Generator().manual_seed(seed)
    for k in range(4):
        for layer, (to, of) in {
                "self_attn.q": (32, 32), "cross_attn.o": (32, 32), "ffn.0": (64, 32),
                "ffn.2": (32, 64)}.items():
            name = f"diffusion_model.blocks.{k}.{layer}"
            weights[f"{name}.lora_down.weight"] = torch.randn(2, of, generator=random)
            weights[f"{name}.lora_up.weight"] = torch.randn(to, 2, generator=random)
            weights[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(weights, path)
    return str(path)


def test_a_lora_changes_each_expert(two, tmp_path):
    """And nothing is computed on top of it. With shift 5, four steps are where it was trained."""
    pytest.importorskip("peft", reason="in examples/requirements.txt")
    few = {"vgm": two, "sampling_steps": 4, "guidance_scale": 1, "flow_shift": 5}
    high, low = (write_lora(tmp_path / f"{k}.safetensors", k) for k in (1, 2))
    vgm, without = FastWan(lora_high=high, lora_low=low, **few), FastWan(**few)
    changes = []
    for part in ("transformer", "transformer_2"):
        ours, theirs = (getattr(x.pipe, part).blocks[3].attn1.to_q for x in (vgm, without))
        assert type(ours) is type(theirs)
        changes.append((ours.weight - theirs.weight).float())
    assert all(change.any() for change in changes) and (changes[0] != changes[1]).any()
    moved = clip(vgm)
    assert vgm.pipe.scheduler.timesteps.tolist() == [999, 937, 833, 625]
    assert (moved != clip(without)).any()


def test_a_lora_that_would_do_nothing_is_told_so(two, one, tmp_path, monkeypatch):
    pytest.importorskip("peft", reason="in examples/requirements.txt")
    from safetensors.torch import save_file

    good, foreign = write_lora(tmp_path / "good.safetensors", 1), tmp_path / "foreign.safetensors"
    save_file({"unet.down.0.lora_A.weight": torch.zeros(2, 4),
               "unet.down.0.lora_B.weight": torch.zeros(4, 2)}, foreign)
    (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(c.Problem, match="two experts: set both lora_high and lora_low"):
        _ = FastWan(vgm=two, lora_high=good).pipe
    for path in (foreign, tmp_path / "pickle.safetensors", tmp_path / "none.safetensors"):
        with pytest.raises(c.Problem, match=f"{path.name} is no LoRA of the low-noise expert"):
            _ = FastWan(vgm=two, lora_high=good, lora_low=str(path)).pipe
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(c.Problem, match="peft is needed: pip install"):
        FastWan(vgm=two, lora_high="a", lora_low="b").check()


def test_one_expert_is_the_low_noise_one(one):
    vgm = FastWan(vgm=one, fps=24, fp8=True, cache_low=0.5)
    made = vgm(np.zeros((80, 100, 3), np.uint8), "Move the ball.", 0.34, 0)
    assert made.frames.shape == (9, 64, 96, 3) and made.fps == 24
    assert vgm.passes["low-noise", 0] == 2 * 20 > vgm.passes["low-noise", 1]
    for wrong in ({"cache_high": 0.1}, {"lora_high": "x", "lora_low": "y"}):
        with pytest.raises(c.Problem, match="has one expert: lora_low and cache_low"):
            _ = FastWan(vgm=one, **wrong).pipe


def test_a_missing_attention_backend_gets_one_sentence(two):
    for name in ("flashier", "_flash_3"):
        with pytest.raises(c.Problem, match=f"attention={name} cannot be used"):
            _ = FastWan(vgm=two, attention=name).pipe


def test_weights_are_small_before_they_move(two, monkeypatch):
    """A GPU that cannot multiply in 8 bits is refused before anything is loaded."""
    seen = []
    for name, answer in {
            "is_available": True, "get_device_name": "Card",
            "get_device_capability": (8, 6)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(
        diffusers.WanImageToVideoPipeline, "to",
        lambda self, device: seen.append(
            (device, self.transformer_2.blocks[0].ffn.net[2].weight.dtype)))
    _ = FastWan(vgm=two, fp8=True, offload="none").pipe
    assert seen == [("cuda", torch.float8_e4m3fn)]
    with pytest.raises(c.Problem, match="Card cannot multiply in 8 bits: use --fp8 in place"):
        FastWan(vgm=two, fp8_matmul=True).check()
