"""The tabs of the page: each file lays out one and binds it to the functions of `nextscale.demo`."""
