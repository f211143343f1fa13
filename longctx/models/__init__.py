"""Language models made of the mixers and MLPs that a config names."""

from longctx.models.language import LanguageModel, parameter_count

__all__ = ["LanguageModel", "parameter_count"]
