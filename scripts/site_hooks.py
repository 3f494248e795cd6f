"""Small corrections while the site is built."""


def on_page_content(html: str, **_: object) -> str:
    """Show inline mathematics of docstrings as code."""
    return html.replace(":math:<code>", "<code>")
