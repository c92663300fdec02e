"""Knowledge bases beyond one file: other corpora, any size, over HTTP, and a check of what is there."""
