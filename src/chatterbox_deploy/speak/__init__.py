"""A long text becomes one file with chapters: read, spoken in pieces by many instances at once, and put together."""
