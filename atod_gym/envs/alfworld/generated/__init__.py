"""Generated households as ALFWorld games, for playing without a download."""
