"""Prepare a data set on the cluster.

    ray job submit --working-dir . -- python jobs/prepare.py flickr8k s3://bucket/raw s3://bucket/samples

Settings are those of `capray prepare`: the same flags, and a YAML file with --config.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from capray.cli import run

sys.exit(run(["prepare", *sys.argv[1:]]))
