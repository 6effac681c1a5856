"""Captioning and training on a GPU beside the encoder alone. Never run on a GPU so far. Without one it is small.

    uv run python benchmarks/gpu.py [--out gpu.json] [--quick]

Needs capray's source with torch, torchvision, pillow, numpy, pyyaml, fsspec, safetensors and pydantic; no Ray, NLTK or
pyarrow. First it asserts that the device agrees with the CPU in fp32 (TF32 off). Then, in bf16 with beam 5, from uint8
pixels in pageable memory: captions/s beside the best encoder alone (folded, or compiled too), ms of each phase, ms and
kernels of a beam step, peak memory; training steps of the decoder; JPEG decodes/s of a CPU core. The bars of issue 12 stand
beside what they are for.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image

from capray.config import Architecture, Decoding
from capray.images import load, normalise
from capray.inference import Inference
from capray.model.beam import beam_search
from capray.model.captioner import Captioner, autocast, hypotheses_of
from capray.model.folding import fold_batchnorm
from capray.model.loss import collate, loss_sums
from capray.vocabulary import END, Vocabulary

BARS = {"resnet101": 0.85, "resnet50": 0.80}
STEP_BAR_MS = 0.5
NUM_WORDS = 10_000


class Bench:
    """What is measured on ``device``; rows gather in ``rows``."""

    def __init__(self, device: str, quick: bool):
        self.device, self.quick = torch.device(device), quick
        self.rows: list[dict[str, Any]] = []
        self.rounds = 2 if quick else 5

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def synchronise(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object]) -> list[float]:
        """Of each round, after one that is not counted."""
        work()
        times = []
        for _ in range(self.rounds):
            self.synchronise()
            started = time.perf_counter()
            work()
            self.synchronise()
            times.append(time.perf_counter() - started)
        return sorted(times)

    def row(self, name: str, value: float, unit: str, **more: Any) -> None:
        row = {"name": f"gpu/{name}", "device": self.device.type, "value": value, "unit": unit}
        row |= {"reference": None, "ratio": None, "bar": None, **more}
        self.rows.append(row)
        print(json.dumps(row), flush=True)

    def captioner(self, encoder: str, size: int, **changes: Any) -> Captioner:
        torch.manual_seed(0)
        captioner = Captioner(
            Architecture(encoder=encoder, size=size, **changes), Vocabulary([f"w{i}" for i in range(NUM_WORDS)])
        )
        captioner.eval().requires_grad_(False)
        captioner.decoder.output.bias[END] = -50.0
        return captioner

    def check_agreement(self) -> None:
        """The same captions as on the CPU in fp32, log-probabilities within 1e-3."""
        captioner = self.captioner("resnet18", 64)
        captioner.decoder.output.bias[END] = 0.0
        images = list(np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), dtype=np.uint8))
        expected = Inference(captioner)(images, Decoding())
        found = Inference(captioner.to(self.device))(images, Decoding())
        pairs = [(mine.hypotheses[0], theirs.hypotheses[0]) for mine, theirs in zip(found, expected, strict=True)]
        same = sum(mine.token_ids == theirs.token_ids for mine, theirs in pairs)
        worst = max(abs(mine.log_prob - theirs.log_prob) for mine, theirs in pairs)
        self.row("captions as on the CPU in fp32", same, "of 16", worst_log_prob_difference=worst)
        assert same >= 15 and worst < 1e-3, f"{same} of 16 captions agree, log-probabilities differ by up to {worst}"

    def best_encoder(self, captioner: Captioner, images_B3HW: torch.Tensor) -> tuple[float, str, float]:
        """Seconds of the fastest encoder alone over the batch, which it is, and how long it took to compile."""
        dtype = images_B3HW.dtype
        folded = fold_batchnorm(captioner.encoder.backbone).to(dtype=dtype, memory_format=torch.channels_last)
        with torch.inference_mode():
            best, name, compile_seconds = median(self.seconds(lambda: folded(images_B3HW))), "folded", 0.0
            if self.on_gpu and not self.quick:
                compiled = torch.compile(folded)
                started = time.perf_counter()
                compiled(images_B3HW)
                self.synchronise()
                compile_seconds = time.perf_counter() - started
                seconds = median(self.seconds(lambda: compiled(images_B3HW)))
                if seconds < best:
                    best, name = seconds, "folded and compiled"
        return best, name, compile_seconds

    def captioning(self, encoder: str, size: int, batch: int, num_blocks: int = 4) -> None:
        captioner = self.captioner(encoder, size).to(self.device)
        inference, decoding = Inference(captioner, "bf16", batch), Decoding()
        block = list(np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8))
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        times = self.seconds(lambda: [inference(block, decoding) for _ in range(num_blocks)])
        rates = [num_blocks * batch / seconds for seconds in times]
        pixels = torch.from_numpy(np.stack(block)).to(self.device)
        with torch.inference_mode():
            images = normalise(pixels, captioner.architecture).bfloat16()
            alone, name, compile_seconds = self.best_encoder(captioner, images)
            phases = self.phases(inference, block, decoding)
        rate, ceiling = median(rates), batch / alone
        self.row(
            f"captions/{encoder}/{size}/batch {batch}",
            rate,
            "captions/s",
            spread=[min(rates), max(rates)],
            reference=ceiling,
            reference_is=name,
            ratio=rate / ceiling,
            bar=BARS.get(encoder) if batch >= 512 else None,
            phases_ms=phases,
            peak_memory_mib=torch.cuda.max_memory_allocated() / 2**20 if self.on_gpu else None,
            compile_seconds=compile_seconds,
        )

    def phases(self, inference: Inference, block: list[np.ndarray], decoding: Decoding) -> dict[str, float]:
        """Milliseconds of each phase by itself, nothing beside it."""
        copied = inference._copied(block)
        grids, _ = inference._grids(copied)
        pool = inference.captioner.architecture.pool_grid
        memory = inference.decoder.memory_of_grids(grids, pool)

        def searched() -> Any:
            return beam_search(
                inference.decoder.next_scores, inference.decoder.start(memory), len(block), decoding, self.device
            )

        beams = searched()
        phases = {
            "copy": lambda: inference._copied(block),
            "encode": lambda: inference._grids(copied),
            "remember": lambda: inference.decoder.memory_of_grids(grids, pool),
            "search": searched,
            "format": lambda: hypotheses_of(beams, inference.captioner.vocabulary),
        }
        found = {name: 1e3 * median(self.seconds(work)) for name, work in phases.items()}
        step = found["search"] / decoding.max_length
        bar = {"bar": STEP_BAR_MS, "ratio": STEP_BAR_MS / step} if len(block) == 512 else {}
        self.row(f"beam step/{len(block)} images", step, "ms", kernels=self.kernels(searched, decoding), **bar)
        return found

    def kernels(self, searched: Callable[[], object], decoding: Decoding) -> float | None:
        """Kernels launched for a beam step, mean."""
        if not self.on_gpu:
            return None
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            searched()
            self.synchronise()
        return sum(event.count for event in profiled.key_averages()) / decoding.max_length

    def training(self, num_images: int = 32) -> None:
        """Steps of the decoder over kept grids, as `flickr8k-mobilenet` has them."""
        captioner = self.captioner("mobilenet_v2", 224).to(self.device).requires_grad_(True).train()
        rng = np.random.default_rng(0)
        captions = [[rng.integers(4, NUM_WORDS, 12).tolist() for _ in range(5)] for _ in range(num_images)]
        batch = collate(captions, 20).to(self.device)
        grids = torch.rand(num_images, captioner.encoder.dim, 7, 7, device=self.device).half()
        optimizer = torch.optim.Adam(captioner.decoder.parameters(), lr=1e-4, fused=self.on_gpu)

        def step() -> None:
            with autocast(self.device, "bf16"):
                sums = loss_sums(captioner, captioner.memory_of_cached_grid(grids), batch, 0.1)
            (sums.objective / batch.num_tokens + sums.regulariser / batch.num_captions).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        self.row("training step/mobilenet_v2 kept grids, 160 pairs", 1 / median(self.seconds(step)), "steps/s")

    def decoding(self) -> float:
        """JPEG decodes a second of one CPU core."""
        pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((500, 375), Image.Resampling.BICUBIC).save(buffer, "JPEG")
        preprocessing, count = Architecture(), 20 if self.quick else 200
        times = self.seconds(lambda: [load(buffer.getvalue(), preprocessing) for _ in range(count)])
        rate = count / median(times)
        self.row("JPEG decodes of a CPU core, 500x375", rate, "images/s")
        return rate


def versions(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        found["processors"], found["memory_gib"] = properties.multi_processor_count, properties.total_memory / 2**30
        try:
            found["clock_mhz"] = torch.cuda.clock_rate()
        except Exception as error:  # It needs NVIDIA's management library.
            found["clock_mhz"] = f"unknown: {type(error).__name__}"
    return found


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="gpu.json")
    parser.add_argument("--quick", action="store_true", help="small sizes, as where there is no GPU")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bench = Bench(device, options.quick or device == "cpu")
    told = versions(bench.device)
    print(json.dumps(told), flush=True)
    bench.check_agreement()
    if bench.quick:
        bench.captioning("resnet18", 64, 4, num_blocks=2)
        bench.training(2)
    else:
        for encoder in ("resnet101", "resnet50", "mobilenet_v2"):
            for batch in (64, 512):
                bench.captioning(encoder, 224, batch)
        bench.training()
    decodes = bench.decoding()
    rates = [row["value"] for row in bench.rows if row["unit"] == "captions/s"]
    bench.row("CPU cores that decode for one GPU", max(rates) / decodes, "cores")
    Path(options.out).write_text(json.dumps({"versions": told, "rows": bench.rows}, indent=1))
    return bench.rows


if __name__ == "__main__":
    main()
