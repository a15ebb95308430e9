"""`nextscale doctor`: check an installation on the machine that it is on. Each check is a function of this package."""
