"""Data: sources of captioned images, the loader, built-in data sets and the embedding store."""
