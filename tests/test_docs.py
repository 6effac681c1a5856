"""Every command and program in the README and in docs/ runs as written, or says beside it why it does not.

They run on a small Flickr8k of drawings, with recipes of two epochs, in the order they stand in; what the README leaves
behind is there for the other pages, which do not repeat its commands. `<!-- not run: … -->` before a block excuses it,
`<!-- fails: N -->` expects exit code N.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from PIL import Image

from capray import cli
from capray.datasets.settings import ShapesConfig
from capray.datasets.shapes import draw_scenes
from tests.conftest import image_bytes, in_process
from tests.local_executor import captioning_in_process

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

ROOT = Path(__file__).parents[1]
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
PHOTO = "1000268201_693b08cb0e.jpg"


@dataclass
class Block:
    place: str
    language: str
    text: str
    not_run: bool = False
    exit_code: int = 0


def blocks(page: str) -> Iterator[Block]:
    tokens = MarkdownIt().parse((ROOT / page).read_text("utf-8"))
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type != "fence" or token.info in ("", "json"):
            continue
        block = Block(f"{page}:{token.map[0] + 1}", token.info, token.content)
        remark = before.content.strip() if before and before.type == "html_block" else ""
        if found := re.fullmatch(r"<!-- (not run|fails): (.+) -->", remark, re.DOTALL):
            block.not_run = found[1] == "not run"
            block.exit_code = 0 if block.not_run else int(found[2])
        yield block


def run(block: Block, done: frozenset[str] = frozenset()) -> list[str]:
    """Run all but the commands that are ``done``; the commands that ran."""
    if block.not_run:
        return []
    if block.language == "python":
        exec(compile(block.text, block.place, "exec"), {"__name__": "__main__"})
        return []
    assert block.language == "sh", f"{block.place}: how is {block.language!r} run? say why it is not"
    lines = [line for line in block.text.replace("\\\n", " ").splitlines() if line not in done]
    for line in lines:
        command, *arguments = shlex.split(line, comments=True)
        assert command == "capray", f"{block.place}: {command} is not run here: say why"
        assert cli.run(arguments) == block.exit_code, f"{block.place}: {line}"
    return lines


def flickr8k_of_drawings(folder: Path) -> None:
    """Flickr8k's layout with 20 training images and 10 of validation."""
    scenes = list(draw_scenes(ShapesConfig(output="unused", num_images=30)))
    names = [PHOTO, *(f"{i}_drawn.jpg" for i in range(1, len(scenes)))]
    photos = folder / "Images"
    photos.mkdir(parents=True)
    lines = []
    for name, scene in zip(names, scenes, strict=True):
        (photos / name).write_bytes(scene.image)
        lines += [f"{name}#{i}\t{caption}" for i, caption in enumerate(scene.captions)]
    (folder / "Flickr8k.token.txt").write_text("\n".join(lines))
    for split, listed in {"train": names[:20], "dev": names[20:], "test": []}.items():
        (folder / f"Flickr_8k.{split}Images.txt").write_text("\n".join(listed))


def untrained_imagenet_weights(folder: Path) -> None:
    """A mobilenet where torch keeps what it has downloaded."""
    import torch
    import torchvision

    place = folder / "hub" / "checkpoints"
    place.mkdir(parents=True)
    url = torchvision.models.get_model_weights("mobilenet_v2").DEFAULT.url
    torch.manual_seed(0)
    torch.save(torchvision.models.mobilenet_v2().state_dict(), place / url.rpartition("/")[2])


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[tuple[Path, frozenset[str]]]:
    """The folder in which the README's blocks have run, and their commands."""
    folder = tmp_path_factory.mktemp("docs") / "readme"
    flickr8k_of_drawings(folder / "raw" / "flickr8k")
    (folder / "photo.jpg").write_bytes(image_bytes(Image.new("RGB", (90, 60), (30, 90, 160)), "JPEG"))
    (folder / "shops.csv").write_text(f"image_id,shop\n{PHOTO},1\n21_drawn.jpg,2\n")
    (folder / "jobs" / "recipes").mkdir(parents=True)
    for recipe in (ROOT / "jobs" / "recipes").iterdir():
        short = re.sub(r"^epochs: .*", "epochs: 2", recipe.read_text(), flags=re.MULTILINE)
        (folder / "jobs" / "recipes" / recipe.name).write_text(short)
    untrained_imagenet_weights(folder / "torch")
    with pytest.MonkeyPatch.context() as patch, in_process():
        patch.setenv("TORCH_HOME", str(folder / "torch"))
        which = shutil.which  # METEOR's Java program takes ten seconds to read its paraphrases.
        patch.setattr(shutil, "which", lambda name, *of, **how: None if name == "java" else which(name, *of, **how))
        patch.chdir(folder)
        yield folder, frozenset(line for block in blocks("README.md") for line in run(block))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", PAGES)
def test_a_page(page, world, tmp_path, monkeypatch):
    """The README's commands ran on Ray."""
    left, done = world
    shutil.copytree(left, tmp_path / "page", symlinks=True)
    monkeypatch.chdir(tmp_path / "page")
    with captioning_in_process():
        for block in blocks(page):
            run(block, done)


def test_links_within_lead_somewhere():
    for page in ["README.md", "CONTRIBUTING.md", *PAGES]:
        text = (ROOT / page).read_text("utf-8")
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if "://" not in target:
                assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"
