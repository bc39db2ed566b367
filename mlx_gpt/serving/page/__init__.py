"""The page for people: its files, and the policy that keeps a browser from loading anything else."""

from importlib.resources import files

PATH = "/page/"  # the page loads its other files from here
INDEX = "index.html"  # the page itself, which `/` sends with the policy
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
FILES = {
    file.name: (file.read_bytes(), kind)
    for file in files(__package__).iterdir()
    for suffix, kind in TYPES.items()
    if file.name.endswith(suffix)
}
"""The content and the media type of each file, by name."""

# Only this server's files and answers (https://www.w3.org/TR/CSP3/). Scripts and styles within the page are refused.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
