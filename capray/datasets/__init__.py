"""Captioned data sets, a module for each that turns it into the Samples table; ``samples``, ``selection``, ``archives`` and
``download`` are shared."""
