"""Who holds which part of a tensor, and the only communication between processes."""
