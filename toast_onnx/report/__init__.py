"""Results as plain documents and pictures."""
