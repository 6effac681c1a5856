"""Pages for people, each with everything in it: reports on a captioning output and on a training, explained captions, and
the templates of all pages, the server's included. Knows nothing of how captions are made.
"""
