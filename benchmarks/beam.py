"""Beam search alone, one thread, batches of 16, 20 steps, beside what it was in version 0.1.

    uv run python benchmarks/beam.py [--sizes tutorial mobilenet] [--rounds 5] [--bf16]

Random weights whose captions do not end, beam 5, from the encoder's native grid.
"""

from __future__ import annotations

import argparse

import torch
from earlier_search import earlier_search
from measuring import interleaved, record

from capray.config import Architecture, Decoding
from capray.model.captioner import Captioner, autocast, search
from capray.model.decoder import Decoder
from capray.model.prepared import PreparedDecoder
from capray.vocabulary import END, Vocabulary

NUM_IMAGES = 16
SIZES = {
    "tutorial": (Architecture(encoder="tiny", pool_grid=14, attention_dim=512, embed_dim=512), 2048, 8, 10_000),
    "mobilenet": (Architecture(encoder="tiny"), 1280, 7, 2_543),
}
"""Architecture, channels and side of the native grid, words. (The encoder takes no part.)"""
BARS = {"fp32": 1.5, "bf16": 1.35}


def compare(name: str, precision: str, rounds: int) -> None:
    architecture, channels, side, num_words = SIZES[name]
    torch.manual_seed(0)
    captioner = Captioner(architecture, Vocabulary([f"w{i}" for i in range(num_words)]))
    captioner.decoder = Decoder(architecture, channels, len(captioner.vocabulary))
    captioner.eval().requires_grad_(False)
    captioner.decoder.output.bias[END] = -50.0
    grid = torch.rand(NUM_IMAGES, channels, side, side).to(memory_format=torch.channels_last)
    decoding, dtype = Decoding(), torch.bfloat16 if precision == "bf16" else torch.float32
    decoder = PreparedDecoder(captioner.decoder, dtype)

    def earlier() -> object:
        with torch.inference_mode(), autocast("cpu", precision):
            return earlier_search(captioner, captioner.memory_of_cached_grid(grid), decoding)

    def now() -> object:
        memory = decoder.memory_of_grids([grid], architecture.pool_grid)
        return search(decoder, memory, captioner.vocabulary, decoding)

    seconds = interleaved({"version 0.1": earlier, "now": now}, rounds)
    reference, value = (1e3 * seconds[way] / NUM_IMAGES for way in ("version 0.1", "now"))
    bar = BARS[precision] if name == "tutorial" else None
    record(f"beam/{name}/{precision}", value, "CPU ms/image", reference, bar, quotient=reference / value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="also where the CPU has no bf16, and it is slow")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    for name in arguments.sizes:
        for precision in ("fp32", "bf16") if arguments.bf16 or has_bf16 else ("fp32",):
            compare(name, precision, arguments.rounds)


if __name__ == "__main__":
    main()
