"""Model cards: the README.md of a model's folder, with the metadata of the Hugging Face hub."""
