"""Tiny random checkpoints of the shapes that Wan's image-to-video models have."""

import json
from pathlib import Path

import torch

PIPELINE = 'raise RuntimeError("a checkpoint\'s own code was executed")\n'


def a14b(folder) -> str:
    """Wan2.2 A14B: two experts, no image encoder."""
    save(folder, transformer=expert(), transformer_2=expert(), boundary_ratio=0.9)
    return str(folder)


def ti2v_5b(folder) -> str:
    """Wan2.2 TI2V-5B as it is published: one expert that knows each token's own noise, sides in
    multiples of 32, an index that names another pipeline, and a pipeline.py beside it."""
    import diffusers

    vae = diffusers.AutoencoderKLWan(
        base_dim=8, decoder_base_dim=8, z_dim=48, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True], is_residual=True, in_channels=12, out_channels=12,
        patch_size=2, scale_factor_spatial=16, latents_mean=[0.0] * 48, latents_std=[1.0] * 48)
    one = expert(in_channels=48, out_channels=48)
    save(folder, vae, transformer=one, expand_timesteps=True)
    index = Path(folder, "model_index.json")
    found = json.loads(index.read_text())
    index.write_text(json.dumps(found | {"_class_name": "WanPipeline"}))
    Path(folder, "pipeline.py").write_text(PIPELINE)
    return str(folder)


def wan21(folder) -> str:
    """Wan2.1 I2V: one expert and a CLIP image encoder."""
    import transformers

    torch.manual_seed(1)
    clip = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=16)).to(torch.bfloat16)
    size = {"height": 32, "width": 32}
    processor = transformers.CLIPImageProcessor(size=size, crop_size=size)
    one = expert(image_dim=16, added_kv_proj_dim=32)
    save(folder, transformer=one, image_encoder=clip, image_processor=processor)
    return str(folder)


def expert(**settings):
    """A transformer of 0.1 million random weights, in bf16 as it is loaded."""
    import diffusers

    config = {
        "num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 32, "freq_dim": 32,
        "ffn_dim": 64, "num_layers": 4, "in_channels": 36}
    return diffusers.WanTransformer3DModel(**config | settings).to(torch.bfloat16)


def save(folder, vae=None, **parts) -> None:
    """Saves a pipeline of these parts, and of others that every shape has."""
    import diffusers
    import tokenizers
    import transformers

    words = {"<pad>": 0, "x": 1, "Move": 2, "the": 3, "ball.": 4, "blurred": 5}
    model = tokenizers.models.WordLevel(words, unk_token="x")
    letters = tokenizers.Tokenizer(model)
    letters.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", unk_token="x", model_max_length=16)
    text_encoder = transformers.UMT5EncoderModel(transformers.UMT5Config(
        vocab_size=8, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).to(torch.bfloat16)
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    vae = vae or diffusers.AutoencoderKLWan(base_dim=8, num_res_blocks=1)
    diffusers.WanImageToVideoPipeline(
        tokenizer, text_encoder, vae, scheduler, **parts).save_pretrained(folder)


SHAPES = {"a14b": a14b, "ti2v_5b": ti2v_5b, "wan21": wan21}
