"""What a model needs before anything is downloaded, exported or run: bytes, and the speed that they bound."""
