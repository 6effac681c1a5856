"""Captions over HTTP: Ray Serve around the captioning of the batch job."""
