"""Conditions other than a class label. Each module is imported when a config names its kind."""
