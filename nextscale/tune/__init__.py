"""`nextscale tune`: finds the cheapest settings of a model on this machine that keep its quality."""
