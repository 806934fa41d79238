"""Makes the golden bundle of format version 7, of the same family as the others'.

From the folder `tests`: `python -m golden.make_trellis && python -m golden.expect`. Only for a new
version of the format: what is there is to be read for ever.
"""

import shutil

from golden.net import FOLDER, FROZEN, PRIVATE, base, finetuned

from fusionkit import Sketch, compress

if __name__ == "__main__":
    out = FOLDER / "trellis.bundle"
    shutil.rmtree(out, ignore_errors=True)
    compress(base(), finetuned(), Sketch(noise=0.05, seed=3), out, private=PRIVATE, frozen=FROZEN)
