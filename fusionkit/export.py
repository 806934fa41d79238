"""Where `export_task` was before; it is `fusionkit.export_task`."""

import warnings

from fusionkit.bundles.export_model import export_task

__all__ = ["export_task"]

warnings.warn(
    "fusionkit.export is the earlier place of export_task: write `from fusionkit import "
    "export_task`",
    DeprecationWarning,
    stacklevel=2,
)
