"""Tests of cosmos.py: the real pipeline with tiny random parts. The guardrail's weights have to be
asked for, so a stand-in takes its place."""

import importlib.machinery
import importlib.util
import os
import shutil
import sys
import types

import numpy as np
import pytest

import collabvr as c
from examples.models import cosmos

FRAME = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)


class Guardrail:
    """Refuses what speaks of weapons, pixelates nothing, and notes what it is asked."""

    def to(self, device):
        pass

    def check_text_safety(self, prompt):
        asked.append(prompt)
        return "weapon" not in prompt

    def check_video_safety(self, frames):
        asked.append(frames.shape)
        return frames


asked: list = []


def save_tiny(folder):
    """Saves a Cosmos-Predict-2.5 of 0.1 M random weights, with a tokenizer of bytes."""
    import diffusers
    import tokenizers
    import torch
    import transformers as hf

    torch.manual_seed(0)
    words = ["<pad>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    letters = tokenizers.Tokenizer(tokenizers.models.BPE({x: i for i, x in enumerate(words)}, []))
    letters.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content[0].text }}{% endfor %}"
    text_encoder = hf.Qwen2_5_VLForConditionalGeneration(hf.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(words), "hidden_size": 16, "intermediate_size": 16,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6,
                                "mrope_section": [1, 1, 2]}},
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
                       "out_hidden_size": 16}))
    transformer = diffusers.CosmosTransformer3DModel(
        in_channels=17, num_attention_heads=2, attention_head_dim=16, num_layers=2, mlp_ratio=2,
        text_embed_dim=32, adaln_lora_dim=4, max_size=(4, 32, 32), use_crossattn_projection=True,
        crossattn_proj_in_channels=2 * 16, encoder_hidden_states_channels=32,
        extra_pos_embed_type=None)
    vae = diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                                     temperal_downsample=[False, True, True])
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    pipe = diffusers.Cosmos2_5_PredictBasePipeline(
        text_encoder, tokenizer, transformer, vae, scheduler, Guardrail())
    pipe.register_modules(safety_checker=None)  # as in a checkpoint: made when it is loaded
    pipe.save_pretrained(folder)


slow = pytest.mark.skipif(not os.environ.get("COLLABVR_SLOW"), reason="set COLLABVR_SLOW=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cosmos")
    save_tiny(folder)
    return str(folder)


@pytest.fixture
def packages(monkeypatch):
    """As if cosmos-guardrail and torchvision were installed, where they are not."""
    for name in ("cosmos_guardrail", "torchvision"):
        if importlib.util.find_spec(name) is None:
            stub = types.ModuleType(name)
            stub.__spec__ = importlib.machinery.ModuleSpec(name, None)
            monkeypatch.setitem(sys.modules, name, stub)


@pytest.fixture
def tiny(folder, packages, monkeypatch):
    """The folder. Guardrail takes the place of the real one; diffusers uses two functions of
    torchvision."""
    import torch
    from diffusers.models.transformers import transformer_cosmos
    from diffusers.pipelines.cosmos import pipeline_cosmos2_5_predict as pipeline
    from torch.nn.functional import interpolate
    monkeypatch.setattr(pipeline, "CosmosSafetyChecker", Guardrail)
    monkeypatch.setattr(cosmos, "AREA", 96 * 64)
    asked.clear()
    if not hasattr(pipeline, "torchvision"):
        functional = types.SimpleNamespace(
            to_tensor=lambda image: torch.tensor(np.array(image) / 255).movedim(-1, 0).float(),
            resize=lambda x, size, interpolation: interpolate(x, size, mode=interpolation))
        stub = sys.modules["torchvision"]
        stub.transforms = types.SimpleNamespace(
            functional=functional, InterpolationMode=types.SimpleNamespace(NEAREST="nearest"))
        monkeypatch.setattr(pipeline, "torchvision", stub, raising=False)
        monkeypatch.setattr(transformer_cosmos, "transforms", stub.transforms, raising=False)
    return folder


@slow
def test_a_clip_starts_from_the_frame_and_has_4_k_plus_1_frames_of_its_shape(tiny):
    vgm = cosmos.Cosmos(vgm=tiny, sampling_steps=2)
    vgm.check()
    one, two, other = (vgm(FRAME, "Move the ball.", 0.5, seed) for seed in (5, 5, 6))
    assert one.frames.shape == (9, 64, 96, 3) and one.frames.dtype == np.uint8
    assert (one.fps, one.seconds) == (16, 0.5)
    assert (one.frames == two.frames).all() and (one.frames != other.frames).any()
    assert (one.frames[0] == other.frames[0]).mean() > 0.9  # it depends on the frame, not the noise
    assert asked[:2] == ["Move the ball.", (9, 64, 96, 3)]


@slow
def test_what_the_guardrail_refuses_is_a_failed_generation_that_says_so(tiny):
    models = c.Models(cosmos.Cosmos(vgm=tiny, sampling_steps=2), None)
    with pytest.raises(c.Problem, match="failed twice in a row .*Guardrail detected unsafe text"):
        models.generate(FRAME, "Show a weapon.", 0.5)


def test_any_picture_becomes_one_of_480p_and_a_frame_of_such_a_clip_keeps_its_size():
    assert cosmos.at_480p(832, 480) == cosmos.at_480p(416, 240) == cosmos.at_480p(1664, 960)
    rng = np.random.default_rng(0)
    for w, h in [(1024, 1024), (96, 96), (447, 447), (50, 2000), *rng.integers(16, 3000, (300, 2))]:
        if max(w, h) / min(w, h) > 50:
            continue
        size = cosmos.at_480p(w, h)
        assert size == cosmos.at_480p(*size)
        assert size[0] % 16 == size[1] % 16 == 0 and 0.5 <= size[0] * size[1] / (832 * 480) <= 1
        assert 0.5 < size[0] / size[1] * h / w < 2


@pytest.mark.parametrize("missing", ["cosmos_guardrail", "torchvision"])
def test_a_missing_package_gets_one_sentence(packages, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(c.Problem, match=f"^{missing} is needed: pip install cosmos"):
        cosmos.Cosmos().check()


def test_without_a_gpu_the_big_checkpoint_is_refused(packages, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(c.Problem, match="needs a CUDA GPU"):
        cosmos.Cosmos().check()


@slow
def test_weights_come_from_safetensors_only(tiny, tmp_path):
    broken = shutil.copytree(tiny, tmp_path / "cosmos")
    (broken / "vae" / "diffusion_pytorch_model.safetensors").rename(
        broken / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(c.Problem, match="cannot be loaded"):
        _ = cosmos.Cosmos(vgm=str(broken)).pipe


def test_the_settings_that_change_a_clip_are_its_identity():
    default = cosmos.Cosmos()
    assert (default.fps, default.sampling_steps, default.guidance_scale) == (16, 36, 7)
    assert default.identity == cosmos.Cosmos(offload="group").identity
    assert default.identity != cosmos.Cosmos(revision="other").identity
    with pytest.raises(ValueError, match="sampling_steps"):
        cosmos.Cosmos(sampling_steps=0)


def test_on_the_command_line_a_missing_package_stops_before_anything_is_paid_for(
        packages, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    c.write_file(tmp_path / "x.png", c.iio.imwrite("<bytes>", FRAME, extension=".png"))
    options = ["--image", "x.png", "--task", "q", "--seconds-first", "5", "--seconds-next", "5"]
    assert c.main(cosmos.Cosmos, options) == 2
    assert "torchvision is needed: pip install cosmos" in capsys.readouterr().err
