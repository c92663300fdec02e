"""Knowledge bases: other corpora, any size, over HTTP, and a check of what is there."""
