"""The benchmark's construction: from relations, by a language model; and how good it is."""
