"""Builds index folders, which retrievers open at once."""
