"""vLLM-Omni's real routes of /v1/videos, with a painter in the engine's place:

    python omni_router.py PORT PAINTER_URL MODEL API_SERVERS    # in an environment with vllm-omni

What the engine would do, a server at PAINTER_URL does (test_routers.py has it).
"""

import asyncio
import io
import json
import sys
import types
import urllib.request

import fastapi
import numpy as np
import uvicorn
from vllm_omni.entrypoints.openai import api_server
from vllm_omni.entrypoints.openai.serving_video import OmniOpenAIServingVideo

STAGE = types.SimpleNamespace(
    stage_type="diffusion", final_output=True, final_output_type="video", diffusion_config=None,
    model_config=None, model_arch=None, engine_args={})


class Engine:
    """As much of AsyncOmni as the routes call."""

    def __init__(self, painter: str):
        self.painter = painter
        self.stage_configs = [STAGE]
        self.default_sampling_params_list = None

    async def generate(self, prompt, request_id, sampling_params_list):
        yield await asyncio.to_thread(self.paint, prompt, sampling_params_list[0])

    def paint(self, prompt, params):
        asked = {
            "prompt": prompt["prompt"], "num_frames": params.num_frames, "fps": params.fps,
            "seed": params.seed, "steps": params.num_inference_steps,
            "guidance_scale": params.guidance_scale}
        body = io.BytesIO()
        picture = np.asarray(prompt["multi_modal_data"]["image"].convert("RGB"))
        np.savez(body, picture=picture, asked=json.dumps(asked))
        with urllib.request.urlopen(self.painter, body.getvalue()) as answer:
            frames = np.load(io.BytesIO(answer.read()))
        video = frames[None].astype(np.float32) / 255  # as the pipeline's: 1, T, H, W, 3
        return types.SimpleNamespace(images=None, multimodal_output={"video": video})


class Served:
    """As /v1/models asks for it."""

    base_model_paths = ()

    def __init__(self, model: str):
        self.model = model

    async def show_available_models(self):
        listed = {"object": "list", "data": [{"id": self.model, "object": "model"}]}
        return types.SimpleNamespace(model_dump=lambda: listed)


def main(port: str, painter: str, model: str, api_servers: str):
    app = fastapi.FastAPI()
    app.include_router(api_server.router)
    app.state.api_server_count = int(api_servers)
    app.state.stage_configs = [STAGE]
    app.state.openai_serving_models = Served(model)
    app.state.openai_serving_video = OmniOpenAIServingVideo.for_diffusion(
        Engine(painter), model, [STAGE])
    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning")


if __name__ == "__main__":
    main(*sys.argv[1:])
