"""Captioners trained elsewhere, turned into captioner folders without running anything from their files."""
