"""Intuitive physics: how surprised a model is by what cannot be."""
