"""Experiments: the papers' tables and figures, each described by one entry and run by one command."""
