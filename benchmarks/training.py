"""Training on one machine: the decoder's step beside one as tutorials write it, an epoch with and without the feature cache.

uv run python benchmarks/training.py [--threads 1]                  sizes of jobs/recipes/flickr8k-mobilenet.yaml
uv run python benchmarks/training.py --tutorial-sizes [--threads 1]  ResNet-101, a 14x14 grid, layers 512 wide

The reference is Show, Attend and Tell's decoder as the well-known PyTorch tutorials have it: every caption is alone in the
batch with a copy of its image's grid, and each step projects that grid for attention again. Both decoders have the same
sizes, captions and loss; each has Adam as it is built there. Times of an epoch are extrapolated from a few steps.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from capray.config import Architecture, Optimisation
from capray.images import normalise
from capray.model.captioner import Captioner, autocast
from capray.model.loss import collate, loss_sums
from capray.training.optimisation import build_optimizer
from capray.vocabulary import END, START, Vocabulary

CAPTIONS_PER_IMAGE = 5
WORDS_MEAN, WORDS_DEVIATION, WORDS_MOST = 10.8, 3.7, 20
"""Of Flickr8k's captions."""


class TutorialDecoder(nn.Module):
    """One caption per row; its grid is projected anew in every step."""

    def __init__(self, architecture: Architecture, grid_dim: int, vocabulary_size: int):
        super().__init__()
        hidden, attention, embed = architecture.hidden_dim, architecture.attention_dim, architecture.embed_dim
        self.project_grid = nn.Linear(grid_dim, attention)
        self.project_state = nn.Linear(hidden, attention)
        self.score = nn.Linear(attention, 1)
        self.embedding = nn.Embedding(vocabulary_size, embed)
        self.cell = nn.LSTMCell(embed + grid_dim, hidden)
        self.first_hidden, self.first_cell = nn.Linear(grid_dim, hidden), nn.Linear(grid_dim, hidden)
        self.gate = nn.Linear(hidden, grid_dim)
        self.words = nn.Linear(hidden, vocabulary_size)
        self.dropout = nn.Dropout(architecture.output_dropout)

    def forward(self, grids: torch.Tensor, captions: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """The loss of captions, longest first; ``grids`` is (captions, positions, channels)."""
        words = self.embedding(captions)
        mean = grids.mean(1)
        hidden, cell = self.first_hidden(mean), self.first_cell(mean)
        logits, weights = [], []
        for t in range(max(lengths)):
            n = sum(length > t for length in lengths)
            energy = torch.tanh(self.project_grid(grids[:n]) + self.project_state(hidden[:n])[:, None])
            alpha = self.score(energy).squeeze(2).softmax(1)
            context = (grids[:n] * alpha[:, :, None]).sum(1) * torch.sigmoid(self.gate(hidden[:n]))
            hidden, cell = self.cell(torch.cat([words[:n, t], context], 1), (hidden[:n], cell[:n]))
            logits.append(functional.pad(self.words(self.dropout(hidden)), (0, 0, 0, len(lengths) - n)))
            weights.append(functional.pad(alpha, (0, 0, 0, len(lengths) - n)))
        scored = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
        targets = captions[:, 1:][scored]
        loss = functional.cross_entropy(torch.stack(logits, 1)[scored].float(), targets, label_smoothing=0.1)
        return loss + ((1 - torch.stack(weights, 1).float().sum(1)) ** 2).mean()


def seconds_of(work: Callable[[], object], repeats: int) -> float:
    """The fastest of ``repeats`` calls: other load on the machine only ever adds."""
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def draw_captions(num_images: int, vocabulary_size: int, seed: int) -> list[list[list[int]]]:
    rng = random.Random(seed)

    def caption() -> list[int]:
        length = min(WORDS_MOST, max(3, round(rng.gauss(WORDS_MEAN, WORDS_DEVIATION))))
        return [rng.randrange(4, vocabulary_size) for _ in range(length)]

    images = [[caption() for _ in range(CAPTIONS_PER_IMAGE)] for _ in range(num_images)]
    return sorted(images, key=lambda image: -max(map(len, image)))


def training_step(optimizer: torch.optim.Optimizer, loss: Callable[[], torch.Tensor], precision: str) -> Callable[[], None]:
    """A whole step: forward, backward, clipping, Adam."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def step() -> None:
        with autocast("cpu", precision):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tutorial-sizes", action="store_true")
    parser.add_argument("--batch-size", type=int, default=160, help="image-caption pairs")
    parser.add_argument("--vocabulary", type=int, default=2543)
    parser.add_argument("--images", type=int, default=6000, help="images of an epoch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    architecture = Architecture(encoder="mobilenet_v2")
    if arguments.tutorial_sizes:
        architecture = Architecture(encoder="resnet101", pool_grid=14, attention_dim=512, embed_dim=512)
    captioner = Captioner(architecture, Vocabulary([f"w{i}" for i in range(arguments.vocabulary - 4)])).train()
    num_images = arguments.batch_size // CAPTIONS_PER_IMAGE
    captions = draw_captions(num_images, arguments.vocabulary, seed=0)
    batch = collate(captions, WORDS_MOST)
    pixels = torch.randint(0, 256, (num_images, 224, 224, 3), dtype=torch.uint8)
    with torch.no_grad():
        grids = captioner.encoder(normalise(pixels, architecture)).half()
    side = architecture.pool_grid or grids.shape[-1]
    print(
        f"{architecture.encoder}, grid {side}x{side}x{grids.shape[1]}, {batch.num_captions} pairs with {batch.num_tokens} "
        f"tokens per step, {arguments.threads} thread(s); fastest of {arguments.repeats}, forward, backward and Adam"
    )

    order = sorted((len(words), i, k) for i, image in enumerate(captions) for k, words in enumerate(image))[::-1]
    rows = [[START, *captions[i][k], END] for _, i, k in order]
    padded = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    pooled = functional.adaptive_avg_pool2d(grids.float(), side).flatten(2).transpose(1, 2)
    alone = pooled[[i for _, i, _ in order]]
    tutorial = TutorialDecoder(architecture, grids.shape[1], arguments.vocabulary)
    lengths = [len(row) - 1 for row in rows]

    def ours() -> torch.Tensor:
        sums = loss_sums(captioner, captioner.memory_of_cached_grid(grids), batch, label_smoothing=0.1)
        return sums.objective / batch.num_tokens + sums.regulariser / batch.num_captions

    def theirs() -> torch.Tensor:
        return tutorial(alone, padded, lengths)

    adam = torch.optim.Adam(tutorial.parameters(), lr=4e-4)
    reference = seconds_of(training_step(adam, theirs, "fp32"), max(2, arguments.repeats // 2))
    print(f"tutorial's decoder, fp32: {1e3 * reference / batch.num_captions:.2f} ms per pair")
    pairs = arguments.images * CAPTIONS_PER_IMAGE
    for precision in ("fp32", "bf16"):
        seconds = seconds_of(training_step(build_optimizer(captioner, Optimisation()), ours, precision), arguments.repeats)
        with torch.no_grad(), autocast("cpu", precision):
            encoding = seconds_of(lambda: captioner.encode(pixels), max(2, arguments.repeats // 2))
        cached, uncached = (value / batch.num_captions * pairs for value in (seconds, seconds + encoding))
        print(
            f"our decoder, {precision}: {1e3 * seconds / batch.num_captions:.2f} ms per pair, "
            f"{reference / seconds:.1f} times faster; an epoch of {arguments.images:,} images (extrapolated): "
            f"{cached:.0f} s with the cache, {uncached:.0f} s without: {uncached / cached:.1f} times faster"
        )


if __name__ == "__main__":
    main()
