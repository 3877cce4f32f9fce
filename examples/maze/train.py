"""Train tiny-wan, the maze world's video generator, from nothing:
`python examples/maze/train.py --work runs/train`.

The result is a diffusers folder that `WanImageToVideoPipeline` loads: Wan's own VAE, transformer,
text encoder and scheduler classes, only very small. Three stages, each resumable (start the same
command again): the VAE learns to compress maze clips, a data set of latents is computed once, the
transformer learns rectified flow on it. Its training set has a short horizon, as real generators
have: single moves, and whole tasks of one or two straight segments. A CUDA GPU is used if there is
one. At the end it prints how often unseen clips come out right; with --check it does only that.
"""
from __future__ import annotations

import argparse
import copy
import functools
import math
import time
from pathlib import Path

import numpy as np
import torch
import world
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_FRAMES = 17  # 2 s at 8 fps
# cells a side, whole clips in a batch of the VAE: about equal pixels
BATCHES = [(4, 6), (5, 4), (6, 3), (7, 2), (8, 2)]
KEPT = ["inside the corridor", "one whole circle"]  # what a correction may ask for
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"]


# ---------------------------------------------------------------------------- what it is trained on


def example(n: int, rng: np.random.Generator, horizon: int = 2):
    """One training clip: (maze, path, prompt).

    The path is what the prompt asks for; it may start between two cells. Two thirds are single
    moves, half of these with a correction after them, as `evolve` makes them; the rest are whole
    tasks of at most `horizon` straight segments.
    """
    look = training_look(rng)
    colour, goal = world.colour_word(look.circle), world.colour_word(look.goal)
    thing = f"the {colour} {rng.choice(['circle', 'circle', 'circle', 'ball', 'dot'])}"
    if rng.random() < 1 / 3:
        while True:
            maze = world.make(n, int(rng.integers(1, horizon + 1)), rng, look)
            path = world.shortest_path(maze.open, maze.start, maze.goal)
            if len(path) <= 9:
                return maze, path, task_prompt(thing, goal, rng)
    maze = world.make(n, None, rng, look)
    cells = [tuple(map(int, c)) for c in np.argwhere(maze.open)]
    while True:
        start, direction = cells[rng.integers(len(cells))], str(rng.choice(list(world.MOVES)))
        run = free_run(maze.open, start, direction)
        if run > rng.integers(4):  # long moves are rarer in a maze, not less wanted
            break
    k = int(rng.integers(1, run + 1))
    move, back = np.array(world.MOVES[direction]), 0.0
    end = tuple(np.add(start, k * move))
    asked = k
    if rng.random() < 0.3 and k < 7:
        # what regen and partial re-generation ask for: the rest of a move
        back = rng.uniform(-0.5, 0.5)  # a little before or after the cell's centre
        asked = min(k + int(rng.integers(0, 3)), 7)
    beside = start + move * int(np.sign(back))
    begin = tuple(np.add(start, back * move)) if world.is_open(maze.open, beside) else start
    stands = rng.random() < 0.3 or maze.goal == start  # arriving on the goal is the hardest move
    maze = world.Maze(maze.open, start, end if stands else maze.goal, look)
    stop_at = goal if end == maze.goal else None
    prompt = move_prompt(thing, direction, k, asked, k == run, stop_at, rng)
    return maze, [begin, end], prompt


def training_look(rng: np.random.Generator) -> world.Look:
    """A random look, most in colours of no list, so that shapes and not colours say what is what;
    dark floors more often than the palettes have them, because a circle on them is the hardest to
    learn."""
    dark = rng.random() < 0.3
    while True:
        look = world.make_look(rng, free=0.6)
        if not dark or sum(look.floor) <= 300:
            return look


def free_run(open, cell, direction) -> int:
    """How many corridor cells lie ahead of a cell before a wall."""
    k, move = 0, np.array(world.MOVES[direction])
    while world.is_open(open, tuple(cell + (k + 1) * move)):
        k += 1
    return k


def task_prompt(thing, goal, rng) -> str:
    """A whole task in varied words, some with a correction after them."""
    text = str(rng.choice([
        f"Move {thing} to the {goal} square.",
        f"Move {thing} through the maze to the {goal} square without crossing walls.",
        f"Move {thing} along the corridors to the {goal} goal.",
        f"Solve the maze: bring {thing} to the {goal} square and stop there.",
    ]))
    if rng.random() < 0.2:
        text += f" Correction: Move {thing} to the {goal} square and keep it {rng.choice(KEPT)}."
    return text


def move_prompt(thing, direction, k, asked, at_wall, goal, rng) -> str:
    """A single move in varied words; where corrections follow, it is the last one that counts."""

    def far(count):
        number = str(count) if rng.random() < 0.7 else WORDS[count]
        cells = f"{number} {'cell' if count == 1 else 'cells'}"
        plain = direction in ("up", "down") or rng.random() < 0.5
        side = direction if plain else f"to the {direction}"
        return f"{direction} {cells}" if rng.random() < 0.6 else f"{cells} {side}"

    tail = str(rng.choice(["", "", " Nothing else moves.", " It stays inside the corridor.",
                           " The walls do not change."]))
    if asked == k and rng.random() < 0.12 and (at_wall or goal):
        end = "wall" if at_wall else f"{goal} square"
        return f"Move {thing} {direction} until the {end}.{tail}"
    text = f"{rng.choice(['Move', 'Move', 'Slide'])} {thing} {far(asked)}.{tail}"
    for _ in range(rng.choice([0, 1, 2, 3], p=[0.55, 0.25, 0.12, 0.08])):
        wrong = rng.choice([m for m in range(8) if m != asked]
                           + [d for d in world.MOVES if d != direction])
        fix = rng.choice([f", not {wrong}", f", not {wrong}", f" and keep it {rng.choice(KEPT)}",
                          " without a jump"])
        text += f" Correction: Move {thing} {far(asked)}{fix}."
    if asked != k:
        text += f" Correction: From here move {thing} {far(k)} and stop."
    return text


def frames_of(maze, path) -> torch.Tensor:
    """The clip in -1..1, float32 (3, 17, H, W)."""
    film = torch.from_numpy(world.film(maze, path, NUM_FRAMES))
    return film.permute(3, 0, 1, 2).float() / 127.5 - 1


# ---------------------------------------------------------------------------------------- training


ADAM = functools.partial(torch.optim.AdamW, betas=(0.9, 0.98), weight_decay=0.01)
MUON = functools.partial(torch.optim.Muon, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")


class Run:
    """A stage of training: optimizers, cosine schedule, moving average and a checkpoint every few
    minutes.

    optimizers: per optimizer its peak learning rate, its class, and the parameters it takes (None:
    all).
    """

    def __init__(self, name, modules: torch.nn.Module, iterations, optimizers, work: Path):
        self.path, self.modules, self.iterations = work / f"{name}.pt", modules, iterations
        self.average = copy.deepcopy(modules).requires_grad_(False)
        self.optimizers = [(lr, kind(list(parameters or modules.parameters()), lr=lr))
                           for lr, kind, parameters in optimizers]
        self.i, self.saved = 0, time.monotonic()
        if self.path.exists():
            state = torch.load(self.path, "cpu", weights_only=True)
            modules.load_state_dict(state["modules"])
            self.average.load_state_dict(state["average"])
            for (_, optimizer), old in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(old)
            self.i = state["i"]

    def steps(self):
        """Iteration numbers that are still to be done."""
        with tqdm(total=self.iterations, initial=self.i, desc=self.path.stem,
                  mininterval=10) as self.bar:
            while self.i < self.iterations:
                yield self.i
                self.i += 1
                self.bar.update()
                if time.monotonic() - self.saved > 120:
                    self.save()
        self.save()

    def step(self, loss):
        """One update, the moving average included."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        warm = min(1, (self.i + 1) / 100)
        cosine = 0.5 + 0.5 * math.cos(math.pi * self.i / self.iterations)
        for lr, optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * warm * (0.02 + 0.98 * cosine)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(0.998, (self.i + 1) / (self.i + 20))
        with torch.no_grad():
            for a, p in zip(self.average.parameters(), self.modules.parameters()):
                a.lerp_(p, 1 - decay)
        self.bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)

    def save(self):
        state = {"modules": self.modules.state_dict(), "average": self.average.state_dict(),
                 "optimizers": [o.state_dict() for _, o in self.optimizers], "i": self.i}
        torch.save(state, self.path.with_suffix(".tmp"))
        self.path.with_suffix(".tmp").replace(self.path)
        self.saved = time.monotonic()


def new_vae() -> AutoencoderKLWan:
    """Wan's video autoencoder: 4x in time and 8x in space as in Wan2.2 A14B, two of the 8 by
    patches; 0.67 M parameters."""
    return AutoencoderKLWan(base_dim=16, z_dim=16, dim_mult=[1, 2, 2], num_res_blocks=1,
                            temperal_downsample=[True, True], patch_size=2, in_channels=12,
                            out_channels=12)


def train_vae(args) -> AutoencoderKLWan:
    """Reconstruction in two stretches, each with its own cosine. The first learns the many colours
    from whole boards, on short pieces in large batches, then on whole clips, because a causal VAE
    that never saw 17 frames drifts after those it saw. The second looks closely at what happens:
    crops around the walk, half of which end on the goal."""
    torch.manual_seed(args.seed)
    vae = vae_stretch(args, "vae", new_vae().to(DEVICE), 2e-3)
    return vae_stretch(args, "vae-crops", vae, 1e-3).eval()


def vae_stretch(args, name: str, vae, lr: float) -> AutoencoderKLWan:
    """The moving average after `args.vae_iterations` more iterations."""
    for m in vae.modules():
        if isinstance(m, torch.nn.Conv3d):  # a quarter faster on a CPU
            m.weight.data = m.weight.data.to(memory_format=torch.channels_last_3d)
    run = Run(name, vae.requires_grad_(True), args.vae_iterations, [(lr, ADAM, None)],
              args.work)
    for i in run.steps():
        rng = np.random.default_rng([args.seed, 1 if name == "vae" else 6, i])
        share = i / args.vae_iterations
        length = NUM_FRAMES
        if name == "vae" and share < 0.65:
            length = 5 if share < 0.45 else 9
        elif name != "vae" and rng.random() < 0.3:
            length = 5
        more = NUM_FRAMES // length
        if name == "vae" or rng.random() < 0.12:  # the attention in the middle needs whole boards
            n, batch = BATCHES[rng.integers(len(BATCHES))]
            clips = [clip(*example(n, rng, horizon=3)[:2]) for _ in range(batch * more)]
        else:
            clips = [crop(rng) for _ in range(6 * more)]
        first = int(rng.integers(0, NUM_FRAMES - length + 1))
        x, weight = (torch.stack(t)[:, :, first : first + length].to(DEVICE)
                     for t in zip(*clips, strict=True))
        weight[:, :, 0] *= 1 + length / 8  # the next clip will start from a frame 0
        posterior = run.modules.encode(x).latent_dist
        error = run.modules.decode(posterior.sample(torch.Generator().manual_seed(i))).sample - x
        loss = (weight * (error.abs() + 2 * error.square())).sum() / weight.expand_as(error).sum()
        spread = posterior.mean.square() + posterior.var - 1 - posterior.logvar
        run.step(loss + 1e-4 * spread.mean())
        if (i + 1) % 250 == 0:
            run.bar.write(f"{name} {i + 1}: PSNR {psnr(run.average, args.seed):.1f} dB")
    return run.average


def clip(maze, path) -> tuple[torch.Tensor, torch.Tensor]:
    """A clip (3, 17, H, W) in -1..1, and how much each pixel of it counts (1, 17, H, W): circle and
    goal more than the board, what changes most."""
    x, look = frames_of(maze, path), maze.look
    ground = np.where(maze.open[..., None], np.float32(look.floor), np.float32(look.wall))
    ground = torch.from_numpy(ground.repeat(world.CELL, 0).repeat(world.CELL, 1)) / 127.5 - 1
    things = (x - ground.permute(2, 0, 1)[:, None]).abs().amax(0, keepdim=True) > 0.1
    return x, 1 + 8 * things.float() + 12 * moving(x).float()


def moving(x: torch.Tensor) -> torch.Tensor:
    """Which pixels of a clip (3, T, H, W) change, bool (1, T, H, W)."""
    return (x - x.mean(1, keepdim=True)).abs().amax(0, keepdim=True) > 0.05


def crop(rng, cells: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """A clip and its weights, cut to 4 x 4 cells around a place of the walk."""
    n = int(rng.integers(4, 9))
    while True:
        maze, path, _ = example(n, rng, horizon=3)
        if tuple(maze.goal) == tuple(path[-1]) or rng.random() < 0.6:
            break
    place = path[-1] if rng.random() < 0.5 else path[int(rng.integers(len(path)))]
    row, column = (int(np.clip(round(p) - rng.integers(cells), 0, n - cells)) for p in place)
    rows, columns = (slice(k * world.CELL, (k + cells) * world.CELL) for k in (row, column))
    x, weight = clip(maze, path)
    return x[:, :, rows, columns], weight[:, :, rows, columns]


@torch.no_grad()
def psnr(vae, seed, clips=5) -> float:
    """Mean PSNR (dB) over unseen clips, one of each size."""
    out = []
    for k in range(clips):
        x = frames_of(*example(4 + k % 5, np.random.default_rng([seed, 2, k]))[:2])[None].to(DEVICE)
        error = (vae.decode(vae.encode(x).latent_dist.mode()).sample - x) / 2
        out.append(-10 * math.log10(F.mse_loss(error, torch.zeros_like(error)).item()))
    return float(np.mean(out))


# ----------------------------------------------------------------------------------------- latents


@torch.no_grad()
def make_latents(args, vae) -> list[dict]:
    """The data set: per clip the latents, those of its conditioning frame, where something moves
    (bool (1, 5, 2 n, 2 n)), the prompt. Computed once, 100 a file.

    Half of the conditioning frames have been through the VAE and some noise, as the last frame of
    a generated clip has, while the target is clean: so errors do not add up from step to step.
    """
    out = []
    for part in tqdm(range(args.clips // 100), desc="latents", mininterval=10):
        path = args.work / f"latents-{part:03d}.pt"
        if not path.exists():
            rows, rng = [], np.random.default_rng([args.seed, 3, part])
            for _ in range(25):
                n = int(rng.integers(4, 9))
                examples = [example(n, rng) for _ in range(4)]
                x = torch.stack([frames_of(maze, walked) for maze, walked, _ in examples])
                x = x.to(DEVICE)
                first = x[:, :, :1].clone()
                worn = vae.decode(vae.encode(first[:2]).latent_dist.mode()).sample
                noise = torch.from_numpy(rng.standard_normal(worn.shape, dtype=np.float32))
                first[:2] = (worn + 0.03 * noise.to(DEVICE)).clamp(-1, 1)
                condition = torch.cat([first, torch.zeros_like(x[:, :, 1:])], 2)
                both = vae.encode(torch.cat([x, condition])).latent_dist.mode().half().cpu()
                rows += [{"n": n, "prompt": e[2], "x": both[i].clone(),
                          "condition": both[4 + i].clone(), "moving": latent_moving(x[i]).cpu()}
                         for i, e in enumerate(examples)]
            torch.save(rows, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
        out += torch.load(path, weights_only=True)
    return out


def latent_moving(x: torch.Tensor) -> torch.Tensor:
    """`moving` on the grid of the latents, and one step around it: a latent is 4 frames (the first
    1) of 8 x 8 pixels, and its neighbours have a share in what the decoder draws there."""
    pixels = moving(x).float()
    pixels = torch.cat([pixels[:, :1].repeat(1, 4, 1, 1), pixels[:, 1:]], 1)
    return F.max_pool3d(F.max_pool3d(pixels, (4, 8, 8)), (1, 3, 3), 1, (0, 1, 1)) > 0


def normalise(vae, rows) -> None:
    """Writes the latents' mean and deviation per channel into the VAE's configuration, where the
    pipeline reads them."""
    sample = torch.cat([r["x"].float().flatten(1) for r in rows[:1000]], 1)
    vae.register_to_config(latents_mean=sample.mean(1).tolist(), latents_std=sample.std(1).tolist())


# ---------------------------------------------------------------------------- text and transformer


def new_tokenizer(prompts) -> PreTrainedTokenizerFast:
    """One token a word; prompts of up to 96 words, four corrections included."""
    splitter = pre_tokenizers.Whitespace()
    words = sorted({w for p in prompts for w, _ in splitter.pre_tokenize_str(p.lower())})
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<unk>", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), splitter
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>",
                                   model_max_length=96)


def new_denoiser(vocabulary: int) -> torch.nn.ModuleDict:
    """Wan's transformer with A14B's inputs (noise 16, mask 4, condition 16), and a two-layer text
    encoder."""
    text = UMT5Config(vocab_size=vocabulary, d_model=64, d_kv=16, d_ff=128, num_layers=2,
                      num_heads=4, dropout_rate=0.0, pad_token_id=0, decoder_start_token_id=0)
    return torch.nn.ModuleDict({
        "text_encoder": UMT5EncoderModel(text),
        "transformer": WanTransformer3DModel(
            num_attention_heads=3, attention_head_dim=64, in_channels=36, out_channels=16,
            text_dim=64, freq_dim=64, ffn_dim=768, num_layers=6, rope_max_seq_len=64),
    })


def train_denoiser(args, vae, rows):
    """Rectified flow with shift 3 on the latents, bf16 autocast; what moves counts more than what
    stands. Muon trains the matrices of the blocks, AdamW the rest."""
    torch.manual_seed(args.seed)
    tokenizer = new_tokenizer(r["prompt"] for r in rows)
    modules = new_denoiser(len(tokenizer)).to(DEVICE)
    matrices = [p for p in modules["transformer"].blocks.parameters() if p.ndim == 2]
    rest = [p for p in modules.parameters() if all(p is not m for m in matrices)]
    run = Run("denoiser", modules, args.iterations,
              [(1.5e-3, MUON, matrices), (1e-3, ADAM, rest)], args.work)
    transformer = torch.compile(modules["transformer"], dynamic=True)
    mean, std = (torch.tensor(v, device=DEVICE).view(1, 16, 1, 1, 1)
                 for v in (vae.config.latents_mean, vae.config.latents_std))
    mask = torch.zeros(1, 4, 5, 1, 1, device=DEVICE)
    mask[:, :, 0] = 1  # the conditioning frame is known
    by_size = {n: [r for r in rows if r["n"] == n] for n in range(4, 9)}
    for i in run.steps():
        rng, noise_rng = np.random.default_rng([args.seed, 4, i]), torch.Generator().manual_seed(i)
        n = int(rng.integers(4, 9))
        batch = [by_size[n][k] for k in rng.integers(0, len(by_size[n]), 864 // n**2)]
        x, condition = ((torch.stack([r[k] for r in batch]).to(DEVICE).float() - mean) / std
                        for k in ("x", "condition"))
        u = torch.rand(len(x), 1, 1, 1, 1, generator=noise_rng).to(DEVICE)
        sigma = 3 * u / (1 + 2 * u)
        noise = torch.randn(x.shape, generator=noise_rng).to(DEVICE)
        tokens = tokenizer([r["prompt"] for r in batch], padding="max_length", truncation=True,
                           max_length=96, return_tensors="pt").to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            text = run.modules["text_encoder"](tokens.input_ids, tokens.attention_mask)
            text = text.last_hidden_state * tokens.attention_mask[..., None]  # as the pipeline pads
            inputs = torch.cat([(1 - sigma) * x + sigma * noise,
                                mask.expand(len(x), -1, -1, *x.shape[3:]), condition], 1)
            flow = transformer(inputs, 1000 * sigma.flatten(), text, return_dict=False)[0]
        weight = 1 + 4 * torch.stack([r["moving"] for r in batch]).to(DEVICE).float()
        run.step((weight * (flow.float() - (noise - x)).square()).mean() / weight.mean())
        if (i + 1) % 500 == 0 and i + 1 < args.iterations:
            pipe = pipeline(vae, run.average, tokenizer)
            found = evaluate(pipe, args, 8).items()
            right = ", ".join(f"{k} {a}/{b}" for k, (a, b) in found)
            run.bar.write(f"denoiser {i + 1}: {right}")
    return pipeline(vae, run.average, tokenizer)


def pipeline(vae, modules, tokenizer) -> WanImageToVideoPipeline:
    """The parts as the pipeline that diffusers loads and saves."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True,
                                        flow_shift=3.0)
    text_encoder, transformer = modules["text_encoder"].eval(), modules["transformer"].eval()
    pipe = WanImageToVideoPipeline(tokenizer, text_encoder, vae.eval(), scheduler,
                                   transformer=transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --------------------------------------------------------------------------------- how good it is


def evaluate(pipe, args, clips: int) -> dict:
    """{kind: (right, tried)} over unseen clips. Right: the circle ends within half a cell of where
    the prompt wants it, stayed one circle, left no corridor and did not jump."""
    out = {"moves": [0, 0], "evolved moves": [0, 0],
           "1 segment": [0, 0], "2 segments": [0, 0], "3 segments": [0, 0]}
    for kind, tally in out.items():
        rng = np.random.default_rng([args.seed, 5, list(out).index(kind)])
        while tally[1] < clips:
            n = int(rng.integers(4, 9))
            if "segment" in kind:
                maze = world.make(n, int(kind[0]), rng)
                path = world.shortest_path(maze.open, maze.start, maze.goal)
                prompt = world.task(maze)
            else:
                maze, path, prompt = example(n, rng)
                if (("Correction" in prompt) != ("evolved" in kind)
                        or "ove" not in prompt.split()[0]
                        or maze.goal == path[-1] and "square" in prompt):
                    continue
            image = Image.fromarray(world.draw(maze, path[0]))
            embeds = pipe.encode_prompt(prompt, do_classifier_free_guidance=False,
                                        max_sequence_length=96)[0]
            video = pipe(image, prompt_embeds=embeds, height=n * 16, width=n * 16,
                         num_frames=NUM_FRAMES, guidance_scale=1.0,
                         num_inference_steps=args.sampling_steps,
                         generator=torch.Generator().manual_seed(tally[1])).frames[0]
            s = world.score((video * 255).round().astype(np.uint8), maze)
            near = s.end is not None and np.abs(np.subtract(s.end, path[-1])).max() < 0.5
            tally[0] += bool(near and s.one_circle and not s.left_corridors and not s.jumped)
            tally[1] += 1
    return out


def save(pipe, args) -> None:
    """The diffusers folder, weights in bf16 (the VAE too: it is read as fp32)."""
    for part in (pipe.vae, pipe.transformer, pipe.text_encoder):
        part.to(torch.bfloat16)
    pipe.save_pretrained(args.out, safe_serialization=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/train"),
                        help="folder for checkpoints and latents")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny-wan",
                        help="the finished diffusers folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-iterations", type=int, default=2700, help="of each stretch")
    parser.add_argument("--clips", type=int, default=5000,
                        help="size of the transformer's training set")
    parser.add_argument("--iterations", type=int, default=5000, help="of the transformer")
    parser.add_argument("--sampling-steps", type=int, default=12)
    parser.add_argument("--evaluate", type=int, default=100, help="unseen clips of each kind")
    parser.add_argument("--check", action="store_true",
                        help="train nothing, only evaluate what is in --out")
    args = parser.parse_args()
    if args.work.is_file() or args.out.is_file():
        parser.error("--work and --out take folders, not files")
    if not args.check:
        args.work.mkdir(parents=True, exist_ok=True)
        vae = train_vae(args).requires_grad_(False)
        rows = make_latents(args, vae)
        normalise(vae, rows)
        save(train_denoiser(args, vae, rows), args)
    pipe = WanImageToVideoPipeline.from_pretrained(
        args.out, dtype={"default": torch.bfloat16, "vae": torch.float32}).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    for kind, (right, tried) in evaluate(pipe, args, args.evaluate).items():
        print(f"{kind}: {right} of {tried} unseen clips right")


if __name__ == "__main__":
    main()
