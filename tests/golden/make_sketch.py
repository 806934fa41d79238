"""Makes the golden bundles of format version 6, of the same family as the others'.

From the folder `tests`: `python -m golden.make_sketch && python -m golden.expect`. Only for a new
version of the format: what is there is to be read for ever.
"""

import shutil

from golden.net import FOLDER, FROZEN, PRIVATE, base, finetuned

from fusionkit import Sketch, compress

CODECS = {
    "sketch": Sketch(noise=0.05, seed=3),  # signs, integers rotated and not, packed parts
    "directions": Sketch(bits=40, sketch=False),
}

if __name__ == "__main__":
    for name, codec in CODECS.items():
        out = FOLDER / f"{name}.bundle"
        shutil.rmtree(out, ignore_errors=True)
        compress(base(), finetuned(), codec, out, private=PRIVATE, frozen=FROZEN)
