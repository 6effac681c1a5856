"""Train on the cluster.

    ray job submit --working-dir . -- python jobs/train.py \\
        s3://bucket/samples s3://bucket/training --config jobs/recipes/flickr8k-mobilenet.yaml \\
        --num-workers 4 --gpus-per-worker 1 --tracking-uri http://mlflow:5000

Settings are those of `capray train`: the same flags, and a YAML file with --config.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from capray.cli import run

sys.exit(run(["train", *sys.argv[1:]]))
