"""Captioned data sets: each file turns one layout into the Samples table."""
