"""A run or an analysis as one HTML file that needs no network, and opens from a mail.

:mod:`.page` is what a page holds and how it is written, :mod:`.pictures` and :mod:`.histogram` are
parts of it; :mod:`.of_folders` and :mod:`.of_analysis` fill it. The page itself, its style and its
script are in ``templates``. Jinja2 is the extra ``report``
(``pip install "lpips-fast[report]"``).
"""

from .page import Page, require_jinja2

__all__ = ["Page", "require_jinja2"]
