"""What a model keeps of the tokens it has read: stores of their entries, made by policies."""
