"""Teachers: scoring the student's tokens, in this process or behind a URL."""
