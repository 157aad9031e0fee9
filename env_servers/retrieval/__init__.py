"""Retrieval for Search-QA: passages of a corpus, found by BM25, by meaning, or by both."""
