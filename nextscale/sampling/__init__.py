"""From logits to tokens to an image, one scale at a time; and the likelihood of given images."""
