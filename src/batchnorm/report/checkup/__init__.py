"""What a check of a model or checkpoint found, for a reader.

page       the check-up -> the page as data
charts     its charts: specifications and their records
html       the page -> one self-contained file
terminal   the check-up in a terminal
"""
