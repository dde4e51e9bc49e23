"""Where tokens come from. Each module here is a source, and `python data.py NAME` runs it:

    MAKES_ITSELF            True if it needs no files, so that training makes it on first use
    folder_name(options)    ->  name of the folder under data/
    make(options)           ->  meta, chunks: what meta.json holds, and an iterable of
                                (split, tokens (m, *grid), labels (m,)); and where files
                                travel with the tokens, {"tokenizer.json": its bytes}

options is a data.Make. The docstring's first line is what `python data.py --list` prints.
A source that can judge samples also has score(tokens, real), and names itself in meta["score"].
"""
