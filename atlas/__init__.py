"""The embedded knowledge base: its articles, its pictures, and the encoders that packages carry."""
