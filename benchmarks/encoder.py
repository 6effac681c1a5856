"""The encoder on a CPU: what bf16 does to the captioner in the box, and the time of folded convolutions.

    uv run python benchmarks/encoder.py [--photos DIR] [--rounds 9]

The relative error of grids in bf16 against fp32, by torch's autocast of the encoder as it is and as capray has it, and the
share of equal captions (beam 5). CPU milliseconds an image by torch's conv2d and as capray has it, eight at a time, one
thread, from uint8 pixels, random weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from measuring import interleaved, machine
from photos import photos

from capray.config import IN_THE_BOX, Decoding, Preprocessing
from capray.images import load, normalise
from capray.inference import Inference
from capray.model.captioner_files import built_in_folder
from capray.model.checkpoint import load_captioner
from capray.model.encoder import Encoder
from capray.model.folding import FoldedEncoder, fold_batchnorm

SIZES = {"mobilenet_v2": 224, "resnet101": 256}


@torch.inference_mode()
def show_errors(jpegs: list[bytes]) -> None:
    captioner, _ = load_captioner(built_in_folder(IN_THE_BOX))
    architecture, ways = captioner.architecture, [Inference(captioner, precision) for precision in ("fp32", "bf16")]
    images = [load(jpeg, architecture)[0] for jpeg in jpegs]
    parts = [torch.from_numpy(np.stack(images[i : i + 8])) for i in range(0, len(images), 8)]
    expected, own = (torch.cat([way.encoder(part, architecture).float() for part in parts]) for way in ways)
    with torch.autocast("cpu", torch.bfloat16):
        torchs = torch.cat([captioner.encoder(normalise(part, architecture)).float() for part in parts])
    for name, found in {"autocast": torchs, "capray": own}.items():
        print(f"relative error of the grid in bf16, {name}: {float((found - expected).norm() / expected.norm()):.3f}")
    captions = [[found.hypotheses[0].caption for found in way(images, Decoding())] for way in ways]
    equal = np.mean([first == second for first, second in zip(*captions, strict=True)])
    print(f"captions in bf16 that are those in fp32: {equal:.3f} of {len(images)}")


@torch.inference_mode()
def show_times(name: str, dtype: torch.dtype, rounds: int) -> None:
    torch.manual_seed(0)
    backbone, preprocessing = Encoder(name).eval().backbone, Preprocessing(size=SIZES[name])
    folded = fold_batchnorm(backbone).to(dtype=dtype, memory_format=torch.channels_last)
    own = FoldedEncoder(backbone, dtype)
    pixels = torch.randint(0, 256, (8, SIZES[name], SIZES[name], 3), dtype=torch.uint8)
    ways = {
        "torch": lambda: folded(normalise(pixels, preprocessing).to(dtype)),
        "capray": lambda: own(pixels, preprocessing),
    }
    torchs, owns = (seconds * 1000 / len(pixels) for seconds in interleaved(ways, rounds).values())
    print(f"{name} {dtype}: {owns:.1f} ms an image beside {torchs:.1f} ({torchs / owns:.2f} ×); {machine()}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="a folder of JPEGs; drawn ones without")
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.photos is None:
        jpegs = photos(arguments.count)
    else:
        jpegs = [path.read_bytes() for path in sorted(arguments.photos.glob("*.jpg"))[: arguments.count]]
    show_errors(jpegs)
    for name in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            show_times(name, dtype, arguments.rounds)


if __name__ == "__main__":
    main()
