"""The papers' tables and figures, and analyses. Imported by the command line alone."""
