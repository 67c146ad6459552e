"""Pages for a browser, offline: a blind comparison of two folders of samples, and the page of one run."""
