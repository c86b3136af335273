"""SALT as a service: video encoders learned from a frozen, shared, cached teacher."""
