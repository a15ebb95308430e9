"""Frozen networks: encoders give patch features to guide a generator, feature networks give features to measure one."""
