"""The file in a saved model's folder by which ``trust_remote_code`` finds the installed package."""

from __future__ import annotations

from pathlib import Path


def write_remote_code(folder: Path, *classes: type) -> None:
    """Write ``modeling_scone.py``, which hands ``classes`` on, or says in one line what to install.

    transformers tells users to install what it finds missing by the name of the import, and on the package index that
    name is a stranger's. It does not look at imports inside of ``try``.
    """
    imports = "\n".join(f"    from {ours.__module__} import {ours.__name__}" for ours in classes)
    names = ", ".join(f'"{ours.__name__}"' for ours in classes)
    text = f'''\
"""Where AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) finds SCONE."""

try:
{imports}
except Exception as error:  # a package of another time fails in ways of its own
    raise ImportError(
        f"this model needs SCONE, which cannot be imported here ({{error}}); install it: pip install scone-lm "
        "(the package that is named scone is another one, and has to go: pip uninstall scone)"
    ) from None

__all__ = [{names}]
'''
    (folder / "modeling_scone.py").write_text(text, encoding="utf-8")
