"""Features of any folder of videos, and what is like what among them."""
