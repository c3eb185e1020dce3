"""What the HTML pages of several rooms share: their layout, and how a template becomes a page."""
