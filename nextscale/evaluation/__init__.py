"""Measuring generators: images from anywhere, through feature networks, to a report."""
