"""Memory of a run over 100,000 tiny images: the driver's and the workers', over the way.

    uv run python benchmarks/memory.py [--images 100000]

The reference is the memory after warm-up, a fifth of the way: it should not grow from there. What is shown is memory of
the process alone (USS: no shared pages, so Ray's object store is not counted in each).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from capray import cluster
from capray.captioning.job import caption
from capray.config import Architecture, CaptionConfig
from capray.model.captioner import Captioner
from capray.model.checkpoint import save_captioner
from capray.vocabulary import END, Vocabulary

SECONDS_BETWEEN = 1.0
KINDS = {"CaptioningActor": "actor", "fetch_unit": "fetching", "ray::IDLE": "fetching"}
"""What a worker is, by a mark in the title of its process; one that fetches is idle in between."""


def write_images(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for i in range(count):
        if i % 1000 == 0:
            (folder / f"{i // 1000:04d}").mkdir(parents=True)
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i // 1000:04d}" / f"{i:07d}.png", compress_level=1)


def write_model(folder: Path) -> None:
    """A captioner so small that the plumbing is what runs."""
    torch.manual_seed(0)
    shape = Architecture(encoder="tiny", size=16, attention_dim=8, embed_dim=8, hidden_dim=16)
    captioner = Captioner(shape, Vocabulary([f"word{i}" for i in range(20)]))
    with torch.no_grad():
        captioner.decoder.output.bias[END] = 3.0
    save_captioner(captioner, str(folder))


class Watch:
    """Samples of the memory of this process, and of the largest of Ray's workers of each kind, in MiB."""

    def __init__(self) -> None:
        self.samples: list[dict[str, float]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(SECONDS_BETWEEN):
            now = {"driver": psutil.Process().memory_full_info().uss / 2**20}
            for process in psutil.Process().children(recursive=True):
                try:
                    title = " ".join(process.cmdline())
                    kind = next((kind for mark, kind in KINDS.items() if mark in title), None)
                    if kind is not None:
                        now[kind] = max(now.get(kind, 0.0), process.memory_full_info().uss / 2**20)
                except psutil.Error:
                    continue
            self.samples.append(now)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        images, model, output = (Path(folder) / name for name in ("images", "model", "out"))
        write_images(images, arguments.images)
        write_model(model)
        cluster.connect()
        config = CaptionConfig(
            input=str(images), output=str(output), model=str(model), beam_size=1, max_length=4, batch_size=256
        )
        with Watch() as watch:
            started = time.monotonic()
            summary = caption(config)
            seconds = time.monotonic() - started
    print(f"{summary.captions:,} images in {seconds:,.0f} s, {summary.captions / seconds:,.0f} images/s")
    fifths = [part for part in np.array_split(np.arange(len(watch.samples)), 5) if len(part)]
    for kind in ("driver", "fetching", "actor"):
        peaks = [max((watch.samples[i].get(kind, 0.0) for i in part), default=0.0) for part in fifths]
        shown = " ".join(f"{peak:7,.0f}" for peak in peaks)
        print(f"{kind:>9}: peak of each fifth of the run {shown} MiB; the last is {peaks[-1] / peaks[1]:.2f} of the second")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
