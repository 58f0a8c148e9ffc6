"""Write docs/architectures.md: every model type of the installed transformers that can be made tiny is merged, and its layers
are taken apart, as tests/test_every_type.py and tests/test_every_depth.py do for decoders.

    python tools/every_type.py      # about ten minutes
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from multiprocessing import Pool
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
warnings.simplefilter("ignore")
HOME = Path(__file__).parents[1]
sys.path.insert(0, str(HOME / "tests"))

import tiny  # noqa: E402

PAGE = HOME / "docs/architectures.md"
HEAD = """# Architectures

This page is generated (`python tools/every_type.py`) with transformers {version}. Every model type of it that can be made tiny
from its default config was saved, changed, saved again, merged with `linear`, and loaded by transformers: no key missing,
unexpected or of another shape, and every tensor the average. Of decoders the layers were also put together otherwise (all but
the first; some of them twice), and the output's config says of each layer what it was before.

Names, ties and layers of the other types come from the same table of what transformers declares, and from what their files
show; [what is read how](inputs.md#names-in-files) says what happens where neither is enough.
"""


def tried(model_type: str) -> tuple[str, str, str]:
    """(the type, what came of merging two, of taking its layers apart)."""
    import transformers as tf

    tf.utils.logging.disable_progress_bar()
    cls, config = tiny.types()[model_type]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            model, first, second = tiny.saved_pair(cls, config, folder)
        except BaseException as e:
            return model_type, f"skipped: {type(e).__name__}: {' '.join(str(e).split())[:110]}", ""
        try:
            merged = tiny.wrong_with(cls, folder, first, second) or "right"
        except Exception as e:
            merged = f"{type(e).__name__}: {' '.join(str(e).replace(str(folder), '').split())[:150]}"
        layers = ""
        if model_type in tiny.causal_types():
            found = [tiny.wrong_with_layers(cls, folder, model.config, r) for r in tiny.TAKEN.values()]
            layers = next((f for f in found if f), "right")
        return model_type, merged, layers


def main() -> None:
    import transformers as tf

    with Pool(2, maxtasksperchild=40) as pool:
        rows = sorted(pool.map(tried, list(tiny.types()), chunksize=4))
    right = [t for t, merged, _ in rows if merged == "right"]
    follows = [t for t, _, layers in rows if layers == "right"]
    refused = [(t, layers) for t, _, layers in rows if layers.startswith("refused")]
    skipped = [(t, merged) for t, merged, _ in rows if merged.startswith("skipped")]
    odd = [(t, m, d) for t, m, d in rows if m not in ("right",) and not m.startswith("skipped")]
    odd += [(t, m, d) for t, m, d in rows if d and d != "right" and not d.startswith("refused")]
    text = HEAD.format(version=tf.__version__)
    text += f"\n## Merged: {len(right)} types\n\n{', '.join(right)}.\n"
    text += f"\n## Layers taken apart: {len(follows)} types\n\n{', '.join(follows)}.\n"
    text += f"\n## Layers refused: {len(refused)} types\n\nTheir configs can't say what the layers would be.\n\n"
    text += "".join(f"- {t}: {why.removeprefix('refused: ').removeprefix('its model: ')}\n" for t, why in refused)
    if odd:
        text += f"\n## Not right: {len(odd)} types\n\n" + "".join(f"- {t}: {m} {d}\n" for t, m, d in odd)
    text += f"\n## Not tried: {len(skipped)} types\n\nThey can't be made of their default configs with small numbers in them.\n\n"
    text += "".join(f"- {t}: {why.removeprefix('skipped: ')}\n" for t, why in skipped)
    PAGE.write_text(text.replace("<", "&lt;"))
    print(
        f"{len(right)} merged, {len(follows)} taken apart, {len(refused)} refused, {len(skipped)} not tried, {len(odd)} not right"
    )


if __name__ == "__main__":
    main()
