"""Exploration harness (draft)."""
import sys, time, warnings, tempfile, traceback, math, shutil
from pathlib import Path
import numpy as np, torch
import fusionkit
from fusionkit import Sketch
from fusionkit.registry import to_config
from fusionkit.codecs.sketch_plan import *
from fusionkit.codecs.sketch_plan import Target
from fusionkit.codecs.sketch_encoder import measure, How
from fusionkit.task_vectors.family import Family
from families.draw import draw

from fusionkit.codecs import sketch as _sk, allocation as _al
KEEP={}
_orig, _within = _sk.plans_of, _al.Division.within
def _spy(*a):
    KEEP['plans']=_orig(*a); KEEP['layout']=a[1]; KEEP['m']=a[2]; return KEEP['plans']
def _spyw(self, budget):
    plans=_within(self, budget)
    KEEP['fill']=sum(p.total for p in plans)/max(budget,1)
    return plans
_sk.plans_of=_spy; _al.Division.within=_spyw
TENSORS=[]
def codec_of(random, drawn):
    share = "equal" if random.random() < .3 else "energy"
    sketch = bool(random.random() < .75)
    seed = int(random.integers(0, 1000))
    kind = random.choice(["bits", "bytes", "noise"], p=[.6, .2, .2])
    if kind == "noise":
        return Sketch(noise=float(10 ** random.uniform(-4, 0)), share=share, seed=seed)
    bits = float(10 ** random.uniform(math.log10(.003), math.log10(8)))
    if kind == "bits":
        return Sketch(bits=bits, share=share, sketch=sketch, seed=seed)
    return bits, dict(share=share, sketch=sketch, seed=seed)

def one(seed, folder):
    drawn = draw(seed, folder)
    random = np.random.default_rng([seed, 1])
    codec = codec_of(random, drawn)
    size = sum(t.numel() for t in drawn.base.values()) * len(drawn.finetuned)
    t0 = time.time()
    bad = []
    if isinstance(codec, tuple):
        bits, kw = codec
        codec = Sketch(bytes=int(2000 + 1500 * len(drawn.base) + bits * size / 8 + random.integers(0, 4000)), **kw)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bundle = fusionkit.compress(drawn.base, drawn.finetuned, codec, folder / "b", **drawn.arguments)
    said = [str(w.message) for w in caught]
    unexpected = [s for s in said if "comes back with an error" not in s and "come back as zero" not in s]
    if unexpected: bad.append(("warning", unexpected[0][:200]))
    took = time.time() - t0
    import re
    from dataclasses import replace
    plans, layout, measured = KEEP["plans"], KEEP["layout"], KEEP["m"]
    pfill = KEEP.pop("fill", None)
    def follow(asked):
        k, v = asked.split("=")
        new = replace(codec, **{"bits": None, "bytes": None, "noise": None, k: int(v) if k == "bytes" else float(v)})
        with warnings.catch_warnings(record=True) as again:
            warnings.simplefilter("always")
            b2 = fusionkit.compress(drawn.base, drawn.finetuned, new, **drawn.arguments)
        return new, b2, [str(w.message) for w in again]
    for s in said:
        if m := re.search(r"ask for (\S+) or more", s):
            new, b2, again = follow(m[1])
            if not any(n for t in b2.tasks for n in b2.task_names(t)) or any("come back as zero" in a for a in again):
                bad.append(("headers mend fails", s, again))
        if m := re.search(r"as by (\S+)$", s):
            new, b2, again = follow(m[1])
            if [a for a in again if "hardly felt" in a]: bad.append(("noise mend fails", s, again))
    family = Family(drawn.base, drawn.finetuned, **drawn.arguments)
    parameters = family.parameters * len(family.tasks)
    stored = any(plan.nbytes.any() for plan in plans)
    disk = sum(p.stat().st_size for p in (folder / "b").iterdir())
    assert disk == bundle.nbytes
    manifest = (folder / "b" / "manifest.json").stat().st_size
    private = sum(r.private_bytes for r in bundle.manifest.tasks.values())
    fill = None
    if codec.bits and stored:
        budget = codec.bits * parameters / 8
        used = disk - private - max(0, manifest - int(budget) // 10)
        fill = used / budget
    elif codec.bytes and stored:
        fill = disk / codec.bytes
    if fill and fill > 1: bad.append(("over", fill))
    capped = all((not n) or n >= 0.98 * 7 * r * c / 8 for plan in plans for n, (r, c) in zip(plan.nbytes, layout.shapes))
    basee = sum(m.base for m in measured.values())
    ratios = []
    for t, task in enumerate(family.tasks):
        err = 0.0
        for name in family.names("delta"):
            want = family.vectors(name)[t]
            got = bundle.delta(task, name)
            if got is None:
                got = torch.zeros_like(want)
            elif not want.any() and got.any():
                bad.append(("zero comes back nonzero", name))
            if got.shape != want.shape or got.dtype != torch.float32: bad.append(("shape", name))
            if not got.isfinite().all(): bad.append(("nan", (task, name)))
            e = float((got.double() - want.double()).square().sum())
            err += e
            at = layout.names[name]; allowed = plans[t].nbytes[at]
            if allowed:
                parts = bundle.task_parts(task, name)
                used = len(parts["codes"]) if parts else 0
                E = measured[name].energies[t]
                TENSORS.append((used / allowed, e / max(E, 1e-300), plans[t].errors[at] / max(E,1e-300), allowed, tuple(want.shape), seed, t, name, codec.sketch, plans[t].ranks[at]))
        own = plans[t]
        if own.nbytes.any() and own.error > 0:
            ratios.append((err / own.error, err / max(sum(m.energies[t] for m in measured.values()), 1e-300)))
        if codec.noise and basee:
            ratios[-1:] = ratios[-1:]
            if err / basee > codec.noise: ratios.append(("noise", err / basee / codec.noise))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for task in bundle.tasks:
                for n, v in bundle.state_dict(task).items():
                    assert v.isfinite().all() if v.is_floating_point() else True, n
    except fusionkit.errors.BundleError as e:
        bad.append(("refused", str(e)[-150:]))
    return drawn, codec, bad, pfill if stored else None, capped, ratios, took, said, parameters

def main(start, count):
    root = Path(tempfile.mkdtemp(dir="/tmp/w/tmp_families"))
    fills, ratios_all, noises = [], [], []
    t0 = time.time()
    for seed in range(start, start + count):
        folder = root / str(seed); folder.mkdir()
        try:
            drawn, codec, bad, fill, capped, ratios, took, said, parameters = one(seed, folder)
        except Exception as e:
            print("FAIL", seed, type(e).__name__, str(e)[:300]); traceback.print_exc(limit=-3); continue
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        for b in bad: print("BAD", seed, codec, b)
        if fill is not None and not capped: fills.append((fill, seed, codec, parameters))
        for r in ratios:
            if r[0] == "noise": noises.append((r[1], seed, codec))
            else: ratios_all.append((r[0], r[1], seed, codec))
        if took > 3: print("SLOW", seed, took)
    T=[t for t in TENSORS if t[1]>1e-3 and t[8]]
    T.sort(key=lambda t:t[0]); q=np.array([t[0] for t in T]); print("tensor fill (sketch, rel>1e-3)", len(T), np.quantile(q,[0,.01,.05,.1,.25,.5,1]))
    for t in T[:12]: print("   ", t)
    T=[t for t in TENSORS if t[1]>1e-3 and not t[8]]
    T.sort(key=lambda t:t[0]); q=np.array([t[0] for t in T]); print("tensor fill (no sketch)", len(T), np.quantile(q,[0,.01,.05,.1,.25,.5,1]))
    for t in T[:12]: print("   ", t)
    T=[(t[1]/t[2],*t) for t in TENSORS if t[1]>1e-4 and t[8]]
    T.sort(key=lambda t:t[0]); q=np.array([t[0] for t in T]); print("tensor err/pred (sketch)", len(T), np.quantile(q,[0,.01,.05,.1,.25,.5,.75,.9,.95,.99,1]))
    for t in T[-25:]: print("   ", t)
    print("time", time.time() - t0)
    fills.sort(key=lambda x: x[0])
    print("fill: n", len(fills), "below .97:", sum(f[0] < .97 for f in fills), "below .9", sum(f[0] < .9 for f in fills))
    for f in fills[:25]: print("  ", f)
    ratios_all.sort(key=lambda x: x[0])
    rr = np.array([r[0] for r in ratios_all])
    print("ratio quantiles", np.quantile(rr, [0, .01, .05, .25, .5, .75, .95, .99, 1]))
    for r in ratios_all[:12] + ratios_all[-25:]: print("  ", r)
    noises.sort(key=lambda x: x[0])
    print("noise over", len(noises), noises[-15:])
if __name__ == "__main__": main(int(sys.argv[1]), int(sys.argv[2]))
