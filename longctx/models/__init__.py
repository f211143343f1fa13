"""Language models made of the mixers and MLPs that a config names."""

from longctx.models.language import LanguageModel, parameter_count
from longctx.models.parameters import parameter_table

__all__ = ["LanguageModel", "parameter_count", "parameter_table"]
