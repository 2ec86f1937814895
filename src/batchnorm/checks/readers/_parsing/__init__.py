"""Parsers that the readers share. They read numbers and names, and execute nothing."""
