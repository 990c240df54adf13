"""Entry points into other libraries, each in a module of its own that imports its host."""
