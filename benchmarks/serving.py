"""Requests a second of the server, beside its captioner alone in this process.

    uv run python benchmarks/serving.py [--model DIR] [--clients 32] [--seconds 20]

The reference captions the same photos, decoded beforehand, in full batches: what no server can surpass.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time

import httpx
import numpy as np
import torch
from photos import photos

from capray.config import Architecture, Decoding, ServeConfig
from capray.images import load
from capray.inference import Inference
from capray.model.captioner import Captioner
from capray.model.checkpoint import save_captioner
from capray.serving.server import start
from capray.vocabulary import END, Vocabulary

PORT = 8765


def random_model(folder: str) -> str:
    torch.manual_seed(0)
    captioner = Captioner(Architecture(encoder="mobilenet_v2"), Vocabulary([f"word{i}" for i in range(2500)]))
    with torch.no_grad():
        captioner.decoder.output.bias[END] = 3.0
    save_captioner(captioner, folder)
    return folder


async def load_server(address: str, images: list[bytes], clients: int, seconds: float) -> list[tuple[float, int]]:
    """Seconds and batch size of each request that was answered."""
    answered: list[tuple[float, int]] = []
    until = time.monotonic() + seconds

    async def client(number: int) -> None:
        async with httpx.AsyncClient(base_url=address, timeout=60) as session:
            while time.monotonic() < until:
                started = time.monotonic()
                response = await session.post("/caption", content=images[number % len(images)])
                response.raise_for_status()
                answered.append((time.monotonic() - started, response.json()["batch_size"]))
                number += clients

    await asyncio.gather(*(client(number) for number in range(clients)))
    return answered


def reference(model: str, images: list[bytes], batch_size: int, seconds: float) -> float:
    torch.set_num_threads(1)
    inference = Inference.load(model, "cpu", batch_size=batch_size)
    pixels = [load(image, inference.captioner.architecture)[0] for image in images][:batch_size]
    done, started = 0, time.monotonic()
    while time.monotonic() - started < seconds:
        inference(pixels, Decoding())
        done += len(pixels)
    return done / (time.monotonic() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a captioner; a random one with MobileNetV2 when not given")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=20)
    arguments = parser.parse_args()
    images = photos(64)
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or random_model(folder)
        alone = reference(model, images, 32, arguments.seconds)
        address = start(ServeConfig(model=model, port=PORT))
        asyncio.run(load_server(address, images, arguments.clients, 3))
        answered = asyncio.run(load_server(address, images, arguments.clients, arguments.seconds))
        rate = len(answered) / arguments.seconds
        times = np.array([seconds for seconds, _ in answered])
        batch = len(answered) / sum(1 / size for _, size in answered)
        print(f"{arguments.clients} clients: {rate:.1f} photos/s, mean batch {batch:.1f}, no error")
        print(f"seconds a request: median {np.median(times):.2f}, 95 % {np.quantile(times, 0.95):.2f}")
        print(f"captioner alone, batches of 32, one thread: {alone:.1f} photos/s; ratio {rate / alone:.2f}")
        from ray import serve

        serve.shutdown()


if __name__ == "__main__":
    main()
