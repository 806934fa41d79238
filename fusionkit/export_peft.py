"""Where `export_adapter` was before; it is `fusionkit.export_adapter`."""

import warnings

from fusionkit.bundles.export_peft import export_adapter

__all__ = ["export_adapter"]

warnings.warn(
    "fusionkit.export_peft is the earlier place of export_adapter: write `from fusionkit import "
    "export_adapter`",
    DeprecationWarning,
    stacklevel=2,
)
