"""Tests of fast_wan.py and measure_wan.py on a CPU, with tiny random checkpoints of two experts and
of one: every option does what it says, or says why it cannot."""

import logging
import os
import pickle
import shutil
import sys
import types

import diffusers
import numpy as np
import pytest
import torch

import collabvr as c
from examples.models import measure_wan
from examples.models.fast_wan import FastWan
from examples.models.float8 import Float8Linear, store_in_8_bits

pytestmark = pytest.mark.skipif(not os.environ.get("COLLABVR_SLOW"), reason="set COLLABVR_SLOW=1")
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


@pytest.fixture(scope="module")
def plain(two):
    """A clip without options."""
    return clip(FastWan(vgm=two))


def clip(vgm, seed=0):
    return vgm(FRAME, "Move the ball.", 0.25, seed).frames


def test_without_options_it_is_wan(two, plain):
    assert FastWan().identity == c.Wan().identity | {
        "fp8": False, "fp8_matmul": False, "cache_low": 0, "cache_high": 0, "compile": False,
        "attention": "auto", "lora_high": "", "lora_low": ""}
    ours, theirs = plain, clip(c.Wan(vgm=two))
    assert ours.shape == (5, 32, 48, 3) and (ours == theirs).all()


def test_settings_that_make_no_sense_are_refused_with_their_names():
    for wrong in ({"fp8": "perhaps"}, {"cache_low": 1.5}, {"cache": 0.1}, {"sampling_steps": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FastWan(**wrong)


def test_the_cache_skips_blocks_of_the_low_noise_expert_only_and_says_how_often(
        two, plain, caplog):
    caplog.set_level(logging.INFO, "collabvr")
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
    assert f"low-noise expert: {100 * share:.0f} % of 28 passes ended after" in caplog.text
    assert "high-noise" not in caplog.text
    assert (cached != plain).any()


def test_a_failed_clip_leaves_nothing_in_the_cache(two, monkeypatch):
    vgm = FastWan(vgm=two, cache_low=0.5)
    fresh = clip(vgm)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(vgm.pipe.vae, "decode", full)
        with pytest.raises(RuntimeError, match="out of GPU memory: try --offload group"):
            clip(vgm, seed=1)
    assert (clip(vgm) == fresh).all()


def test_fp8_halves_the_blocks_weights_and_keeps_norms_and_scales(two, plain, caplog):
    caplog.set_level(logging.INFO, "collabvr")
    vgm = FastWan(vgm=two, fp8=True)
    for expert in (vgm.pipe.transformer, vgm.pipe.transformer_2):
        block = expert.blocks[1]
        assert block.attn1.to_q.weight.dtype == block.ffn.net[2].weight.dtype == torch.float8_e4m3fn
        assert block.norm2.weight.dtype == block.scale_shift_table.dtype == torch.float32
    assert caplog.text.count("GB in 8 bits") == 2
    change = np.abs(clip(vgm).astype(int) - plain).mean()
    assert 0 < change < 5  # of 255
    assert vgm.pipe.transformer.blocks[1].attn1.to_q.weight.dtype == torch.float8_e4m3fn


def test_fp8_matmul_multiplies_in_8_bits_what_is_near_the_true_product(two, plain):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(64, 32).to(torch.bfloat16), torch.randn(1, 48, 64).bfloat16()
    blocks = torch.nn.Sequential(layer)
    true = layer(x).detach()
    store_in_8_bits(blocks, multiply=True)
    assert type(blocks[0]) is Float8Linear
    error = (blocks(x) - true).abs().mean() / true.abs().mean()
    assert 0 < error < 0.05
    change = np.abs(clip(FastWan(vgm=two, fp8_matmul=True)).astype(int) - plain)
    assert 0 < change.mean() < 5  # of 255


def test_a_gpu_that_cannot_multiply_in_8_bits_is_refused_before_anything_is_loaded(
        two, card, monkeypatch):
    FastWan(vgm=two, fp8_matmul=True).check()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    with pytest.raises(c.Problem, match="Card cannot multiply in 8 bits: use --fp8 in place"):
        FastWan(vgm=two, fp8_matmul=True).check()
    FastWan(vgm=two, fp8=True).check()


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
        _ = FastWan(vgm=two, lora_high=good).pipe
    with pytest.raises(c.Problem, match="has one expert"):
        _ = FastWan(vgm=one, lora_high=good).pipe
    for path in (foreign, tmp_path / "pickle.safetensors", tmp_path / "none.safetensors"):
        with pytest.raises(c.Problem, match=f"{path.name} is no LoRA of the low-noise expert"):
            _ = FastWan(vgm=two, lora_high=good, lora_low=str(path)).pipe


def test_a_scheduler_that_the_loras_cannot_have_gets_one_sentence(two, tmp_path):
    pytest.importorskip("peft", reason="LoRAs need peft: pip install -r examples/requirements.txt")
    euler = shutil.copytree(two, tmp_path / "euler")
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(euler / "scheduler")
    index = (euler / "model_index.json").read_text()
    (euler / "model_index.json").write_text(
        index.replace("UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"))
    lora = write_lora(tmp_path / "lora.safetensors", 1)
    with pytest.raises(c.Problem, match="FlowMatchEulerDiscreteScheduler has no flow_shift"):
        _ = FastWan(vgm=str(euler), lora_high=lora, lora_low=lora).pipe


def test_without_peft_a_lora_gets_one_sentence(two, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(c.Problem, match="peft is needed: pip install"):
        FastWan(vgm=two, lora_high="a", lora_low="b").check()


def test_one_expert_works_with_sides_of_32_and_refuses_what_would_have_no_effect(one, caplog):
    vgm = FastWan(vgm=one, fps=24, fp8=True, cache_low=0.5)
    made = vgm(np.zeros((80, 100, 3), np.uint8), "Move the ball.", 0.34, 0)
    assert made.frames.shape == (9, 64, 96, 3) and made.fps == 24
    assert vgm.passes["low-noise", 0] == 2 * 20 > vgm.passes["low-noise", 1]
    assert vgm.pipe.transformer.blocks[0].ffn.net[2].weight.dtype == torch.float8_e4m3fn
    assert "trained at" not in caplog.text
    _ = FastWan(vgm=one).pipe
    assert "trained at 24 frames per second, not 16" in caplog.text
    with pytest.raises(c.Problem, match="has one expert: lora_low and cache_low"):
        _ = FastWan(vgm=one, cache_high=0.1).pipe


def test_an_attention_backend_that_is_not_there_gets_one_sentence(two, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "collabvr")
    for name in ("flashier", "_flash_3"):
        with pytest.raises(c.Problem, match=f"attention={name} cannot be used"):
            _ = FastWan(vgm=two, attention=name).pipe
    _ = FastWan(vgm=two).pipe
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
            "reset_peak_memory_stats": None, "synchronize": None}.items():
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
    _ = FastWan(vgm=two, fp8=True, offload="none").pipe
    assert seen == [("cuda", torch.float8_e4m3fn)]
    assert "attention: native" in caplog.text
    assert caplog.text.count("GB in 8 bits") == 2


# ------------------------------------------------------------------------------
# measure_wan


def test_each_option_is_a_row_a_failure_too_and_the_next_start_measures_only_that_again(
        tmp_path, capsys, caplog, monkeypatch):
    pytest.importorskip("skimage")
    caplog.set_level(logging.INFO, "collabvr")
    budget = "24 GB: 8-bit weights, group offload"
    rows = ["--row", "diffusers' defaults", "cache", budget]
    for start in range(2):
        argv = ["seconds", "--steps", "2", "--out", str(tmp_path), *rows]
        assert measure_wan.main(argv) == 0
        said = capsys.readouterr().out
        table = {x[:len(budget)].strip(): x[len(budget):].split() for x in said.splitlines()}
        for name in ("diffusers' defaults", "cache"):
            step, steps, peak, seconds, hourly, _, skipped = table[name]
            assert steps == "2" and peak == "-", "memory is the GPU's"
            assert float(hourly.replace(",", "")) == pytest.approx(3600 / float(seconds), rel=0.05)
            assert float(seconds) > 20 * float(step)
        assert table["diffusers' defaults"][5:] == ["1.000", "-"]
        assert 0 < float(skipped) < float(step), "of the cache"
        assert f"{budget}: Problem: a budget of GPU memory needs a GPU" in said
        assert "s for two prompts" in said
        assert caplog.text.count("---- cache") == 1
        assert caplog.text.count(f"---- {budget}") == start + 1
    assert "No CUDA GPU: a tiny model" in caplog.text


def test_no_row_is_begun_after_the_time(tmp_path, capsys):
    pytest.importorskip("skimage")
    assert measure_wan.main(["seconds", "--minutes", "0", "--out", str(tmp_path)]) == 1
    assert "s/step" in capsys.readouterr().out
    (file,) = tmp_path.iterdir()
    assert not file.read_text()


def test_a_budget_of_memory_holds_for_its_row_only(card, tmp_path, capsys, monkeypatch):
    pytest.importorskip("skimage")
    monkeypatch.setattr(measure_wan, "device", lambda: "cpu")
    rows = ["24 GB: 8-bit weights, group offload", "diffusers' defaults"]
    argv = ["seconds", "--small", "--steps", "1", "--out", str(tmp_path), "--row", *rows]
    assert measure_wan.main(argv) == 0
    said = capsys.readouterr().out
    assert "Card, PyTorch" in said and said.count("5.000") == 2
    group = torch.device("cuda")
    free = ("share", 1.0)
    assert card == [free, free, ("share", 0.75), ("enable_group_offload", group), free,
                    ("to", "cuda"), free]


def test_clips_are_compared_with_those_of_no_option(two, tmp_path, capsys):
    pytest.importorskip("skimage")
    c.write_file(tmp_path / "x.png", c.iio.imwrite("<bytes>", FRAME, extension=".png"))
    argv = ["likeness", "--vgm", two, "--image", str(tmp_path / "x.png"), "--seconds", "0.5",
            "--sampling-steps", "4", "--out", str(tmp_path / "out"), "--row"]
    assert measure_wan.main([*argv, "8-bit weights", "cache 0.2"]) == 0
    table = {x[:13].strip(): x[13:].split() for x in capsys.readouterr().out.splitlines()}
    clips, seconds, skipped, ssim, least, psnr = table["8-bit weights"]
    assert clips == "1" and skipped == "-" and float(seconds) > 0
    assert 0.9 < float(ssim) <= 1 and ssim == least and 20 < float(psnr) < 100
    assert 0 <= float(table["cache 0.2"][2]) < 1


def test_equal_pictures_have_100_dB():
    black = np.zeros((8, 8, 3), np.uint8)
    assert measure_wan.psnr(black, black) == 100
    assert measure_wan.psnr(black, black + 255) == 0


def test_what_is_missing_gets_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    assert measure_wan.main(["likeness", "--out", str(tmp_path)]) == 2
    assert "skimage.metrics is needed: pip install" in capsys.readouterr().err


def test_a_made_up_wan_is_what_its_checkpoint_would_be(plain):
    wan = FastWan(vgm="random")
    wan.pipe = measure_wan.random_wan(measure_wan.TINY)
    wan.place(wan.pipe)
    assert (clip(wan) == plain).all()
    with torch.device("meta"):  # and an expert of the big one has A14B's 14.3 billion
        expert = diffusers.WanTransformer3DModel(in_channels=36, **measure_wan.A14B["expert"])
    assert round(sum(x.numel() for x in expert.parameters()) / 1e9, 1) == 14.3
