"""Search-QA: questions to answer after searching in many passages."""
