"""Captions per second in process, JPEG bytes to captions, beside what bounds them and beside the tutorial's way.

    uv run python benchmarks/captioning.py [--encoders resnet101 mobilenet_v2] [--rounds 5] [--bf16]

One thread, beam 5, random weights. The ceiling is the encoder alone at its best: the same torchvision backbone with
BatchNorm folded, channels last, eight images at a time, weights in the precision named. JPEG decoding is in ours and not in
the ceiling. The tutorial's way takes one image at a time (`tutorial.py`), in fp32, JPEG decoding included.

Twice: 12 steps where no caption ends early; and captions that end, <end> biased so that they have about 12 tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from measuring import interleaved, record
from photos import JPEG_SIZE, photos
from tutorial import TutorialCaptioner

from capray.config import Architecture, Decoding
from capray.images import load, normalise
from capray.inference import Inference
from capray.model.captioner import Captioner
from capray.model.folding import CPU_MICRO_BATCH, fold_batchnorm
from capray.vocabulary import END, Vocabulary

ARCHITECTURES = {
    "resnet101": Architecture(encoder="resnet101", size=256, pool_grid=14, attention_dim=512, embed_dim=512),
    "mobilenet_v2": Architecture(encoder="mobilenet_v2"),
}
WORDS = {"resnet101": 10_000, "mobilenet_v2": 2_543}
BARS = {
    ("resnet101", "fp32"): 0.88,
    ("resnet101", "bf16"): 0.74,
    ("mobilenet_v2", "fp32"): 0.55,
    ("mobilenet_v2", "bf16"): 0.58,
}
TUTORIAL_BARS = {"fp32": 3.4, "bf16": 12.0}
NUM_IMAGES, NUM_STEPS = 32, 12


def build(encoder: str) -> Captioner:
    torch.manual_seed(0)
    captioner = Captioner(ARCHITECTURES[encoder], Vocabulary([f"w{i}" for i in range(WORDS[encoder])]))
    return captioner.eval().requires_grad_(False)


def with_end_bias(captioner: Captioner, bias: float, precision: str) -> Inference:
    captioner.decoder.output.bias[END] = bias
    return Inference(captioner, precision, NUM_IMAGES)


def ending_bias(captioner: Captioner, pixels: list[np.ndarray], tokens: float = 12.0) -> float:
    """The bias of <end> with which captions have about ``tokens`` tokens."""
    low, high = -20.0, 20.0
    for _ in range(12):
        middle = (low + high) / 2
        found = with_end_bias(captioner, middle, "fp32")(pixels[:8], Decoding())
        mean = float(np.mean([outcome.hypotheses[0].num_tokens for outcome in found]))
        low, high = (middle, high) if mean > tokens else (low, middle)
    return high


def compare(encoder: str, precision: str, rounds: int, with_tutorial: bool) -> None:
    captioner, jpegs = build(encoder), photos(NUM_IMAGES)
    architecture, decoding = captioner.architecture, Decoding(max_length=NUM_STEPS)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    pixels = [load(jpeg, architecture)[0] for jpeg in jpegs]
    inference = with_end_bias(captioner, -50.0, precision)
    folded = fold_batchnorm(captioner.encoder.backbone).to(dtype=dtype, memory_format=torch.channels_last)
    images = normalise(torch.from_numpy(np.stack(pixels)), architecture).to(dtype)
    peer = TutorialCaptioner(captioner.encoder.backbone, captioner.encoder.dim, WORDS[encoder]).eval()
    peer.words.bias.data[END] = -50.0

    def ceiling() -> None:
        with torch.inference_mode():
            for part in images.split(CPU_MICRO_BATCH):
                folded(part)

    def ours(inference: Inference, decoding: Decoding) -> list[np.ndarray]:
        decoded = [load(jpeg, architecture)[0] for jpeg in jpegs]
        inference(decoded, decoding)
        return decoded

    def theirs() -> None:
        for jpeg in jpegs[:2]:
            array = load(jpeg, architecture)[0]
            peer.caption(normalise(torch.from_numpy(array[None]), architecture), decoding.beam_size, NUM_STEPS)

    ways: dict[str, Callable[[], object]] = {"ours": lambda: ours(inference, decoding), "ceiling": ceiling}
    if with_tutorial:
        ways["tutorial"] = theirs
    seconds = interleaved(ways, rounds)
    rate, best = NUM_IMAGES / seconds["ours"], NUM_IMAGES / seconds["ceiling"]
    about = {"jpeg": "x".join(map(str, JPEG_SIZE)), "steps": NUM_STEPS, "reference_precision": precision}
    name, unit = f"captioning/{encoder}/{precision}", "images per CPU second"
    record(f"{name}/of the ceiling", rate, unit, best, BARS[encoder, precision], quotient=rate / best, **about)
    if with_tutorial:
        peers, bar = 2 / seconds["tutorial"], TUTORIAL_BARS[precision] if encoder == "resnet101" else None
        about |= {"reference_precision": "fp32"}
        record(f"{name}/of the tutorial's", rate, unit, peers, bar, quotient=rate / peers, **about)

    bias = ending_bias(captioner, pixels)
    for n_best in (None, 1):
        ending, wanted = with_end_bias(captioner, bias, precision), Decoding(n_best=n_best)
        steps = live_steps(ending, pixels, wanted)
        value = NUM_IMAGES / interleaved({"ours": lambda e=ending, w=wanted: ours(e, w)}, rounds)["ours"]
        about = {"n_best": n_best or wanted.beam_size, "live_image_steps_per_caption": steps}
        record(f"{name}/captions that end/n_best {n_best or 5}", value, unit, best, None, quotient=value / best, **about)


def live_steps(inference: Inference, pixels: list[np.ndarray], decoding: Decoding) -> float:
    """Steps that an image takes part in before it leaves the batch, mean."""
    decoder, counts = inference.decoder, []
    step = decoder.next_scores

    def counted(last_BK: torch.Tensor, search: object) -> object:
        counts.append(len(last_BK))
        return step(last_BK, search)

    decoder.next_scores = counted
    try:
        inference(pixels, decoding)
    finally:
        decoder.next_scores = step
    return sum(counts) / len(pixels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="also where the CPU has no bf16, and it is slow")
    parser.add_argument("--no-tutorial", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    for encoder in arguments.encoders:
        for precision in ("fp32", "bf16") if arguments.bf16 or has_bf16 else ("fp32",):
            compare(encoder, precision, arguments.rounds, not arguments.no_tutorial)


if __name__ == "__main__":
    main()
