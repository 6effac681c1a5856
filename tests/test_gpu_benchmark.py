"""The GPU's benchmark: small on the CPU, and with few libraries. On a GPU, agreement with the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from capray.config import Decoding
from capray.inference import Inference
from tests.test_captioner import images, make

ROOT = Path(__file__).parents[1]
FORBIDDEN = ("ray", "nltk", "mlflow", "duckdb", "fastapi", "s3fs", "rich", "matplotlib")
WITHOUT = """
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {forbidden!r}:
            raise ImportError(name + " is not to be had here")
sys.meta_path.insert(0, Refuse())
sys.argv = ["gpu.py", "--quick", "--out", {out!r}]
runpy.run_path({script!r}, run_name="__main__")
"""


def test_it_runs_small_and_with_few_libraries(tmp_path):
    out = tmp_path / "gpu.json"
    script = WITHOUT.format(forbidden=FORBIDDEN, out=str(out), script=str(ROOT / "benchmarks" / "gpu.py"))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, timeout=170)
    rows = json.loads(out.read_text())["rows"]
    assert {row["device"] for row in rows} == {"cpu"}
    units = {row["unit"] for row in rows}
    assert units >= {"of 16", "captions/s", "ms", "steps/s", "images/s", "cores"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("variant", [{}, {"pool_grid": 7}, {"cell": "gru"}, {"attention": "none"}])
def test_a_gpu_captions_as_a_cpu_does(variant):
    captioner = make(**variant)
    arrays = list(images(9).numpy())
    decoding = Decoding(beam_size=3, max_length=8, no_repeat_ngram=2)
    expected = Inference(captioner)(arrays, decoding)
    inference = Inference(captioner.to("cuda"), batch_size=4)
    for outcome, other in zip(inference(arrays, decoding), expected, strict=True):
        assert outcome.hypotheses[0].caption == other.hypotheses[0].caption
        assert np.isclose(outcome.hypotheses[0].log_prob, other.hypotheses[0].log_prob, atol=1e-3)
