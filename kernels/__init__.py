"""The hot path of parameter-efficient fine-tuning.  The folder is imported as `minigpt_kernels`."""

if __name__ == "kernels":  # found on sys.path before Hugging Face's package, which takes its place
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    __path__ = []  # nothing here is imported a second time
    project = Path(__file__).resolve().parents[1]
    others = [entry for entry in sys.path if Path(entry).resolve() != project]
    if (spec := PathFinder.find_spec(__name__, others)) and spec.loader:
        sys.modules[__name__] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[__name__])
else:
    from . import lora_operator as lora_operator  # register what torch.compile calls
    from . import nf4_operator as nf4_operator
    from .lora import lora_linear
    from .update import ClippedAdamW, ClippedSGD

    __all__ = ["ClippedAdamW", "ClippedSGD", "lora_linear"]
