"""The benchmark's construction: questions from relations, questions by a language model, their quality."""
