"""What a model keeps of the tokens it has read: key-value caches."""
