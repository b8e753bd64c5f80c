"""Search by vectors: encoders of texts, the search for the nearest ones, and the retriever they make together."""
