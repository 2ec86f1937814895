"""The report of a watched training: numbers per layer, the answer in words, page, terminal and notebook."""
