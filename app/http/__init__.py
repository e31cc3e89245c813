"""What requests pass on their way to an endpoint."""
