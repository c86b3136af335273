"""The Ray Serve edge: deployment, ingress, placement, scaling."""
