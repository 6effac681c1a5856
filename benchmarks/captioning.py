"""Images per second of the captioner beside its ceiling, the encoder alone, on this machine's CPU or GPU.

uv run python benchmarks/captioning.py [--encoder resnet18] [--beam-size 5] [--threads 1]
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from capray.config import Architecture, Decoding
from capray.model.captioner import Captioner, autocast
from capray.vocabulary import Vocabulary


def rate(work, num_images: int, seconds: float = 5.0) -> float:
    """Images per second of ``work``, called until ``seconds`` have passed, after one call that is not counted."""
    work()
    started, calls = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        work()
        calls += 1
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return calls * num_images / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="mobilenet_v2")
    parser.add_argument("--beam-size", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=2500)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vocabulary = Vocabulary([f"w{i}" for i in range(arguments.vocabulary)])
    captioner = Captioner(Architecture(encoder=arguments.encoder), vocabulary).eval().to(device)
    decoding = Decoding(beam_size=arguments.beam_size)
    shape = (arguments.batch_size, 224, 224, 3)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)).to(device)
    print(f"{arguments.encoder} on {device}, {arguments.threads} threads, batches of {arguments.batch_size}")
    for precision in ("fp32", "bf16"):
        with torch.inference_mode(), autocast(device, precision):
            alone = rate(lambda: captioner.encode(pixels), arguments.batch_size)
            whole = rate(lambda: captioner.caption(captioner.encode(pixels), decoding), arguments.batch_size)
        print(
            f"{precision}: captioner {whole:.1f} images/s with beam {arguments.beam_size} (no caption ends early), "
            f"encoder alone {alone:.1f}: {whole / alone:.2f} of the ceiling"
        )


if __name__ == "__main__":
    main()
