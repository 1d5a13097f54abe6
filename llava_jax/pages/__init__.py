"""Pages for people to look at: one file each, no network, nothing but text and pictures inside.

markup      text that is not trusted, made visible and harmless; elements that escape what they get
page        the shell that every page shares, tables, pictures
plots       histograms and lines as inline SVG
rows        a row of a batch as people read it: learned, context, images, padding, by segment
inspection  the page of what a model is trained on
run_report  the page of a training run
terminal    a row in the terminal
"""
