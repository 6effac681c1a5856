"""An imported captioner computes what the tutorial's model computes, and nothing in its file is ever run.

The tutorial's model and search are written here again, from its description, as a module ``models``, so that the
checkpoints are pickled under the names the real ones have.
"""

import copy
import copyreg
import io
import json
import os
import pickle
import re
import sys
import types
import zipfile
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

from capray.cli import run
from capray.config import Decoding, ImportSgrvinodConfig
from capray.errors import CheckpointError, ConfigError, StorageError
from capray.images import load
from capray.importing.sgrvinod import import_sgrvinod
from capray.importing.torchfile import Module, Tensor
from capray.model.checkpoint import load_captioner
from capray.vocabulary import START
from tests.conftest import image_bytes

WORDS = [f"word{i}" for i in range(40)]
WORD_MAP = {word: i + 1 for i, word in enumerate(WORDS)} | {"<unk>": 41, "<start>": 42, "<end>": 43, "<pad>": 0}
"""As the tutorial numbers them: padding 0, then the words, then the other special tokens."""
OURS_TO_THEIRS = [WORD_MAP[token] for token in ("<pad>", "<start>", "<end>", "<unk>", *WORDS)]


class Encoder(nn.Module):
    def __init__(self, resnet="resnet18", encoded_image_size=14):
        super().__init__()
        self.enc_image_size = encoded_image_size
        self.resnet = nn.Sequential(*list(torchvision.models.get_model(resnet, weights=None).children())[:-2])
        self.adaptive_pool = nn.AdaptiveAvgPool2d((encoded_image_size, encoded_image_size))

    def forward(self, images):
        return self.adaptive_pool(self.resnet(images)).permute(0, 2, 3, 1)


class Attention(nn.Module):
    def __init__(self, encoder_dim, decoder_dim, attention_dim):
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)
        self.relu = nn.ReLU()
        self.softmax = nn.Softmax(dim=1)

    def forward(self, grid, hidden):
        energy = self.full_att(self.relu(self.encoder_att(grid) + self.decoder_att(hidden)[:, None])).squeeze(2)
        alpha = self.softmax(energy)
        return (grid * alpha[..., None]).sum(1), alpha


class DecoderWithAttention(nn.Module):
    def __init__(self, attention_dim, embed_dim, decoder_dim, vocab_size, encoder_dim, dropout=0.5):
        super().__init__()
        self.vocab_size = vocab_size
        self.attention = Attention(encoder_dim, decoder_dim, attention_dim)
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.dropout = nn.Dropout(p=dropout)
        self.decode_step = nn.LSTMCell(embed_dim + encoder_dim, decoder_dim, bias=True)
        self.init_h = nn.Linear(encoder_dim, decoder_dim)
        self.init_c = nn.Linear(encoder_dim, decoder_dim)
        self.f_beta = nn.Linear(decoder_dim, encoder_dim)
        self.sigmoid = nn.Sigmoid()
        self.fc = nn.Linear(decoder_dim, vocab_size)

    def init_hidden_state(self, grid):
        mean = grid.mean(1)
        return self.init_h(mean), self.init_c(mean)

    def step(self, words, grid, hidden, cell):
        """One word further: scores of the next, and the state."""
        context, _ = self.attention(grid, hidden)
        context = self.sigmoid(self.f_beta(hidden)) * context
        hidden, cell = self.decode_step(torch.cat([self.embedding(words), context], 1), (hidden, cell))
        return self.fc(self.dropout(hidden)), hidden, cell

    def forward(self, grid, captions):
        hidden, cell = self.init_hidden_state(grid)
        scores = []
        for t in range(captions.shape[1]):
            step, hidden, cell = self.step(captions[:, t], grid, hidden, cell)
            scores.append(step)
        return torch.stack(scores, 1)


@torch.no_grad()
def tutorial_search(decoder, grid, beam_size, releases=True):
    """The tutorial's beam search of one image, grid (1, P, D): the best ended sequence (ids without ``<start>``) and its
    log-probability, or None where no beam ends (there the tutorial fails).

    Where a beam ends there it takes its slot with it. Without ``releases`` it keeps the slot while it is among the best.
    """
    end = WORD_MAP["<end>"]
    beams, done = [((), 0.0)], []
    hidden, cell = decoder.init_hidden_state(grid)
    for _ in range(51):
        last = torch.tensor([ids[-1] if ids else WORD_MAP["<start>"] for ids, _ in beams])
        scores, hidden, cell = decoder.step(last, grid.expand(len(beams), -1, -1), hidden, cell)
        totals = scores.log_softmax(1) + torch.tensor([total for _, total in beams])[:, None]
        best, index = totals.flatten().topk(beam_size)
        grown = [(*divmod(i, decoder.vocab_size), total) for i, total in zip(index.tolist(), best.tolist(), strict=True)]
        found = [((*beams[parent][0], word), total, parent) for parent, word, total in grown]
        if releases:
            done += [hypothesis for hypothesis in found if hypothesis[0][-1] == end]
            beam_size -= sum(hypothesis[0][-1] == end for hypothesis in found)
        else:
            found = sorted(found + done, key=lambda hypothesis: -hypothesis[1])[:beam_size]
            done = [hypothesis for hypothesis in found if hypothesis[0][-1] == end]
        found = [hypothesis for hypothesis in found if hypothesis[0][-1] != end]
        if not found:
            break
        beams = [hypothesis[:2] for hypothesis in found]
        parents = [hypothesis[2] for hypothesis in found]
        hidden, cell = hidden[parents], cell[parents]
    return max(done, key=lambda hypothesis: hypothesis[1])[:2] if done else None


@pytest.fixture(scope="module", autouse=True)
def models():
    """The classes above as the tutorial's module ``models``."""
    module = types.ModuleType("models")
    for kind in (Encoder, Attention, DecoderWithAttention):
        kind.__module__ = "models"
        setattr(module, kind.__name__, kind)
    sys.modules["models"] = module
    yield
    del sys.modules["models"]


def noise(count, side):
    """Photos (N, side, side, 3) of noise."""
    return torch.from_numpy(np.random.default_rng(side).integers(0, 256, (count, side, side, 3), dtype=np.uint8))


def tutorial_input(pixels):
    """The tutorial's floats of pixels (N, H, W, 3)."""
    normalize = torchvision.transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    return normalize(pixels.permute(0, 3, 1, 2) / 255.0)


def make(resnet="resnet18", seed=0, grid=14, **sizes):
    """An encoder and a decoder with random weights, in evaluation mode.

    As in trained ResNets, BatchNorm knows its inputs and a block's branch is small beside what it is added to: one that is
    random throughout magnifies rounding a thousandfold.
    """
    torch.manual_seed(seed)
    encoder = Encoder(resnet, grid)
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    blocks = [module for module in encoder.modules() if hasattr(module, "bn2")]
    with torch.no_grad():
        for block in blocks:
            getattr(block, "bn3", block.bn2).weight.fill_(0.2)
        for norm in norms:
            norm.momentum = 1.0
        encoder.train()(tutorial_input(noise(8, 64)))
        for norm in norms:
            norm.momentum = 0.1
            norm.num_batches_tracked.zero_()
    dim = encoder.eval()(torch.zeros(1, 3, 64, 64)).shape[-1]
    sizes = {"attention_dim": 24, "embed_dim": 16, "decoder_dim": 48} | sizes
    return encoder, DecoderWithAttention(vocab_size=len(WORD_MAP), encoder_dim=dim, **sizes).eval()


def save(folder: Path, encoder, decoder, legacy=False) -> ImportSgrvinodConfig:
    """Save as the tutorial does, with optimizers that have taken a step."""
    optimizers = [torch.optim.Adam(list(module.parameters())[-2:]) for module in (encoder, decoder)]
    for optimizer in optimizers:
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    state = {
        "epoch": 10,
        "epochs_since_improvement": 2,
        "bleu-4": np.float64(0.24),
        "encoder": encoder,
        "decoder": decoder,
        "encoder_optimizer": optimizers[0],
        "decoder_optimizer": optimizers[1],
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "BEST_checkpoint.pth.tar", _use_new_zipfile_serialization=not legacy)
    return config(folder)


def config(folder: Path) -> ImportSgrvinodConfig:
    (folder / "WORDMAP.json").write_text(json.dumps(WORD_MAP))
    return ImportSgrvinodConfig(
        checkpoint=str(folder / "BEST_checkpoint.pth.tar"),
        word_map=str(folder / "WORDMAP.json"),
        output=str(folder / "captioner"),
    )


SCENES = torch.Generator().manual_seed(5)
LOOKS = torch.randn(3, 8, 512, generator=SCENES)
"""What eight subjects, verbs and objects look like to the encoder."""


def scenes(count):
    """Features (N, 512, 4, 4) of ``count`` scenes, and the subject, verb and object of each."""
    parts = torch.randint(0, 8, (count, 3), generator=SCENES)
    looks = sum(LOOKS[i][parts[:, i]] for i in range(3))
    return (looks[..., None, None] + torch.randn(count, 512, 4, 4, generator=SCENES)).relu(), parts


def describe(parts):
    """A caption of a scene, in ids: synonyms and optional words are drawn."""
    subject, verb, thing = parts.tolist()
    coins = (torch.rand(4, generator=SCENES) < 0.3).tolist()
    adjective = [27 + subject % 4] if coins[1] else []
    place = [31 + coins[2], 25 + coins[3], 17 + thing] if thing < 4 else []
    return [25 + coins[0], *adjective, 1 + subject, 9 + verb, *place]


def learn(decoder, steps=200):
    """Teach ``decoder`` to caption scenes, as the tutorial trains."""
    optimizer = torch.optim.Adam(decoder.parameters(), lr=5e-3)
    decoder.train()
    for _ in range(steps):
        grid, parts = scenes(32)
        captions = [torch.tensor([WORD_MAP["<start>"], *describe(each), WORD_MAP["<end>"]]) for each in parts]
        captions = nn.utils.rnn.pad_sequence(captions, batch_first=True)
        scores = decoder(grid.flatten(2).transpose(1, 2), captions[:, :-1])
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), captions[:, 1:].flatten(), ignore_index=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    decoder.eval()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The tutorial's encoder and a decoder that has learned, and the captioner imported from them."""
    encoder, decoder = make(grid=4)
    learn(decoder)
    settings = save(tmp_path_factory.mktemp("sgrvinod"), encoder, decoder)
    import_sgrvinod(settings)
    return encoder, decoder, load_captioner(settings.output)[0]


def words_of(ids):
    names = {i: word for word, i in WORD_MAP.items()}
    return " ".join(names[i] for i in ids if names[i] != "<end>")


def random_captions(count, length=9):
    """Ids (count, length) of both sides, the tutorial's and capray's, each after its ``<start>``."""
    generator = torch.Generator().manual_seed(7)
    ours = torch.randint(2, len(WORD_MAP), (count, length), generator=generator)
    ours[:, 0] = START
    return torch.tensor(OURS_TO_THEIRS)[ours], ours


class TestTheSameModel:
    @pytest.mark.parametrize(
        ("resnet", "legacy"), [pytest.param("resnet101", False, marks=pytest.mark.slow), ("resnet50", True)]
    )
    @torch.no_grad()
    def test_teacher_forced_logits(self, tmp_path, resnet, legacy):
        encoder, decoder = make(resnet, attention_dim=40, embed_dim=20, decoder_dim=36)
        settings = save(tmp_path, encoder, decoder, legacy)
        imported = import_sgrvinod(settings)
        captioner, model_id = load_captioner(settings.output)
        assert (captioner.architecture.encoder, imported.model_id) == (resnet, model_id)
        pixels = noise(2, 256)
        theirs, ours = random_captions(2)
        grid = encoder(tutorial_input(pixels)).flatten(1, 2)
        memory = captioner.encode(pixels)
        torch.testing.assert_close(memory.grid_BPD, grid, atol=1e-4, rtol=1e-4)
        states, _ = captioner(memory, ours[:, None], torch.full((2, 1), ours.shape[1]))
        logits = captioner.decoder.logits(states)[:, 0]
        torch.testing.assert_close(logits, decoder(grid, theirs)[..., OURS_TO_THEIRS], atol=1e-4, rtol=0)

    def test_the_architecture_and_preprocessing(self, pair):
        architecture = pair[2].architecture
        assert (
            architecture.model_dump()
            | {
                "encoder": "resnet18",
                "pool_grid": 4,
                "resize": "squash",
                "size": 256,
                "interpolation": "bilinear",
                "attention_dim": 24,
                "embed_dim": 16,
                "hidden_dim": 48,
                "output_dropout": 0.5,
                "grid_dropout": 0.0,
                "initial_state": "linear",
            }
            == architecture.model_dump()
        )
        assert pair[2].vocabulary.words == WORDS

    def test_a_photo_becomes_the_same_pixels(self, pair):
        """The tutorial squashes with Pillow's bilinear filter, by way of ``scipy.misc.imresize``."""
        photo = Image.effect_noise((500, 333), 90).convert("RGB")
        pixels, _, _ = load(image_bytes(photo), pair[2].architecture)
        assert (pixels == np.asarray(photo.resize((256, 256), Image.Resampling.BILINEAR))).all()

    @pytest.mark.parametrize("beam_size", [1, 3, 5])
    def test_captions(self, pair, beam_size, capsys):
        """Greedy captions are the same, and a beam's are but for the tutorial's rule that an ended beam takes its slot
        with it: with that rule replaced by capray's all are the same, with it at least 99 in 100."""
        _, decoder, captioner = pair
        grid, _ = scenes(200)
        decoding = Decoding(beam_size=beam_size, length_penalty=0, allow_unk=True, max_length=50)
        ours = [found[0] for found in captioner.caption(captioner.memory_of_grid(grid), decoding)]
        images = grid.flatten(2).transpose(1, 2).split(1)
        alike = [tutorial_search(decoder, image, beam_size, releases=False) for image in images]
        assert [mine.caption for mine in ours] == [words_of(ids) for ids, _ in alike]
        assert [mine.log_prob for mine in ours] == pytest.approx([log_prob for _, log_prob in alike], abs=1e-3)
        theirs = [tutorial_search(decoder, image, beam_size) for image in images]
        ended = [(mine.caption, words_of(found[0])) for mine, found in zip(ours, theirs, strict=True) if found]
        differing = [both for both in ended if both[0] != both[1]]
        assert len(ended) >= 190 and len({caption for caption, _ in ended}) >= 50
        assert len(differing) <= (0 if beam_size == 1 else len(ended) // 100), differing


OF_TORCH_0_4 = {"training", "_parameters", "_buffers", "_modules"}
OF_TORCH_0_4 |= {"_backward_hooks", "_forward_hooks", "_forward_pre_hooks"}


class _Backend:
    def __reduce__(self):
        return sys.modules["torch.nn.backends.thnn"]._get_thnn_function_backend, ()


def aged(module):
    """A copy of ``module`` with the attributes that a module of torch 0.4.0 has."""
    module = copy.deepcopy(module)
    for part in module.modules():
        for name in set(nn.Module().__dict__) - OF_TORCH_0_4:
            part.__dict__.pop(name, None)
        part.__dict__["_backend"] = _Backend()
        part._buffers.pop("num_batches_tracked", None)
    return module


class TestFiles:
    """Whatever wrote the file, the captioner is the same."""

    @pytest.fixture(scope="class")
    def small(self):
        return make(grid=4)

    @pytest.fixture(scope="class")
    def model_id(self, small, tmp_path_factory):
        return import_sgrvinod(save(tmp_path_factory.mktemp("new"), *small)).model_id

    def test_the_older_format(self, small, model_id, tmp_path):
        assert import_sgrvinod(save(tmp_path, *small, legacy=True)).model_id == model_id

    def test_torch_0_4_0(self, small, model_id, tmp_path, monkeypatch):
        """Then a parameter was pickled as its class and its tensor, and modules named their backend."""
        backends = types.ModuleType("torch.nn.backends.thnn")
        exec("def _get_thnn_function_backend(): pass", backends.__dict__)
        monkeypatch.setitem(sys.modules, backends.__name__, backends)
        monkeypatch.setitem(copyreg.dispatch_table, nn.Parameter, lambda p: (nn.Parameter, (p.data, p.requires_grad)))
        settings = save(tmp_path, *map(aged, small), legacy=True)
        data = Path(settings.checkpoint).read_bytes()
        assert b"_get_thnn_function_backend" in data and b"torch.nn.parameter\nParameter" in data
        assert not re.search(rb"_rebuild_parameter|num_batches_tracked|_non_persistent", data)
        assert import_sgrvinod(settings).model_id == model_id

    def test_data_parallel(self, small, model_id, tmp_path):
        assert import_sgrvinod(save(tmp_path, *map(nn.DataParallel, small))).model_id == model_id

    def test_views_of_one_storage(self, small, model_id, tmp_path):
        encoder, decoder = copy.deepcopy(small)
        with torch.no_grad():
            both = torch.cat([decoder.init_h.weight.t(), decoder.init_c.weight.t()])
        decoder.init_h.weight = nn.Parameter(both[:512].t())
        decoder.init_c.weight = nn.Parameter(both[512:].t())
        assert import_sgrvinod(save(tmp_path, encoder, decoder)).model_id == model_id

    def test_by_command(self, small, model_id, tmp_path, capsys):
        settings = save(tmp_path, *small)
        assert run(["import", "sgrvinod", settings.checkpoint, settings.word_map, settings.output]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines == ["resnet18, grid 4x4, 40 words", f"wrote {settings.output} (model_id {model_id})"]


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Disguised(nn.Module):
    """A module of the right name that pickles as a call."""

    def __init__(self, function, *arguments):
        super().__init__()
        self.call = function, arguments

    def __reduce__(self):
        return self.call


Disguised.__name__ = Disguised.__qualname__ = "Encoder"


class TestNothingIsExecuted:
    CALLS: ClassVar = {
        "posix.system": lambda mark: (os.system, f"touch {mark}"),
        "builtins.eval": lambda mark: (eval, f"open({str(mark)!r}, 'w')"),
        "builtins.exec": lambda mark: (exec, f"open({str(mark)!r}, 'w')"),
        "builtins.getattr": lambda mark: (getattr, mark, "touch"),
        "torch.serialization.load": lambda mark: (torch.load, str(mark)),
        "functools.partial": lambda mark: (partial, os.system, f"touch {mark}"),
    }

    @pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
    @pytest.mark.parametrize("name", CALLS)
    def test_calls_are_refused_by_name(self, tmp_path, name, form):
        mark = tmp_path / "ran"
        function, *arguments = self.CALLS[name](mark)
        settings = config(tmp_path)
        places = [
            Call(function, *arguments),
            {"encoder": Disguised(function, *arguments)},
            OrderedDict(a=[Call(function, *arguments)]),
        ]
        for place in places:
            if form == "pickle":
                Path(settings.checkpoint).write_bytes(pickle.dumps(place, protocol=4))
            else:
                torch.save(place, settings.checkpoint, _use_new_zipfile_serialization=form == "zip")
            with pytest.raises(CheckpointError, match=rf"refused: it names {re.escape(name)}, .* nothing .* executed"):
                import_sgrvinod(settings)
            assert not mark.exists() and not Path(settings.output).exists()

    def test_the_control_runs(self, tmp_path):
        """What is refused above would run where it is not."""
        for function, *arguments in (call(tmp_path / name) for name, call in list(self.CALLS.items())[:3]):
            pickle.loads(pickle.dumps(Call(function, *arguments)))
        assert len(list(tmp_path.iterdir())) == 3

    @pytest.mark.parametrize(
        ("code", "message"),
        [
            (b"cos\nsystem\n(S'true'\ntR.", "refused: it names os.system"),
            (
                b"\x80\x04\x8c\x06models\x8c\x1cEncoder.__init__.__globals__\x93.",
                "refused: it names models.Encoder.__init__",
            ),
            (b"c__builtin__\neval\n.", "refused: it names builtins.eval"),
            (b"cmodels\nEncoder\n(dS'__reduce__'\ncmodels\nos\nsb.", "refused: it names models.os"),
            (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x03\x00\x00\x00fooK\x01s\x86b.", "damaged or cut off"),
            (b"\x80\x02ctorch.nn.modules.linear\nLinear\nN}X\x03\x00\x00\x00fooK\x01s\x86b.", "damaged or cut off"),
            (b"\x80\x02X\x04\x00\x00\x00evilQ.", "damaged or cut off"),
        ],
    )
    def test_pickles_by_hand(self, tmp_path, code, message):
        settings = config(tmp_path)
        with zipfile.ZipFile(settings.checkpoint, "w") as archive:
            archive.writestr("archive/data.pkl", code)
        with pytest.raises(CheckpointError, match=re.escape(message)):
            import_sgrvinod(settings)
        assert not hasattr(Tensor, "foo") and not hasattr(Module, "foo")

    def test_the_modules_it_names_are_not_imported(self, tmp_path, monkeypatch):
        settings = save(tmp_path, *make(grid=4))
        monkeypatch.delitem(sys.modules, "models")
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
        (tmp_path / "models.py").write_text("raise AssertionError('imported')")
        import_sgrvinod(settings)
        assert "models" not in sys.modules


class TestMistakes:
    @pytest.fixture(scope="class")
    def small(self):
        return make(grid=4)

    @pytest.fixture(scope="class")
    def files(self, small, tmp_path_factory):
        """The bytes of a good checkpoint in both formats."""
        folder = tmp_path_factory.mktemp("good")
        return {
            form: Path(save(folder, *small, legacy=form == "legacy").checkpoint).read_bytes() for form in ("zip", "legacy")
        }

    @pytest.fixture
    def settings(self, tmp_path, files):
        (tmp_path / "BEST_checkpoint.pth.tar").write_bytes(files["zip"])
        return config(tmp_path)

    @pytest.mark.parametrize("form", ["zip", "legacy"])
    @pytest.mark.parametrize("share", [0.0, 0.00001, 0.001, 0.5, 0.9999999])
    def test_a_file_cut_off(self, settings, files, form, share):
        data = files[form]
        Path(settings.checkpoint).write_bytes(data[: int(len(data) * share)])
        with pytest.raises(CheckpointError, match="damaged or cut off|no file of torch.save") as caught:
            import_sgrvinod(settings)
        assert "\n" not in str(caught.value) and settings.checkpoint in str(caught.value)
        assert not Path(settings.output).exists()

    @pytest.mark.parametrize(
        ("word_map", "message"),
        [
            ("{", "is not JSON"),
            ("[1, 2]", "no mapping of words to ids"),
            ('{"a": "b"}', "no mapping of words to ids"),
            (json.dumps({"a": 1, "<pad>": 0}), "has no <start>, <end>, <unk>"),
            (json.dumps({"word": 44} | WORD_MAP), "has 45 entries, and embedding.weight in .* 44 rows"),
            (json.dumps(WORD_MAP | {"word7": 9}), "'word8' has 9, where 8 is due|'word7' has 9, where 8 is due"),
        ],
    )
    def test_a_word_map_that_is_not_its_own(self, settings, word_map, message):
        Path(settings.word_map).write_text(word_map)
        with pytest.raises(CheckpointError, match=f"word map '.*{message}"):
            import_sgrvinod(settings)

    def test_other_contents(self, small, tmp_path):
        encoder, decoder = small
        settings = config(tmp_path)
        tanh = copy.deepcopy(decoder)
        tanh.attention.relu = nn.Tanh()
        no_gate = copy.deepcopy(decoder)
        del no_gate.f_beta
        broken = copy.deepcopy(decoder)
        broken.fc.bias.data[3] = float("nan")
        oblong = copy.deepcopy(encoder)
        oblong.adaptive_pool = nn.AdaptiveAvgPool2d((4, 5))
        bare = copy.deepcopy(encoder)
        bare.resnet = nn.Sequential()
        for root, message in [
            (decoder.state_dict(), "it has no 'encoder'"),
            ({"encoder": bare.state_dict(), "decoder": decoder.state_dict()}, "has a OrderedDict as 'encoder'"),
            (bare, "it has no 'encoder'"),
            ([1], "it has no 'encoder'"),
            ({"encoder": bare, "decoder": bare}, "has a Encoder as 'decoder'"),
            ({"encoder": bare, "decoder": tanh}, "its attention.relu is no ReLU"),
            ({"encoder": encoder, "decoder": no_gate}, "it has nothing for decoder.gate.weight"),
            ({"encoder": encoder, "decoder": broken}, "weight decoder.output.bias holds NaN or infinity"),
            ({"encoder": oblong, "decoder": decoder}, r"pool_grid: .* not \(4, 5\)"),
            ({"encoder": bare, "decoder": decoder}, "none of torchvision's ResNets"),
        ]:
            torch.save(root, settings.checkpoint)
            with pytest.raises(CheckpointError, match=message) as caught:
                import_sgrvinod(settings)
            assert settings.checkpoint in str(caught.value) and "\n" not in str(caught.value)
            assert not Path(settings.output).exists()

    @pytest.mark.parametrize(
        ("data", "message"), [(b"", "no file of torch.save"), (b"\xff\xd8\xff\xe0", "no file of torch")]
    )
    def test_other_files(self, settings, data, message):
        Path(settings.checkpoint).write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            import_sgrvinod(settings)

    def test_another_zip(self, settings):
        with zipfile.ZipFile(settings.checkpoint, "w") as archive:
            archive.writestr("readme.txt", "hello")
        with pytest.raises(CheckpointError, match=r"none of torch.save: it has no data\.pkl"):
            import_sgrvinod(settings)

    def test_tensors_beyond_their_storage(self, settings):
        """Strides that leave the storage would show other memory; a stride of 0 would grow without bound."""
        for size, stride in (((44, 9999), (9999, 1)), ((1 << 40, 16), (0, 1)), ((44, 16), (1 << 40, 1))):
            code = pickle_of_a_tensor(size, stride)
            with zipfile.ZipFile(settings.checkpoint, "w") as archive:
                archive.writestr("archive/data.pkl", code)
                archive.writestr("archive/data/0", bytes(44 * 16 * 4))
            with pytest.raises(CheckpointError, match="damaged or cut off"):
                import_sgrvinod(settings)

    def test_missing_files(self, settings):
        with pytest.raises(StorageError, match="nowhere.*not found"):
            import_sgrvinod(settings.model_copy(update={"checkpoint": "nowhere"}))
        with pytest.raises(StorageError, match="nowhere.*not found"):
            import_sgrvinod(settings.model_copy(update={"word_map": "nowhere"}))

    def test_an_output_that_holds_something(self, settings):
        import_sgrvinod(settings)
        with pytest.raises(ConfigError, match="not empty"):
            import_sgrvinod(settings)

    def test_one_line_on_the_command_line(self, settings, capsys):
        Path(settings.checkpoint).write_bytes(pickle.dumps(Call(os.system, "true")))
        assert run(["import", "sgrvinod", settings.checkpoint, settings.word_map, settings.output]) == 1
        assert re.fullmatch(r"capray: '.*' is refused: it names posix.system, .*\n", capsys.readouterr().err)


class _Storage:
    """Pickles as a reference to a storage of 44 x 16 floats."""


def pickle_of_a_tensor(size, stride):
    """A checkpoint whose encoder has one tensor, of that size and stride."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return ("storage", torch.FloatStorage, "0", "cpu", 44 * 16, None) if isinstance(obj, _Storage) else None

    encoder, decoder = nn.Module.__new__(Encoder), nn.Module.__new__(DecoderWithAttention)
    encoder.__dict__["_buffers"] = {"odd": Call(torch._utils._rebuild_tensor_v2, _Storage(), 0, size, stride, False, {})}
    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"encoder": encoder, "decoder": decoder})
    return buffer.getvalue()
