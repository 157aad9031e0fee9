"""Retrieval for Search-QA: passages of a corpus, found by BM25, dense vectors, or both."""
