"""METEOR, under two names: ``meteor`` is METEOR 1.5 by its authors' Java program, as coco-caption has it, ``meteor_nltk``
NLTK's METEOR of 2005 to 2007. Their figures differ and must not be compared.

Both need more than capray installs; where it is missing they raise ConfigError with the way to get it.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import numpy as np

from capray.errors import CaprayError, ConfigError
from capray.metrics.statistics import Corpus, Statistics, mean_of

# meteor-1.5.jar's defaults for English: exact, stem, synonym and paraphrase matches; ranking parameters.
_MATCH_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_SEPARATOR = "|||"


def meteor(corpus: Corpus) -> Statistics:
    """``meteor``: METEOR 1.5 (Denkowski and Lavie 2014) over the corpus, 0 to 1, as coco-caption's ``Meteor`` has it.

    The Java program matches words and picks each image's best reference; from the sums of its counts the score follows.

    Raises:
        ConfigError: the extra ``meteor`` or Java is missing.
        CaprayError: the Java program failed.
    """
    lines = [
        f" {_SEPARATOR} ".join(["SCORE", *(_plain(words) for words in [*references, hypothesis])])
        for references, hypothesis in zip(corpus.references, corpus.hypotheses, strict=True)
    ]
    counts_NS = np.array([line.split() for line in _run_jar(lines)], dtype=np.float64)
    length, reference_length, chunks, matches, reference_matches = counts_NS[:, [0, 1, 20, 21, 22]].T
    is_whole = (matches == length) & (reference_matches == reference_length) & (chunks == 1)
    counts_NS[is_whole, 20] = 0  # A caption that is its reference is not fragmented.
    return Statistics(counts_NS, _figures)


def _plain(words: list[str]) -> str:
    return " ".join(words).replace(_SEPARATOR, "")


def _run_jar(lines: list[str]) -> list[str]:
    """The program's line of counts for each line of captions."""
    package = importlib.util.find_spec("pycocoevalcap")
    if package is None or not package.submodule_search_locations:
        raise ConfigError("METEOR 1.5 needs the extra `meteor` (pip install 'capray[meteor]', 100 MB) and Java")
    java = shutil.which("java")
    if java is None:
        raise ConfigError("METEOR 1.5 needs Java, and there is no `java` on the PATH: install a JRE")
    jar = Path(package.submodule_search_locations[0]) / "meteor" / "meteor-1.5.jar"
    command = [java, "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    finished = subprocess.run(command, input="\n".join(lines) + "\n", capture_output=True, encoding="utf-8")
    answers = finished.stdout.splitlines()
    if finished.returncode or len(answers) != len(lines):
        raise CaprayError(
            f"METEOR 1.5 failed (exit code {finished.returncode}, {len(answers)} of {len(lines)} captions scored): "
            f"{finished.stderr.strip()[-500:]}"
        )
    return answers


def _figures(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Denkowski and Lavie 2014, section 2, with content words weighing delta and function words 1 - delta.

    Statistics: words and function words of caption and reference; content and function words matched in both, for each
    of four matchers; chunks, and words matched in both.
    """
    matched = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 4)
    precision = _weighted(matched[..., 0], matched[..., 2], sums[..., 0], sums[..., 2])
    recall = _weighted(matched[..., 1], matched[..., 3], sums[..., 1], sums[..., 3])
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = precision * recall / (_ALPHA * precision + (1 - _ALPHA) * recall)
        fragmentation = sums[..., 20] / ((sums[..., 21] + sums[..., 22]) / 2)
        score = mean * (1 - _GAMMA * fragmentation**_BETA)
    return {"meteor": np.nan_to_num(score)}


def _weighted(content: np.ndarray, function: np.ndarray, words: np.ndarray, function_words: np.ndarray) -> np.ndarray:
    """The share of words matched, each by the weights of its kind and its matcher."""
    matched = (_DELTA * content + (1 - _DELTA) * function) @ _MATCH_WEIGHTS
    possible = _DELTA * (words - function_words) + (1 - _DELTA) * function_words
    return matched / np.maximum(possible, 1e-9)


def meteor_nltk(corpus: Corpus) -> Statistics:
    """``meteor_nltk``: the mean over images of NLTK's ``meteor_score`` (Lavie and Agarwal 2007: exact, stem and WordNet
    synonym matches; the best reference), 0 to 1. It is not METEOR 1.5.

    Raises:
        ConfigError: NLTK's WordNet corpus is not on this machine.
    """
    from nltk.corpus import wordnet
    from nltk.translate.meteor_score import meteor_score

    try:
        wordnet.ensure_loaded()
    except LookupError as error:
        raise ConfigError(
            "NLTK's METEOR needs the WordNet corpus: python -m nltk.downloader wordnet (or NLTK_DATA=FOLDER where it is)"
        ) from error
    pairs = zip(corpus.references, corpus.hypotheses, strict=True)
    return mean_of("meteor_nltk", [meteor_score(references, words, wordnet=wordnet) for references, words in pairs])
