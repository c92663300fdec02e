"""The built-in knowledge base: its articles, its pictures, and the encoders that packages carry."""
