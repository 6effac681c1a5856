"""capray: train an image captioner on Ray, caption images by the million, query the captions with SQL."""

__version__ = "0.1.0"
