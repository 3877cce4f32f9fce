"""Tests of fast_wan.py and measure_wan.py on a CPU, with tiny random checkpoints of two experts and
of one: every option does what it says, or says why it cannot."""

import logging
import os
import pickle
import shutil
import sys
import types
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
import measure_wan
from fast_wan import FastWan

import collabvr as c

FRAME = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A checkpoint of two experts, as Wan2.2 A14B."""
    folder = str(tmp_path_factory.mktemp("two"))
    measure_wan.random_wan(measure_wan.TINY).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A checkpoint of one expert that knows each token's own noise, as Wan2.2 TI2V-5B: sides are
    multiples of 32."""
    pipe, folder = measure_wan.random_wan(measure_wan.TINY), str(tmp_path_factory.mktemp("one"))
    expert = diffusers.WanTransformer3DModel(**measure_wan.TINY["expert"], in_channels=48,
                                             out_channels=48).to(torch.bfloat16)
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, decoder_base_dim=8, z_dim=48, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True], is_residual=True, in_channels=12, out_channels=12,
        patch_size=2, scale_factor_spatial=16, latents_mean=[0.0] * 48, latents_std=[1.0] * 48)
    diffusers.WanImageToVideoPipeline(
        pipe.tokenizer, pipe.text_encoder, vae, pipe.scheduler, transformer=expert,
        expand_timesteps=True).save_pretrained(folder)
    return folder


def clip(vgm, seed=0):
    return vgm(FRAME, "Move the ball.", 0.25, seed).frames


def test_without_options_it_is_wan(two):
    assert FastWan().identity == c.Wan().identity | {
        "fp8": False, "cache_low": 0, "cache_high": 0, "compile": False, "attention": "auto",
        "lora_high": "", "lora_low": ""}
    ours, theirs = clip(FastWan(vgm=two)), clip(c.Wan(vgm=two))
    assert ours.shape == (5, 32, 48, 3) and (ours == theirs).all()


def test_every_setting_may_come_as_text_and_is_checked(two):
    name = f"{HERE / 'fast_wan.py'}:FastWan"
    vgm = c.load_generator(c.Wan(name), {"vgm": two, "fp8": "true", "cache_low": "0.5", "fps": "8"})
    vgm.check(1)
    assert vgm.func.fp8 is True and vgm.func.cache_low == 0.5 and vgm.func.fps == 8
    for wrong in ({"fp8": "perhaps"}, {"cache_low": "1.5"}, {"cache": "0.1"}):
        with pytest.raises(c.Problem, match=next(iter(wrong))):
            c.load_generator(c.Wan(name), wrong)


def test_the_cache_skips_blocks_of_the_low_noise_expert_only_and_says_how_often(two, caplog):
    caplog.set_level(logging.INFO, "collabvr")
    vgm, plain = FastWan(vgm=two, cache_low=0.5), FastWan(vgm=two)
    calls = {"transformer": 0, "transformer_2": 0}
    for name in calls:  # what really is computed of the last block
        def count(*_, name=name):
            calls[name] += 1
        getattr(vgm.pipe, name).blocks[-1].ffn.register_forward_hook(count)
    cached = clip(vgm)
    assert calls["transformer"] == 2 * 6 and 0 < calls["transformer_2"] < 2 * 14
    skipped = 2 * 14 - calls["transformer_2"]
    assert f"low-noise expert: {skipped} of 28 passes ended after the first block" in caplog.text
    assert "high-noise" not in caplog.text
    assert (cached != clip(plain)).any() and (cached == clip(vgm)).all()


def test_a_failed_clip_leaves_nothing_in_the_cache(two, monkeypatch):
    vgm = FastWan(vgm=two, cache_low=0.5)
    fresh = clip(vgm)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(vgm.pipe.vae, "decode", full)
        with pytest.raises(torch.OutOfMemoryError):
            clip(vgm, seed=1)
    assert (clip(vgm) == fresh).all()


def test_fp8_halves_the_blocks_weights_and_keeps_norms_and_scales(two, caplog):
    caplog.set_level(logging.INFO, "collabvr")
    vgm = FastWan(vgm=two, fp8=True)
    for expert in (vgm.pipe.transformer, vgm.pipe.transformer_2):
        block = expert.blocks[1]
        assert block.attn1.to_q.weight.dtype == block.ffn.net[2].weight.dtype == torch.float8_e4m3fn
        assert block.norm2.weight.dtype == block.scale_shift_table.dtype == torch.float32
    assert caplog.text.count("stored as float8") == 2
    change = np.abs(clip(vgm).astype(int) - clip(FastWan(vgm=two))).mean()
    assert 0 < change < 5  # of 255
    assert vgm.pipe.transformer.blocks[1].attn1.to_q.weight.dtype == torch.float8_e4m3fn


def test_fp8_and_cache_go_with_weights_that_wait_in_main_memory(two):
    """Layer by layer, as group offload does it, only that here both places are main memory."""
    vgm, other = (FastWan(vgm=two, fp8=True, cache_low=0.5) for _ in range(2))
    other.pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    assert (clip(vgm) == clip(other)).all()


@pytest.mark.skipif("COLLABVR_SLOW" not in os.environ, reason="compiles: COLLABVR_SLOW=1")
def test_all_blocks_share_one_compiled_graph_also_with_the_cache(two):
    from torch._dynamo.utils import counters
    torch.compiler.reset()
    counters.clear()
    compiled = clip(FastWan(vgm=two, compile=True, cache_low=0.5))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    eager = clip(FastWan(vgm=two, cache_low=0.5))
    assert np.abs(compiled.astype(int) - eager).mean() < 2


def write_lora(path, seed):
    """A random LoRA of rank 2 of all blocks, with the names and alphas of Wan2.2-Lightning's."""
    from safetensors.torch import save_file
    weights, random = {}, torch.Generator().manual_seed(seed)
    for k in range(measure_wan.TINY["expert"]["num_layers"]):
        for layer, (to, of) in {"self_attn.q": (32, 32), "cross_attn.o": (32, 32),
                                "ffn.0": (64, 32), "ffn.2": (32, 64)}.items():
            name = f"diffusion_model.blocks.{k}.{layer}"
            weights[f"{name}.lora_down.weight"] = torch.randn(2, of, generator=random)
            weights[f"{name}.lora_up.weight"] = torch.randn(to, 2, generator=random)
            weights[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(weights, path)
    return str(path)


def test_a_lora_changes_each_expert_and_brings_the_steps_and_the_guidance_it_wants(two, tmp_path):
    pytest.importorskip("peft", reason="LoRAs need peft: pip install -r examples/requirements.txt")
    high, low = (write_lora(tmp_path / f"{k}.safetensors", k) for k in (1, 2))
    vgm, plain = FastWan(vgm=two, lora_high=high, lora_low=low), FastWan(vgm=two)
    assert (vgm.sampling_steps, vgm.guidance_scale) == (4, 1.0)
    assert FastWan(lora_low=low, sampling_steps=8, guidance_scale=2).sampling_steps == 8
    for part in ("transformer", "transformer_2"):
        ours, theirs = (getattr(x.pipe, part).blocks[3].attn1.to_q for x in (vgm, plain))
        assert type(ours) is type(theirs), "nothing is computed on top of it"
        assert not torch.equal(ours.weight, theirs.weight)
        other = getattr(vgm.pipe, {"transformer": "transformer_2"}.get(part, "transformer"))
        assert not torch.equal(ours.weight, other.blocks[3].attn1.to_q.weight)
    moved = clip(vgm)
    assert vgm.pipe.scheduler.timesteps.tolist() == [999, 937, 833, 625]
    alike = FastWan(vgm=two, sampling_steps=4, guidance_scale=1)
    assert (moved != clip(alike)).any()


def test_a_lora_that_would_do_nothing_or_is_no_safetensors_gets_one_sentence(two, one, tmp_path):
    pytest.importorskip("peft", reason="LoRAs need peft: pip install -r examples/requirements.txt")
    from safetensors.torch import save_file
    good, foreign = write_lora(tmp_path / "good.safetensors", 1), tmp_path / "foreign.safetensors"
    save_file({"unet.down.0.lora_A.weight": torch.zeros(2, 4),
               "unet.down.0.lora_B.weight": torch.zeros(4, 2)}, foreign)
    (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(c.Problem, match="two experts: set both lora_high and lora_low"):
        FastWan(vgm=two, lora_high=good).check(1)
    with pytest.raises(c.Problem, match="has one expert"):
        FastWan(vgm=one, lora_high=good).check(1)
    for path in (foreign, tmp_path / "pickle.safetensors", tmp_path / "none.safetensors"):
        with pytest.raises(c.Problem, match=f"{path.name} is no LoRA of the low-noise expert"):
            FastWan(vgm=two, lora_high=good, lora_low=str(path)).check(1)


def test_a_scheduler_that_the_loras_cannot_have_gets_one_sentence(two, tmp_path):
    pytest.importorskip("peft", reason="LoRAs need peft: pip install -r examples/requirements.txt")
    euler = shutil.copytree(two, tmp_path / "euler")
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(euler / "scheduler")
    index = (euler / "model_index.json").read_text()
    (euler / "model_index.json").write_text(
        index.replace("UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"))
    lora = write_lora(tmp_path / "lora.safetensors", 1)
    with pytest.raises(c.Problem, match="FlowMatchEulerDiscreteScheduler has no flow_shift"):
        FastWan(vgm=str(euler), lora_high=lora, lora_low=lora).check(1)


def test_without_peft_a_lora_gets_one_sentence(two, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(c.Problem, match="peft is needed: pip install"):
        FastWan(vgm=two, lora_high="a", lora_low="b").check(1)


def test_one_expert_works_with_sides_of_32_and_refuses_what_would_have_no_effect(one, caplog):
    vgm = FastWan(vgm=one, fps=24, fp8=True, cache_low=0.5)
    made = vgm(np.zeros((80, 100, 3), np.uint8), "Move the ball.", 0.34, 0)
    assert made.frames.shape == (9, 64, 96, 3) and made.fps == 24
    assert vgm.passes["low-noise", 0] == 2 * 20 > vgm.passes["low-noise", 1]
    assert vgm.pipe.transformer.blocks[0].ffn.net[2].weight.dtype == torch.float8_e4m3fn
    assert "trained at" not in caplog.text
    FastWan(vgm=one).check(1)
    assert "trained at 24 frames per second, not 16" in caplog.text
    with pytest.raises(c.Problem, match="has one expert: lora_low and cache_low"):
        FastWan(vgm=one, cache_high=0.1).check(1)


def test_an_attention_backend_that_is_not_there_gets_one_sentence(two, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "collabvr")
    for name in ("flashier", "_flash_3"):
        with pytest.raises(c.Problem, match=f"attention={name} cannot be used"):
            FastWan(vgm=two, attention=name).check(1)
    FastWan(vgm=two).check(1)
    assert "attention: native" in caplog.text


@pytest.fixture
def card(monkeypatch):
    """As if there were a GPU of 32 GB, as far as that goes without one: what is asked of it, in
    order. The work itself stays on the CPU."""
    asked: list = []
    for name, answer in {
            "is_available": True, "get_device_name": "Card", "mem_get_info": (32e9, 32e9),
            "get_device_capability": (9, 0), "max_memory_reserved": 5e9, "empty_cache": None,
            "get_device_properties": types.SimpleNamespace(total_memory=32_000_000_000),
            "reset_peak_memory_stats": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction",
                        lambda share: asked.append(("share", share)))
    for name in ("to", "enable_model_cpu_offload", "enable_group_offload"):
        monkeypatch.setattr(diffusers.WanImageToVideoPipeline, name, lambda self, *args, name=name,
                            **_: asked.append((name, *args)))
    return asked


def test_on_a_gpu_the_weights_are_small_before_they_are_placed_and_are_placed_once(
        two, card, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "collabvr")
    seen = []
    monkeypatch.setattr(diffusers.WanImageToVideoPipeline, "to", lambda self, device: seen.append(
        (device, self.transformer_2.blocks[0].ffn.net[2].weight.dtype)))
    _ = FastWan(vgm=two, fp8=True).pipe
    assert seen == [("cuda", torch.float8_e4m3fn)]
    assert "attention: native" in caplog.text and "offload none" in caplog.text
    assert caplog.text.count("stored as float8") == 2


# ---------------------------------------------------------------------------------- measure_wan


def test_each_option_is_a_row_a_failure_too_and_the_next_start_measures_only_that_again(
        tmp_path, capsys, caplog, monkeypatch):
    pytest.importorskip("skimage")
    caplog.set_level(logging.INFO, "collabvr")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    budget = "24 GB: fp8, group offload"
    rows = [x for k in ("plain", "cache 0.05", budget) for x in ("--row", k)]
    for start in range(2):
        assert measure_wan.main([*rows, "--out", str(tmp_path)]) == 0
        said = capsys.readouterr().out
        table = {x[:25].strip(): x[25:].split() for x in said.splitlines()}
        seconds, hourly, _, skipped, ssim, psnr = table["cache 0.05"]
        assert float(hourly.replace(",", "")) == pytest.approx(3600 / float(seconds), rel=0.05)
        assert 0 <= float(skipped) < 1 and float(ssim) > 0.9 and float(psnr) > 20
        assert table["plain"][2:] == ["-"] * 4
        assert f"{budget}: a budget of GPU memory needs a GPU" in said
        assert caplog.text.count("---- cache") == 1
        assert caplog.text.count(f"---- {budget}") == start + 1
    assert "No CUDA GPU: a tiny model" in caplog.text


def test_a_budget_of_memory_holds_for_its_row_only(card, tmp_path, capsys):
    pytest.importorskip("skimage")
    names = ["24 GB: fp8, model offload", "24 GB: fp8, group offload", "plain"]
    rows = [x for name in names for x in ("--row", name)]
    assert measure_wan.main(["--small", *rows, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "on Card" in said and said.count("5.000") == 3
    group = torch.device("cuda")
    assert card == [("to", "cpu"), ("share", 0.75), ("enable_model_cpu_offload",), ("share", 1.0),
                    ("to", "cpu"), ("share", 0.75), ("enable_group_offload", group), ("share", 1.0),
                    ("to", "cuda"), ("share", 1.0)]


def test_a_made_up_wan_is_what_its_checkpoint_would_be(two):
    wan = FastWan(vgm="random")
    wan.pipe = measure_wan.random_wan(measure_wan.TINY)
    wan.place(wan.pipe)
    assert (clip(wan) == clip(FastWan(vgm=two))).all()
    with torch.device("meta"):  # and an expert of the big one has A14B's 14.3 billion
            expert = diffusers.WanTransformer3DModel(in_channels=36, **measure_wan.A14B["expert"])
    assert round(sum(x.numel() for x in expert.parameters()) / 1e9, 1) == 14.3
