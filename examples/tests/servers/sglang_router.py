"""SGLang Diffusion's real routes of /v1/videos, with a painter in the scheduler's place:

    python sglang_router.py PORT PAINTER_URL MODEL FOLDER    # in an environment with sglang

What the scheduler would do, a server at PAINTER_URL does (test_routers.py has it). FOLDER is a Wan
checkpoint of diffusers: its model_index.json is read, and no weights.
"""

import asyncio
import io
import json
import sys
import types
import urllib.request

import fastapi
import numpy as np
import torch
import uvicorn
from PIL import Image
from sglang.multimodal_gen.registry import get_model_info
from sglang.multimodal_gen.runtime.entrypoints.openai import common_api, video_api
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch
from sglang.multimodal_gen.runtime.scheduler_client import async_scheduler_client
from sglang.multimodal_gen.runtime.server_args import set_global_server_args


def paint(painter: str, request) -> OutputBatch:
    asked = {
        "prompt": request.prompt, "num_frames": request.num_frames, "fps": request.fps,
        "seed": request.seed, "steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale}
    path = request.image_path
    with Image.open(path if isinstance(path, str) else path[0]) as image:
        picture = np.asarray(image.convert("RGB"))
    body = io.BytesIO()
    np.savez(body, picture=picture, asked=json.dumps(asked))
    try:
        with urllib.request.urlopen(painter, body.getvalue()) as answer:
            frames = np.load(io.BytesIO(answer.read()))
    except OSError as error:
        return OutputBatch(error=str(error))
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)  # as the pipeline's: 3, T, H, W
    return OutputBatch(output=video[None].float() / 255)


def main(port: str, painter: str, model: str, folder: str):
    info = get_model_info(folder, backend="auto", model_id="Wan2.2-I2V-A14B-Diffusers")
    set_global_server_args(types.SimpleNamespace(
        model_path=folder, served_model_name=model, model_id="Wan2.2-I2V-A14B-Diffusers",
        backend="auto", pipeline_class_name=None, pipeline_config=info.pipeline_config_cls(),
        num_gpus=1, input_save_path="inputs", output_path="outputs", enable_trace=False,
        attention_backend_config=None, batching_max_size=1, comfyui_mode=False))

    async def forward(batches, timeout_ms=None):
        return await asyncio.to_thread(paint, painter, batches[0])

    async_scheduler_client.forward = forward
    app = fastapi.FastAPI()
    app.include_router(common_api.router)
    app.include_router(video_api.router)
    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning")


if __name__ == "__main__":
    main(*sys.argv[1:])
