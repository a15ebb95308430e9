"""The page of `nextscale demo`. What it shows is computed without gradio; `page.py` and `tabs/` lay it out."""
