"""Reading and writing files: writing is atomic, and reading executes no code from the file."""
