"""The attentive probe: training, protocol, results."""
