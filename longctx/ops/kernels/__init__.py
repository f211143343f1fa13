"""Kernels of one platform each. A module gives `refusal(...)`, why it cannot compute a case, and the op itself."""
