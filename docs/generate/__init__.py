"""The pages of the documentation that are written from the code and from recorded results.

``pages.py`` is what mkdocs runs at each build; every other module returns the Markdown of one page.
"""
