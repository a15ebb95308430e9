"""Image to tokens and back: CNN autoencoder, residual quantiser over the scales, and the tokenizer joining them."""
