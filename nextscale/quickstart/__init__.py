"""The main job at a size for a laptop: train a tokenizer and a class-conditional model, sample, and measure."""
