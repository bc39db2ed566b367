"""The page for people: one file, and the policy that lets a browser load nothing else."""

import base64
import hashlib
import re
from importlib.resources import files

HTML = files(__package__).joinpath("page.html").read_text(encoding="utf-8")


def _policy(html: str) -> str:
    """A policy that allows the page's own script and style, and requests to this server (https://www.w3.org/TR/CSP3/)."""
    hashes = {
        tag: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
            for content in re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        )
        for tag in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


POLICY = _policy(HTML)
