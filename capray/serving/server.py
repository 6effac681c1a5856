"""Starting the server on a Ray cluster or here."""

from __future__ import annotations

import time
from typing import Any

from capray import cluster
from capray.config import Decoding, ImageLimits, Preprocessing, ServeConfig
from capray.errors import ConfigError, Interrupted
from capray.tracking.registry import find_model_of


def build(config: ServeConfig) -> Any:
    """The Ray Serve application: an ingress in front of autoscaling replicas. Ray must be connected.

    Raises:
        CheckpointError, ConfigError: the model cannot be loaded.
    """
    from ray import serve

    from capray.captioning.actor import CaptioningSettings
    from capray.captioning.model_transfer import transfer_model
    from capray.model.checkpoint import load_captioner
    from capray.serving.ingress import Ingress
    from capray.serving.replica import Replica

    model = find_model_of(config)
    captioner, model_id = load_captioner(model)
    preprocessing = captioner.architecture.subset(Preprocessing)
    gpus = cluster.gpus_each(config.gpus_per_replica)
    settings = CaptioningSettings(
        model,
        model_id,
        config.subset(Decoding),
        cluster.resolved_precision(config.precision, gpus > 0),
        captioner.decoder.attention is not None,
        config.batch_size,
        gpus > 0,
        config.threads_per_replica,
        transfer=transfer_model(model, model_id),
    )
    captioning = serve.deployment(
        name="captioner",
        ray_actor_options={"num_cpus": config.threads_per_replica, "num_gpus": gpus},
        max_ongoing_requests=3 * config.batch_size,
        autoscaling_config={
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.batch_size,
        },
    )(Replica)
    replicas = captioning.bind(settings, config.batch_wait_ms / 1000)
    ingress = serve.deployment(
        name="ingress", ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=2 * config.max_requests + 16
    )(Ingress)
    return ingress.bind(
        replicas, model_id, preprocessing, config.subset(ImageLimits), config.max_requests, config.timeout_seconds
    )


def start(config: ServeConfig) -> str:
    """Start the server, wait until it is ready, and return its address. A start that fails leaves nothing behind.

    Raises:
        ConfigError: the port is taken, or Ray Serve runs on this cluster already.
        CheckpointError: as ``build`` does.
    """
    import logging

    from ray import serve

    cluster.connect()
    for name in ("ray.serve", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if cluster.is_port_taken(config.host, config.port):
        raise ConfigError(f"port {config.port} of {config.host} is taken: choose another with --port")
    if serve.status().proxies:
        raise ConfigError(
            "Ray Serve runs on this cluster already, and its address and applications are another's: serve from a Ray of "
            "your own, or end it first (serve shutdown)"
        )
    application = build(config)
    try:
        serve.start(http_options={"host": config.host, "port": config.port}, logging_config={"log_level": "ERROR"})
        serve.run(application, name="capray", route_prefix="/", logging_config={"log_level": "ERROR"})
    except BaseException:
        serve.shutdown()
        raise
    return f"http://{config.host}:{config.port}"


def run(config: ServeConfig) -> None:
    """Serve until a signal comes, which is how a server ends and no fault."""
    from ray import serve

    address = start(config)
    print(f"captions at {address}  (page at /, POST /caption, OpenAPI at /openapi.json); Ctrl-C ends it", flush=True)
    try:
        while True:
            time.sleep(3600)
    except (KeyboardInterrupt, Interrupted):
        print("stopped", flush=True)
    finally:
        serve.shutdown()
