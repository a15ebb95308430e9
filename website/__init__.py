"""The documentation site: `make docs` builds it with MkDocs from docs/, the repository's pages and the code."""
