"""What a watched training shows: numbers of each layer, the answer in words, the page, terminal and notebook."""
