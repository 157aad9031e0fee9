"""Lucene-exact BM25 search: `BM25Index` in `bm25`, its `Analyzer` in `analyzer`."""
