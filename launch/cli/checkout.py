"""Files of the checkout that `conf/` names, found from any working directory."""

from pathlib import Path

from omegaconf import OmegaConf

from lrsa_ds.errors import LRSAError
from lrsa_ds.settings.model import ModelConfig

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
ONLY_IN_A_CHECKOUT = "an installed package does not contain this model, `make setup` in a checkout fetches it"


def register_checkout() -> None:
    """`${checkout:PATH}` in a file of `conf/`: a path in the checkout, made absolute."""
    OmegaConf.register_new_resolver("checkout", lambda path: str(ROOT / path), replace=True)


def check_fetched(model: ModelConfig) -> None:
    """Raises LRSAError if the model is the one that `make setup` downloads into the checkout, but it is missing."""
    directory = Path(model.name or "").expanduser()
    if not directory.is_relative_to(ROOT / "models"):
        return
    path = directory / (model.gguf_file or "")
    if not path.exists():
        fetch = f"`make setup` in {ROOT} fetches it" if (ROOT / "Makefile").exists() else ONLY_IN_A_CHECKOUT
        raise LRSAError(
            f"model.name={model.name!r}: {path} is not there; {fetch}, and model=hub model.name=... names another "
            "model."
        )
