"""Everything that knows vLLM's names; nothing outside this package does. ``install.TESTED`` says which versions."""
