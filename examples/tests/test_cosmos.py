"""cosmos.py: the real pipeline with tiny random parts. The guardrail's weights have to be asked
for, so a stand-in takes its place."""

import importlib.machinery
import importlib.util
import sys
import types

import numpy as np
import pytest

import collabvr as c
from examples.models import cosmos

FRAME = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
asked: list = []


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
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    text_encoder = hf.Qwen2_5_VLForConditionalGeneration(hf.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(words), "hidden_size": 16, "intermediate_size": 16,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
            "rope_parameters": rope},
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
            "out_hidden_size": 16}))
    transformer = diffusers.CosmosTransformer3DModel(
        in_channels=17, num_attention_heads=2, attention_head_dim=16, num_layers=2, mlp_ratio=2,
        text_embed_dim=32, adaln_lora_dim=4, max_size=(4, 32, 32), use_crossattn_projection=True,
        crossattn_proj_in_channels=2 * 16, encoder_hidden_states_channels=32,
        extra_pos_embed_type=None)
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True])
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    pipe = diffusers.Cosmos2_5_PredictBasePipeline(
        text_encoder, tokenizer, transformer, vae, scheduler, Guardrail())
    pipe.register_modules(safety_checker=None)  # as in a checkpoint: made when it is loaded
    pipe.save_pretrained(folder)


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
    """Cosmos with the tiny checkpoint. Guardrail takes the place of the real one, and two functions
    of torchvision's that diffusers calls are made up."""
    import torch
    from diffusers.models.transformers import transformer_cosmos
    from diffusers.pipelines.cosmos import pipeline_cosmos2_5_predict as pipeline
    from torch.nn.functional import interpolate

    monkeypatch.setattr(pipeline, "CosmosSafetyChecker", Guardrail)
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
    return cosmos.Cosmos(vgm=folder, sampling_steps=2, max_pixels=96 * 64)


@pytest.mark.slow
def test_a_clip_starts_from_the_frame(tiny):
    """It has 4k + 1 frames of its shape, and depends on the seed."""
    one, two, other = (tiny(FRAME, "Move the ball.", 0.5, seed) for seed in (5, 5, 6))
    assert one.frames.shape == (9, 64, 96, 3) and one.frames.dtype == np.uint8
    assert (one.fps, one.seconds) == (16, 0.5)
    assert (one.frames == two.frames).all() and (one.frames != other.frames).any()
    assert (one.frames[0] == other.frames[0]).mean() > 0.9  # of the frame, not of the noise
    assert asked[:2] == ["Move the ball.", (9, 64, 96, 3)]
    tiny.negative_prompt = "blurred"
    assert (tiny(FRAME, "Move the ball.", 0.5, 5).frames != one.frames).any()


@pytest.mark.slow
def test_what_the_guardrail_refuses_is_a_failure(tiny):
    with pytest.raises(c.Problem, match="failed twice in a row .*Guardrail detected unsafe text"):
        c.Models(tiny, None).generate(FRAME, "Show a weapon.", 0.5)


def test_any_picture_becomes_one_of_480p():
    """And a frame of such a clip keeps its size."""
    area = 832 * 480
    for size in ((832, 480), (416, 240), (1664, 960)):
        assert cosmos.at_area(*size, area) == (832, 480)
    rng = np.random.default_rng(0)
    for w, h in [(1024, 1024), (96, 96), (447, 447), *rng.integers(64, 3000, (300, 2)).tolist()]:
        size = cosmos.at_area(w, h, area)
        assert size == cosmos.at_area(*size, area)
        assert size[0] % 16 == size[1] % 16 == 0 and 0.5 <= size[0] * size[1] / area <= 1
        assert 0.5 < size[0] / size[1] * h / w < 2


@pytest.mark.parametrize("missing", ["cosmos_guardrail", "torchvision"])
def test_a_missing_package_gets_one_sentence(packages, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(c.Problem, match=f"^{missing} is needed: pip install cosmos"):
        cosmos.Cosmos().check()


def test_what_cannot_work_is_refused_at_the_start(packages, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(c.Problem, match="needs a CUDA GPU"):
        cosmos.Cosmos().check()
    with pytest.raises(c.Problem, match="no --flow-shift"):
        cosmos.Cosmos(flow_shift=3).check()


def test_settings_that_change_clips_are_its_identity():
    default = cosmos.Cosmos()
    assert (default.fps, default.sampling_steps, default.guidance_scale) == (16, 36, 7)
    assert default.identity == cosmos.Cosmos(offload="group").identity
    assert default.identity != cosmos.Cosmos(revision="other").identity
