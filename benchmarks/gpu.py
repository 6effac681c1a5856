"""Captioning and training on a GPU beside the encoder alone. Without one it is small.

    uv run python benchmarks/gpu.py [--out gpu.json] [--quick]

Needs capray's source with torch, torchvision, pillow, numpy, pyarrow, pyyaml, fsspec, safetensors and pydantic; no Ray or
NLTK. First it asserts that the device agrees with the CPU in fp32 (TF32 off). Then, in bf16 with beam 5, from uint8
pixels in pageable memory: captions/s beside the best encoder alone (folded, or compiled too), ms of each phase, ms and
kernels of a beam step, peak memory; training steps of the decoder; JPEG decodes/s of a CPU core.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import io
import json
import sys
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
from capray.inference import SWITCH_SECONDS, Inference
from capray.model.beam import beam_search
from capray.model.captioner import Captioner, Hypothesis, autocast, hypotheses_of
from capray.model.folding import FoldedEncoder, fold_batchnorm
from capray.model.graphs import gather
from capray.model.loss import collate, loss_sums
from capray.vocabulary import END, Vocabulary

BARS = {"resnet101": 0.85, "resnet50": 0.80}
STEP_BAR_MS = 0.5
NUM_CHECKED, NUM_SMALLER = 16, 7
VARIANTS = {
    "additive": {},
    "additive, ending early": {},
    "pooled": {"pool_grid": 3},
    "multiplicative": {"attention": "multiplicative"},
    "none, gru": {"attention": "none", "cell": "gru"},
}
"""Of the architecture, for which the device's captions are compared."""


@torch.no_grad()
def measure_statistics(captioner: Captioner, size: int) -> None:
    """Let BatchNorm's running statistics be true of noise: what makes up for rounding to bf16 relies on them."""
    norms = [module for module in captioner.encoder.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.train().momentum = 1.0
    noise_B3HW = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (8, size, size, 3), dtype=np.uint8))
    captioner.encoder(normalise(noise_B3HW, captioner.architecture))


class Bench:
    """What is measured on ``device``; rows gather in ``rows``."""

    def __init__(self, device: str, quick: bool):
        self.device, self.quick = torch.device(device), quick
        self.rows: list[dict[str, Any]] = []
        self.rounds, self.num_words = (2, 1_000) if quick else (5, 10_000)

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
            Architecture(encoder=encoder, size=size, **changes), Vocabulary([f"w{i}" for i in range(self.num_words)])
        )
        measure_statistics(captioner, size)
        captioner.eval().requires_grad_(False)
        captioner.decoder.output.bias[END] = -50.0
        return captioner

    def check_agreement(self) -> None:
        """The same captions as on the CPU in fp32, log-probabilities within 1e-3; with CUDA graphs and without."""
        rng = np.random.default_rng(0)
        for name, changes in VARIANTS.items():
            captioner = self.captioner("resnet18", 64, **changes)
            captioner.decoder.output.bias[END] = 4.0 if "early" in name else 0.0
            images = list(rng.integers(0, 256, (NUM_CHECKED, 64, 64, 3), dtype=np.uint8))
            expected = Inference(captioner)(images, Decoding())
            inference = Inference(captioner.to(self.device), batch_size=NUM_CHECKED)
            graphs = ("with graphs", "with graphs again") if self.on_gpu else ()
            for way in ("without graphs", *graphs, "a smaller batch"):
                wanted = images[:NUM_SMALLER] if way == "a smaller batch" else images
                found = inference(wanted, Decoding())
                pairs = [(mine.hypotheses[0], its.hypotheses[0]) for mine, its in zip(found, expected, strict=False)]
                same = sum(mine.token_ids == its.token_ids for mine, its in pairs)
                worst = max(abs(mine.log_prob - its.log_prob) for mine, its in pairs)
                difference = {"worst_log_prob_difference": worst}
                self.row(f"captions as on the CPU in fp32/{name}/{way}", same, f"of {len(wanted)}", **difference)
                assert len(found) == len(wanted) and same >= len(wanted) - 1 and worst < 1e-3, (name, way, same, worst)
            if self.on_gpu:
                assert inference._graphs is not None and inference._graphs._graphed is not None, "no graphs were recorded"
                self.check_bfloat16(name, captioner, images, [outcome.hypotheses[0] for outcome in expected])

    def check_bfloat16(self, name: str, captioner: Captioner, images: list[np.ndarray], expected: list[Hypothesis]) -> None:
        """Where the captions in bf16 are the same, so are their log-probabilities but for its rounding."""
        found = [outcome.hypotheses[0] for outcome in Inference(captioner, "bf16", NUM_CHECKED)(images, Decoding())]
        pairs = [(mine, its) for mine, its in zip(found, expected, strict=True) if mine.token_ids == its.token_ids]
        worst = max((abs(mine.log_prob - its.log_prob) / its.num_tokens for mine, its in pairs), default=0.0)
        difference = {"worst_log_prob_difference_of_a_token": worst}
        self.row(f"captions in bf16 as on the CPU in fp32/{name}", len(pairs), f"of {len(images)}", **difference)
        assert worst < 0.05, (name, worst)

    def best_encoder(self, captioner: Captioner, images_B3HW: torch.Tensor) -> tuple[float, str, float]:
        """Seconds of the fastest encoder that a library gives, alone over the batch, which it is, and how long it took to
        compile."""
        dtype, name = images_B3HW.dtype, captioner.architecture.encoder
        folded = fold_batchnorm(captioner.encoder.backbone).to(dtype=dtype, memory_format=torch.channels_last)
        torch.backends.cudnn.benchmark = True
        found, compile_seconds = {}, 0.0
        with torch.inference_mode():
            for size in sorted({min(len(images_B3HW), size) for size in (128, 512)}):
                parts = images_B3HW.split(size)
                found[f"folded, {size} at once"] = self.seconds(lambda p=parts: [folded(part) for part in p])
                if self.on_gpu and not self.quick:
                    compiled = torch.compile(folded, dynamic=False)
                    started = time.perf_counter()
                    compiled(parts[0])
                    self.synchronise()
                    compile_seconds += time.perf_counter() - started
                    found[f"folded and compiled, {size} at once"] = self.seconds(
                        lambda c=compiled, p=parts: [c(part) for part in p]
                    )
        for way, times in found.items():
            self.row(f"encoder alone/{name}/{way}", len(images_B3HW) / median(times), "images/s")
        best = min(found, key=lambda way: median(found[way]))
        torch.backends.cudnn.benchmark = False
        return median(found[best]), best, compile_seconds

    def own_encoder(self, captioner: Captioner, pixels_BHW3: torch.Tensor) -> float:
        """Images/s of capray's own, alone over the batch of pixels, on a GPU."""
        architecture, own = captioner.architecture, FoldedEncoder(captioner.encoder.backbone, torch.bfloat16)
        torch.backends.cudnn.benchmark = True
        with torch.inference_mode():
            grid = own(pixels_BHW3[:8], architecture).float()
            other = captioner.encoder(normalise(pixels_BHW3[:8], architecture))
            with autocast(self.device, "bf16"):
                cast = captioner.encoder(normalise(pixels_BHW3[:8], architecture)).float()
            error, reference = (float((each - other).norm() / other.norm()) for each in (grid, cast))
            more = {"reference": reference, "reference_is": "torch's autocast", "ratio": error / reference}
            self.row(f"relative error of the grid in bf16/{architecture.encoder}", error, "of its norm", **more)
            rate = len(pixels_BHW3) / median(self.seconds(lambda: own(pixels_BHW3, architecture)))
        torch.backends.cudnn.benchmark = False
        self.row(f"encoder alone/{architecture.encoder}/capray's, from pixels", rate, "images/s")
        return rate

    def captioning(self, encoder: str, size: int, batch: int, num_blocks: int = 12) -> None:
        captioner = self.captioner(encoder, size).to(self.device)
        decoding = Decoding()
        block = list(np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8))
        pixels = torch.from_numpy(np.stack(block)).to(self.device)
        images = normalise(pixels, captioner.architecture).bfloat16()
        alone, name, compile_seconds = self.best_encoder(captioner, images)
        own = self.own_encoder(captioner, pixels) if self.on_gpu else None
        if self.on_gpu:
            torch.set_num_threads(1)  # As in an actor, beside others.
            sys.setswitchinterval(SWITCH_SECONDS)  # As in an actor.
        gc.freeze()  # As in an actor.
        atexit.register(gc.unfreeze)
        for way in ("plain", "graphs") if self.on_gpu else ("plain",):
            if self.on_gpu:
                torch.cuda.reset_peak_memory_stats()
            inference = Inference(captioner, "bf16", batch)
            if way == "plain":
                inference._graphs = None
            started = time.perf_counter()
            for _ in range(2):  # With the second of its kind the graphs are recorded.
                inference(block, decoding)
            first_seconds = time.perf_counter() - started
            times = self.seconds(lambda i=inference: i(block * num_blocks, decoding))
            rates = [num_blocks * batch / seconds for seconds in times]
            rate, ceiling = median(rates), batch / alone
            self.row(
                f"captions/{encoder}/{size}/batch {batch}/{way}",
                rate,
                "captions/s",
                spread=[min(rates), max(rates)],
                reference=ceiling,
                reference_is=name,
                ratio=rate / ceiling,
                of_own_encoder=None if own is None else rate / own,
                bar=BARS.get(encoder) if batch >= 512 else None,
                phases_ms=self.phases(inference, block, decoding, f"{encoder}/{batch} images/{way}"),
                peak_memory_mib=torch.cuda.max_memory_allocated() / 2**20 if self.on_gpu else None,
                seconds_of_the_first_two_blocks=first_seconds,
                compile_seconds=compile_seconds,
            )
            if way == "graphs":
                times = self.seconds(lambda i=inference: [i(block * 2, decoding) for _ in range(num_blocks // 2)])
                by_two = num_blocks * batch / median(times)
                self.row(f"captions/{encoder}/{size}/batch {batch}/two batches a call, as an actor", by_two, "captions/s")

    def phases(self, inference: Inference, block: list[np.ndarray], decoding: Decoding, name: str) -> dict[str, float]:
        """Milliseconds of each phase by itself, nothing beside it."""
        graphed = inference._graphs._graphed if inference._graphs is not None else None
        lane = graphed._lanes.get() if graphed is not None else None
        copied = inference._copied(block)
        grids, _ = inference._grids(copied)
        pool = inference.captioner.architecture.pool_grid
        memory = inference.decoder.memory_of_grids(grids, pool)

        def searched() -> Any:
            if lane is not None:
                return [graph.replay() for graph in (lane._begin, *(part.graph for part in lane._parts))]
            start = inference.decoder.start(memory)
            return beam_search(inference.decoder.next_scores, start, len(block), decoding, self.device)

        def encoded() -> Any:
            return lane._begin.replay() if lane is not None else inference._grids(copied)

        start = inference.decoder.start(memory)
        beams = beam_search(inference.decoder.next_scores, start, len(block), decoding, self.device)
        phases = {
            "gather and copy": lambda: inference._copied(block),
            "encode": encoded,
            "search": searched,
            "format": lambda: hypotheses_of(beams, inference.captioner.vocabulary),
        }
        found = {name: 1e3 * median(self.seconds(work)) for name, work in phases.items()}
        if graphed is not None and lane is not None:
            found["search"] -= found["encode"]
            found["gather"] = 1e3 * median(self.seconds(lambda: self.gathered(graphed, block)))
            graphed._lanes.put(lane)
        step = found["search"] / decoding.max_length
        bar = {"bar": STEP_BAR_MS, "ratio": STEP_BAR_MS / step} if len(block) == 512 else {}
        self.row(f"beam step/{name}", step, "ms", kernels=self.kernels(searched, decoding), **bar)
        return found

    @staticmethod
    @torch.inference_mode()
    def gathered(graphed: Any, block: list[np.ndarray]) -> None:
        staged = graphed._staging()
        gather(block, staged[: len(block)])
        graphed._staged.put(staged)

    def kernels(self, searched: Callable[[], object], decoding: Decoding) -> float | None:
        """Kernels run for a beam step, mean; those that take longest are printed."""
        if not self.on_gpu:
            return None
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            searched()
            self.synchronise()
        events = sorted(profiled.key_averages(), key=lambda event: -event.device_time_total)
        for event in events[:18]:
            microseconds = event.device_time_total / decoding.max_length
            print(f"  {microseconds:8.1f} µs a step, {event.count:5d} times: {event.key[:100]}", flush=True)
        return sum(event.count for event in events) / decoding.max_length

    def training(self, num_images: int = 32) -> None:
        """Steps of the decoder over kept grids, as `flickr8k-mobilenet` has them."""
        captioner = self.captioner("mobilenet_v2", 224).to(self.device).requires_grad_(True).train()
        rng = np.random.default_rng(0)
        captions = [[rng.integers(4, self.num_words, 12).tolist() for _ in range(5)] for _ in range(num_images)]
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
        bench.captioning("resnet50", 224, 512)
        bench.captioning("resnet101", 224, 512)
        bench.captioning("mobilenet_v2", 224, 512)
        bench.captioning("resnet50", 224, 64)
        bench.training()
    decodes = bench.decoding()
    rates = [row["value"] for row in bench.rows if row["unit"] == "captions/s"]
    bench.row("CPU cores that decode for one GPU", max(rates) / decodes, "cores")
    Path(options.out).write_text(json.dumps({"versions": told, "rows": bench.rows}, indent=1))
    return bench.rows


if __name__ == "__main__":
    main()
