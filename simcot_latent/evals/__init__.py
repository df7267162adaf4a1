"""The evals, one thin file each: `python -m simcot_latent.evals.<name>`.

In a checkout they lie in its folder `evals/`, so that `python -m evals.<name>` works there; an installed package has
them here, as `evals` is a name that other packages have too.
"""

from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules

_CHECKOUT = Path(__file__).parents[2] / "evals"
if not (Path(__file__).parent / "gsm8k.py").is_file():
    __path__.append(str(_CHECKOUT))


def eval_names() -> list[str]:
    """The evals that there are."""
    return sorted(module.name for module in iter_modules(__path__))


def module_of(name: str) -> str:
    """The module of an eval as `python -m` finds it from here: the shorter name where that is ours."""
    found = find_spec("evals")
    places = (found.submodule_search_locations or []) if found is not None else []
    return f"{'evals' if str(_CHECKOUT) in places and str(_CHECKOUT) in __path__ else __name__}.{name}"
