"""Makes a Qwen3-VL of random weights that knows bytes, pictures and videos, in about a megabyte:

    python random_vlm.py FOLDER    # with vLLM's own transformers and torchvision
"""

import sys

import tokenizers
import transformers as hf

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>", "<think>", "</think>",
]
LETTERS = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())  # one for each byte
IDS = {word: number for number, word in enumerate(LETTERS + SPECIAL)}

TEMPLATE = """\
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content %}
{%- if 'image' in part.type %}<|vision_start|><|image_pad|><|vision_end|>
{%- elif 'video' in part.type %}<|vision_start|><|video_pad|><|vision_end|>
{%- else %}{{ part.text }}{% endif %}
{%- endfor %}{% endif %}<|im_end|>
{% endfor %}<|im_start|>assistant
<think>{% if enable_thinking is defined and not enable_thinking %}</think>{% endif %}"""


def tokenizer():
    bytewise = tokenizers.Tokenizer(tokenizers.models.BPE(IDS, []))
    bytewise.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = tokenizers.decoders.ByteLevel()
    return hf.Qwen2TokenizerFast(
        tokenizer_object=bytewise, unk_token=None, eos_token="<|im_end|>",
        pad_token="<|endoftext|>", additional_special_tokens=SPECIAL[1:7])


def main(folder: str):
    size = {"shortest_edge": 32 * 32, "longest_edge": 96 * 96}
    words = tokenizer()
    words.chat_template = TEMPLATE
    processor = hf.Qwen3VLProcessor(
        hf.Qwen2VLImageProcessor(patch_size=16, size=size), words,
        hf.Qwen3VLVideoProcessor(patch_size=16, size=size), chat_template=TEMPLATE)
    processor.save_pretrained(folder)
    hf.set_seed(0)
    config = hf.Qwen3VLConfig(
        text_config={
            "vocab_size": len(IDS), "hidden_size": 128, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 32, "max_position_embeddings": 65536,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e6, "mrope_section": [6, 5, 5],
                "mrope_interleaved": True},
            "bos_token_id": IDS["<|endoftext|>"], "eos_token_id": IDS["<|im_end|>"],
        },
        vision_config={
            "depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2,
            "out_hidden_size": 128, "patch_size": 16, "deepstack_visual_indexes": [0],
            "num_position_embeddings": 64},
        image_token_id=IDS["<|image_pad|>"], video_token_id=IDS["<|video_pad|>"],
        vision_start_token_id=IDS["<|vision_start|>"], vision_end_token_id=IDS["<|vision_end|>"])
    hf.Qwen3VLForConditionalGeneration(config).save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1])
