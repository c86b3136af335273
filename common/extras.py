"""The optional packages of this one, as `pip install 'salt-distill[serve]'` brings them."""

import importlib.util

EXTRAS = {
    "serve": ("ray", "fastapi", "aiohttp", "uvicorn", "prometheus_client"),
    "train": ("ray", "pandas", "fsspec", "requests", "prometheus_client"),
    "eval": ("sklearn", "scipy", "matplotlib", "jinja2"),
    "wandb": ("wandb",),
    "torchcodec": ("torchcodec",),
}
"""Modules that each extra brings; of ``train`` also those without which ``ray.train`` is not imported.
``pyproject.toml`` has the packages."""


def require_extra(extra: str) -> None:
    """Raises ValueError where a module of an extra is not installed."""
    missing = [module for module in EXTRAS[extra] if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(f"got no {', '.join(missing)}, expected what this command needs: {_install(extra)}")


def missing_module(module: str) -> str | None:
    """What to do about an import that failed; None where no extra brings the module."""
    extra = next((extra for extra, modules in EXTRAS.items() if module.partition(".")[0] in modules), None)
    return None if extra is None else f"got no {module}, expected what this command needs: {_install(extra)}"


def _install(extra: str) -> str:
    return f"pip install 'salt-distill[{extra}]'"
