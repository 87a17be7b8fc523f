"""Which scenario the data asks for, from measured evidence."""
