"""Tables and figures of the papers, each one entry: which runs, which measurements, what was published."""
