"""What is told of a run beside its file: manifest, contact sheet, page."""
